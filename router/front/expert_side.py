"""The front's side towards the expert workers: who they are, what they hold, and when an epoch may begin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import Config, Effective
from common.config_rules import WILDCARDS
from common.environment import hccl_buffer_mb
from common.errors import ConfigError, ControlError, NotReady, ReloadRefused
from common.model_config import ModelConfig
from common.own_address import own_address
from common.placement import Placement
from common.preflight import require
from common.preflight_fleet import fixed_findings
from common.preflight_memory import buffer_bytes
from common.rank_table import RankTable
from router.front.allowance import Allowance
from router.front.epoch_attempt import EpochFacts, Reach
from router.front.epochs import Epochs
from router.front.fleet import Fleet
from router.front.fleet_service import FleetService
from router.front.heartbeats import Heartbeats
from router.front.service_state import ServiceState
from router.front.two_servers import TwoServerRule
from router.placement.balanced import place
from router.placement.coverage import coverage_of
from router.placement.load import ExpertLoads, read_loads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """What a router is started with, and keeps.

    Attributes:
        model_path: the checkpoint's directory, as workers are told.
        dtype: "float32" or "bfloat16".
    """

    term: int
    model_path: str
    dtype: str
    model: ModelConfig


class ExpertSide:
    """Everything that a router with expert workers has, and one without them has not."""

    def __init__(
        self,
        facts: RouterFacts,
        config: Callable[[], Config],
        fleet: Fleet,
        state: ServiceState,
        token: str,
        send: Callable[[object], None],
    ) -> None:
        """Put it together.

        Args:
            facts: of the router.
            config: the configuration in force.
            fleet: the workers, known or yet to come.
            state: what the front knows of its service.
            token: the fleet's.
            send: to the engine.

        Raises:
            ConfigError: workers, experts and redundant experts do not fit together, or the load file is bad.
        """
        at_start = config()
        placement = _placement(at_start, facts.model)
        self._no_loads = ExpertLoads(dict.fromkeys(placement.layers, (0,) * facts.model.n_routed_experts))
        self._covered = placement
        self._coverage = coverage_of(placement, self._no_loads)
        logger.info("placement: %s", self._coverage)
        self.heartbeats = Heartbeats(fleet, facts.term, token, state.announce)
        data_address = own_address(at_start.data_address)
        host = data_address if at_start.fleet_host in WILDCARDS else own_address(at_start.fleet_host)
        rule = TwoServerRule(host, data_address, fleet.table, self.heartbeats.agent_of)
        self._allowance = Allowance(config, rule)
        self.epochs = Epochs(
            EpochFacts(
                term=facts.term,
                world_size=at_start.world_size,
                model_path=facts.model_path,
                dtype=facts.dtype,
                placement=placement,
                exchange=at_start.exchange,
                buffer_bytes=lambda one: buffer_bytes(one, facts.model, hccl_buffer_mb(one.device)),
            ),
            config,
            fleet,
            state,
            Reach(self.heartbeats.agent_of, send, state.announce),
            self._allowance,
        )
        self.heartbeats.epochs = self.epochs
        self.service = FleetService(facts.term, fleet, self.heartbeats, self.epochs, state)

    @property
    def coverage(self) -> float:
        """The share of experts that survive any one loss from now on."""
        if self._covered is not self.epochs.placement:
            self._covered = self.epochs.placement
            self._coverage = coverage_of(self._covered, self._no_loads)
        return self._coverage.experts

    async def check_reload(self, after: Effective) -> None:
        """Let the epoch that is prepared or in force go on with another configuration.

        Raises:
            ReloadRefused: it must not.
            NotReady: a worker could not be asked.
        """
        try:
            await self._allowance.check_change(after.config, self.epochs.members)
        except ConfigError as error:
            raise ReloadRefused({after.paths["ep_level"]: str(error)}) from None
        except ControlError as error:
            raise NotReady(f"{error}: the configuration in force stays as it was; try again") from None


def check_fixed(model: ModelConfig, table: RankTable | None, config: Config) -> None:
    """Check what can be known before anything is started.

    Raises:
        ConfigError: one sentence for each thing that does not fit.
    """
    require(fixed_findings(config, model, table, hccl_buffer_mb(config.device)))


def _placement(config: Config, model: ModelConfig) -> Placement:
    """Where the experts of every epoch are."""
    loads = None
    if config.expert_load_file is not None:
        loads = read_loads(Path(config.expert_load_file), model.n_routed_experts, model.moe_layer_ids)
    return place(
        model.n_routed_experts,
        model.moe_layer_ids,
        config.world_size,
        config.redundant_experts,
        loads,
        model.n_group or 1,
    )
