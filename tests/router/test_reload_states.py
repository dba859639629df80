"""Reloads, rollbacks, refusals, crashes and restarts in any order, against a model of a few lines."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.config import Config, Effective, resolve
from common.errors import ExpertMeshError
from router.front import epoch_attempt
from router.front.config_history import ConfigHistory
from router.front.config_in_force import ConfigInForce
from router.front.engine_tuning import EngineTuning, tune_of
from router.front.reload import Outcome, Proposal, Reload
from router.front.rollout import Rollout
from router.front.version_files import VersionFiles
from router.messages import CommitTune, Tune, Tuned, TuneRefused
from tests.router import reload_fleet
from tests.router.reload_fleet import LOADED, NUM_WORKERS, Links, Workers, needs_of
from tests.router.test_config_history import Crash, failing_at

WORKER_CALLS = st.sampled_from(
    [
        *[reload_fleet.AGREES] * 4,
        *(reload_fleet.REFUSES, reload_fleet.DIES_PREPARING),
        *(reload_fleet.IS_LATE, reload_fleet.DIES_PREPARED),
    ]
)
AGREES, REFUSES, SILENT, DIES, AGREES_AND_DIES, IS_REPLACED = range(6)
ENGINE_CALLS = st.sampled_from([AGREES, AGREES, REFUSES, SILENT, DIES, AGREES_AND_DIES, IS_REPLACED])
HOT = st.fixed_dictionaries(
    {},
    optional={
        "microBatches": st.integers(1, 8),
        "maxQueuedRequests": st.integers(1, 3),
        "deadlineFloorSeconds": st.sampled_from([0.5, 1.0]),
    },
)
BAD = st.sampled_from(
    [{"microBatches": 0}, {"threads": 2}, {"nobody": 1}, {"microBatches": 3, "dtype": "float32"}]
)


class World:
    """One run of a router: everything but its gRPC and its processes. `behaviour` is the engine's."""

    def __init__(self, folder: Path, loop: asyncio.AbstractEventLoop, has_workers: bool) -> None:
        self.loop = loop
        self.links = Links()
        self.behaviour = AGREES
        self.engine: Tune | None = None
        self._proposed: Tune | None = None
        self.history = ConfigHistory(VersionFiles(folder / "state"))
        self.in_force = ConfigInForce(resolve(folder / "config.json"), self.history)
        self.tuning = EngineTuning(
            self._to_engine, self.restart_engine, lambda: self.engine is not None, 0.02
        )
        self.workers = Workers(lambda: self.in_force.config, self._to_engine) if has_workers else None
        rollout = Rollout(self.tuning, self.workers.epochs if self.workers is not None else None)
        self.reload = Reload(self.in_force, self.history, rollout, self._check, self._changed)
        self.restart_engine()

    async def _check(self, after: Effective) -> None:
        """There is no fleet that could not go on."""

    def _changed(self, before: Config, after: Config) -> None:
        if self.workers is not None:
            self.workers.epochs.wake()

    def restart_engine(self) -> None:
        """What KeptChild does: the next engine is configured with what is in force at that moment."""
        self.tuning.engine_started()
        self._proposed, self.engine = None, tune_of(self.in_force.config, 0)
        self.links = Links()
        if self.workers is not None:
            self.workers.state.engine_loaded(LOADED)
            self.workers.epochs.wake()

    def kill_engine(self) -> None:
        self.engine = None
        self.tuning.engine_ended()
        if self.workers is not None:
            self.workers.state.engine_ended("the engine was killed")
            self.workers.epochs.engine_ended()

    def kill_engine_in_loop(self) -> None:
        """The engine dies while nothing else happens."""

        async def kill() -> None:
            self.kill_engine()

        self.loop.run_until_complete(kill())

    def settle(self) -> None:
        """What was about to happen happens, and who died is started again."""
        self.loop.run_until_complete(asyncio.sleep(0.001))
        if self.engine is None:
            self.restart_engine()
        if self.workers is not None:
            self.loop.run_until_complete(self.workers.serving())

    def _to_engine(self, message: object) -> None:
        if self.engine is None:
            return
        if isinstance(message, CommitTune):
            assert self._proposed is not None
            assert self._proposed.tune_id == message.tune_id
            self.links.commit(message.epoch)
            self.engine = self._proposed
        elif isinstance(message, Tune):
            self._proposed = message
            self.loop.call_soon(self._answer, message.tune_id)
        elif self.workers is not None and (linked := self.links.take(message)) is not None:
            self.loop.call_soon(self.workers.epochs.linked, linked)

    def _answer(self, tune_id: int) -> None:
        if self.behaviour == REFUSES:
            self.tuning.answered(TuneRefused(tune_id, "no"))
        elif self.behaviour == DIES:
            self.kill_engine()
        elif self.behaviour != SILENT:
            self.tuning.answered(Tuned(tune_id))
            if self.behaviour in (AGREES_AND_DIES, IS_REPLACED):
                # While the history is being written.
                self.loop.call_later(0, self.kill_engine)
            if self.behaviour == IS_REPLACED:
                self.loop.call_later(0, self.restart_engine)


