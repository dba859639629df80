"""How a worker joins a router, by a link of two or in a group of all workers: one class per exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common import compute_threads
from common.errors import ConfigError
from common.exchange.collective import CollectiveExpertExchange, join_group
from common.exchange.link_choice import Meeting, join_router
from common.exchange.links import LinksExpertExchange
from common.exchange.routing import RowShape
from common.native_rows import RowAnswers
from common.progress_counter import ProgressCounter
from expert_worker.experts import LayerExperts
from expert_worker.messages import Prepare


class JoinLink:
    """Joins over a link of its own with each router."""

    def __init__(
        self, exchange: LinksExpertExchange, data_address: str, same_host: str, progress: ProgressCounter
    ) -> None:
        """Hand links to `exchange`.

        Args:
            exchange: it may answer rows by itself.
            data_address: this host's.
            same_host: ExpertMesh.sameHostTransport.
            progress: moves on with what the exchange computes.
        """
        self.exchange = exchange
        self._progress = progress
        self._data_address = data_address
        self._same_host = same_host

    def join(
        self,
        message: Prepare,
        shape: RowShape,
        layers: Mapping[int, LayerExperts],
        check: Callable[[], None],
    ) -> None:
        """Join the router.

        Args:
            message: where it is.
            shape: of its rows.
            layers: the experts of the epoch, by layer_id.
            check: raises where the epoch is wanted no longer once the link is up.

        Raises:
            LinkError: the router did not come.
            ConfigError: the router exchanges rows in another way.
        """
        _check_exchange(message, "links")
        link = join_router(
            Meeting(
                message.host,
                message.port,
                prefix=message.prefix,
                timeout_s=message.timeout_s,
                data_address=self._data_address,
                same_host=self._same_host,
            )
        )
        try:
            check()
            if link.keeps_memory:  # the router computes on this machine, too, and begins with the first core
                compute_threads.take_cores(message.ep_rank + 1)
            self.exchange.add_router(
                *(message.term, message.epoch, message.incarnation, link, shape, experts_of(message)),
                self._answers(shape, layers),
            )
        except BaseException:
            link.close()
            raise

    def _answers(self, shape: RowShape, layers: Mapping[int, LayerExperts]) -> RowAnswers | None:
        """What answers rows of the layers whose experts the native kernels run; None where there are none."""
        joined = {layer_id: layer.joined for layer_id, layer in layers.items() if layer.joined is not None}
        progress = self._progress.address
        return RowAnswers(joined, shape.dtype, shape.hidden_size, progress) if joined else None


class JoinGroup:
    """Joins in one group per router, with all of its workers."""

    def __init__(self, exchange: CollectiveExpertExchange, data_address: str, backend: str) -> None:
        """Hand groups to `exchange`; `backend` is gloo, nccl or hccl."""
        self.exchange = exchange
        self._data_address = data_address
        self._backend = backend

    def join(
        self,
        message: Prepare,
        shape: RowShape,
        layers: Mapping[int, LayerExperts],
        check: Callable[[], None],
    ) -> None:
        """Join the router and its other workers; arguments as in JoinLink, which looks at layers.

        Raises:
            LinkError: somebody did not come.
            ConfigError: the router exchanges rows in another way.
        """
        _check_exchange(message, "collective")
        group = join_group(
            message.host,
            message.port,
            message.prefix,
            1 + message.ep_rank,
            1 + message.ep_size,
            message.timeout_s,
            self._data_address,
            self._backend,
        )
        try:
            check()
            self.exchange.add_router(
                message.term, message.epoch, message.incarnation, group, shape, experts_of(message)
            )
        except BaseException:
            group.close()
            raise


def experts_of(message: Prepare) -> dict[int, tuple[int, ...]]:
    """The experts an epoch gives to this worker: layer_id -> checkpoint indices in local order."""
    experts: dict[int, tuple[int, ...]] = {}
    for layer_id, own in message.layers:
        if isinstance(layer_id, int) and isinstance(own, list):
            experts[layer_id] = tuple(own)
    return experts


def _check_exchange(message: Prepare, ours: str) -> None:
    if message.exchange != ours:
        raise ConfigError(
            f"the router exchanges rows by {message.exchange!r} and this worker by {ours!r}: give both the "
            "same ExpertMesh.exchange and ExpertMesh.device"
        )
