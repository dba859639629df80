"""Whether these workers may form an epoch: asked once for each membership and level, before they load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from common.config import Config
from router.front.fleet import Worker
from router.front.two_servers import TwoServerRule

logger = logging.getLogger(__name__)


class Allowance:
    """Remembers what was allowed last, so that a membership that goes on is not looked at again."""

    def __init__(self, config: Callable[[], Config], rule: TwoServerRule) -> None:
        """`config` is the configuration in force."""
        self._config = config
        self._rule = rule
        self._allowed: object = None

    async def check(self, workers: Sequence[Worker]) -> None:
        """Let these workers, by ep_rank, be the members of an epoch with the configuration in force.

        Raises:
            ConfigError: they must not be: the reason and the way out.
            ControlError: a worker could not be asked.
        """
        config = self._config()
        question = (config.ep_level, [(worker.worker_id, worker.incarnation) for worker in workers])
        if question == self._allowed:
            return
        self._allowed = None
        reason = await self._rule.check(config, workers)
        self._allowed = question
        logger.info("this membership may serve: %s", reason)

    async def check_more(self, workers: Sequence[Worker]) -> None:
        """Let these workers follow the members of the epoch in force, who go on if they must not.

        Raises:
            ConfigError: they must not: the reason and the way out.
            ControlError: a worker could not be asked.
        """
        await self._rule.check(self._config(), workers)

    async def check_change(self, config: Config, workers: Sequence[Worker]) -> None:
        """Let an epoch with these members go on with another configuration, which is not in force yet.

        Raises:
            ConfigError: it must not: the reason and the way out.
            ControlError: a worker could not be asked.
        """
        if config.ep_level != self._config().ep_level:
            await self._rule.check(config, workers)