class ReloadMachine(RuleBasedStateMachine):
    """`expected` is what is in force, `kept` is the whole history: (number, document)."""

    num_workers = 0

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr(epoch_attempt, "BESIDE_TIMEOUT_S", 1.0)
        self.folder = Path(tempfile.mkdtemp(prefix="reload-states-"))
        self.loop = asyncio.new_event_loop()
        self.kept: list[tuple[int, dict[str, Any]]] = []
        self.world: World | None = None

    @property
    def now(self) -> World:
        assert self.world is not None
        return self.world

    @initialize(own=HOT)
    def begin(self, own: dict[str, Any]) -> None:
        self.file = self.document_of(own)
        self.start()

    def document_of(self, own: dict[str, Any], ep_level: int = 1) -> dict[str, Any]:
        model = {"worldSize": self.num_workers, "models": {"deepseekv2": {"ep_level": ep_level}}}
        section = {**own, "stateDir": str(self.folder / "state")}
        return {"ModelDeployConfig": {"ModelConfig": [model]}, "ExpertMesh": section}

    def start(self) -> None:
        (self.folder / "config.json").write_text(json.dumps(self.file))
        self.world = World(self.folder, self.loop, self.num_workers > 0)
        self.world.settle()
        if not self.kept or self.kept[-1][1] != self.file:
            self.kept.append((self.now.in_force.version.number, copy.deepcopy(self.file)))
        self.expected = self.kept[-1]

    def stop(self) -> None:
        if self.world is not None:
            self.world.history.close()
            self.world = None

    def apply(
        self, proposal: Proposal, behaviour: int = AGREES, of_worker: int = reload_fleet.AGREES
    ) -> Outcome | BaseException:
        self.now.behaviour = behaviour
        if self.now.workers is not None:
            self.now.workers.behaviour = of_worker

        async def work() -> Outcome:
            return await self.now.reload.apply(proposal)

        try:
            return self.loop.run_until_complete(work())
        except (ExpertMeshError, Crash) as error:
            return error
        finally:
            self.now.settle()

    def took(self, outcome: Outcome, document: dict[str, Any]) -> None:
        if document == self.expected[1]:
            assert not outcome.is_applied
            return
        assert outcome.is_applied
        assert outcome.version > self.expected[0]
        self.expected = (outcome.version, copy.deepcopy(document))
        self.kept.append(self.expected)

    @rule(own=HOT, ep_level=st.sampled_from([1, 2]), behaviour=ENGINE_CALLS, of_worker=WORKER_CALLS)
    def reload(self, own: dict[str, Any], ep_level: int, behaviour: int, of_worker: int) -> None:
        document = self.document_of(own, ep_level)
        effective = self.now.in_force.effective
        acts = tune_of(effective.replaced_by(document, "").config, 0) != tune_of(effective.config, 0)
        outcome = self.apply(Proposal(document, "peer", "reload"), behaviour, of_worker)
        fails = behaviour in (REFUSES, SILENT, DIES)
        if self.num_workers:
            # All have to live until it is in force; without workers the next engine takes it up.
            fails = fails or behaviour != AGREES or of_worker != reload_fleet.AGREES
        assert isinstance(outcome, Outcome) == (not (fails and acts))
        if isinstance(outcome, Outcome):
            self.took(outcome, document)

    @rule(own=HOT, bad=BAD)
    def reload_what_is_wrong_or_cold(self, own: dict[str, Any], bad: dict[str, Any]) -> None:
        outcome = self.apply(Proposal(self.document_of({**own, **bad}), "peer", "reload"))
        assert isinstance(outcome, ExpertMeshError)

    @rule(own=HOT, distance=st.integers(1, 3))
    def reload_in_the_belief_that_another_version_is_in_force(
        self, own: dict[str, Any], distance: int
    ) -> None:
        proposal = Proposal(
            self.document_of(own), "peer", "reload", expected_version=self.expected[0] + distance
        )
        assert isinstance(self.apply(proposal), ExpertMeshError)

    @rule(own=HOT, ep_level=st.sampled_from([1, 2]), behaviour=ENGINE_CALLS, of_worker=WORKER_CALLS)
    def dry_run(self, own: dict[str, Any], ep_level: int, behaviour: int, of_worker: int) -> None:
        proposal = Proposal(self.document_of(own, ep_level), "peer", "reload", is_dry_run=True)
        epoch = self.now.links.epoch
        outcome = self.apply(proposal, behaviour, of_worker)
        assert not isinstance(outcome, Outcome) or not outcome.is_applied
        if behaviour in (AGREES, REFUSES, SILENT):
            assert self.now.links.epoch == epoch

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        number, document = data.draw(st.sampled_from(self.kept))
        found = self.now.history.find(number)
        assert found.document == document
        self.took(self.finished(self.apply(Proposal(document, "peer", f"rollback to {number}"))), document)

    @rule(own=HOT, count=st.integers(1, 12), before=st.booleans())
    def the_disk_fails(self, own: dict[str, Any], count: int, before: bool) -> None:
        document = self.document_of(own)
        with pytest.MonkeyPatch.context() as patched:
            failing_at(patched, count, lambda: OSError(5, "Input/output error"), before)
            outcome = self.apply(Proposal(document, "peer", "reload"))
        if isinstance(outcome, Outcome):
            self.took(outcome, document)

    @rule(own=HOT, file=HOT, count=st.integers(1, 9), before=st.booleans())
    def the_router_dies_while_it_reloads(
        self, own: dict[str, Any], file: dict[str, Any], count: int, before: bool
    ) -> None:
        document = self.document_of(own)
        with pytest.MonkeyPatch.context() as patched:
            failing_at(patched, count, Crash, before)
            outcome = self.apply(Proposal(document, "peer", "reload"))
        if isinstance(outcome, Outcome):
            self.took(outcome, document)
        self.stop()
        with_files = VersionFiles(self.folder / "state")
        numbers = with_files.numbers()
        with_files.close()
        if isinstance(outcome, Crash) and numbers[-1] > self.kept[-1][0]:
            # It died after the version was there.
            self.kept.append((numbers[-1], document))
        self.file = self.document_of(file)
        self.start()

    @rule(file=st.none() | HOT)
    def the_router_is_started_again(self, file: dict[str, Any] | None) -> None:
        self.stop()
        if file is not None:
            self.file = self.document_of(file)
        self.start()

    @rule()
    def the_engine_dies(self) -> None:
        self.now.kill_engine_in_loop()
        self.now.settle()

    @rule()
    def a_worker_dies(self) -> None:
        if self.now.workers is not None:
            self.now.workers.agents["w0"].die()
            self.now.settle()

    @rule(own=HOT)
    def the_file_is_read_again(self, own: dict[str, Any]) -> None:
        self.file = self.document_of(own)
        (self.folder / "config.json").write_text(json.dumps(self.file))
        self.now.behaviour = AGREES
        self.loop.run_until_complete(self.now.reload.reread())
        self.now.settle()
        if self.file != self.expected[1]:
            self.expected = (self.now.in_force.version.number, copy.deepcopy(self.file))
            self.kept.append(self.expected)
        assert self.now.in_force.unsaved(self.now.in_force.effective) == []

    @invariant()
    def what_is_in_force_is_whole_everywhere(self) -> None:
        if self.world is None:
            return
        in_force = self.now.in_force
        assert (in_force.version.number, in_force.effective.document) == self.expected
        alone = in_force.effective.replaced_by(self.expected[1], "").config
        assert in_force.config == alone
        engine = self.now.engine
        assert engine is not None
        assert tune_of(alone, engine.tune_id) == engine
        if self.now.workers is not None:
            # And in every worker: the epoch in force is one that all prepared for this configuration.
            epoch = self.now.workers.state.epoch
            assert (self.now.links.epoch, self.now.links.held) == (epoch, 0)
            agents = self.now.workers.agents.values()
            assert [agent.prepared[epoch] for agent in agents] == [needs_of(alone)] * self.num_workers
        assert [(version.number, version.document) for version in self.now.history.versions] == self.kept

    @staticmethod
    def finished(outcome: Outcome | BaseException) -> Outcome:
        assert isinstance(outcome, Outcome), outcome
        return outcome

    def teardown(self) -> None:
        self.stop()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        shutil.rmtree(self.folder)
        self.patched.undo()


class FleetReloadMachine(ReloadMachine):
    """The same with expert workers, which agree, refuse, are late or die."""

    num_workers = NUM_WORKERS


for machine in (ReloadMachine, FleetReloadMachine):
    machine.TestCase.settings = settings(
        max_examples=30, stateful_step_count=16, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
TestReloads = ReloadMachine.TestCase
TestReloadsOfAFleet = FleetReloadMachine.TestCase
