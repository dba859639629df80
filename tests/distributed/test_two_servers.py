"""The two-server rule with real services on real hosts: direct cables, a switch, and a fake hccn_tool."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.hosts import Host, cabled_hosts, card_address, switched_hosts, written
from tests.tiny_checkpoint import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
START_S = 90.0
REFUSED_STATUS = 2
TOKEN = {"EXPERTMESH_FLEET_TOKEN": "a-secret-of-the-fleet"}
ASK = ("expertmesh", "generate", "Far", "--temperature", "0", "--max-tokens", "2", "--target")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_checkpoint(directory, family="v3", n_routed_experts=24)
    return directory


class Site:
    """The configuration that all hosts of a test share, and what their services say."""

    def __init__(self, folder: Path, model: Path, **own: str) -> None:
        self.config = written(folder, model, world_size=2)
        self.log = folder / "log"
        self.log.touch()
        document = json.loads(self.config.read_text())
        entry = document["ModelDeployConfig"]["ModelConfig"][0]
        entry["models"] = {"deepseekv2": {"ep_level": 2}}
        document["ExpertMesh"] |= {"agentPort": 0, **own}
        self.config.write_text(json.dumps(document))

    def router(self, host: Host, **environment: str) -> None:
        host.start(self.log, "router", "--config", str(self.config), **TOKEN, **environment)

    def worker(self, host: Host, name: str, router: Host, **environment: str) -> None:
        names = ("--router", f"{router.address}:1028", "--worker-id", name)
        command = ("expert_worker", "--config", str(self.config), *names)
        host.start(self.log, *command, **TOKEN, **environment)

    def wait_until(self, claim: Callable[[], object]) -> None:
        end = time.monotonic() + START_S
        while not claim():
            assert time.monotonic() < end, self.log.read_text()[-6000:]
            time.sleep(0.2)

    def serves(self, router: Host) -> bool:
        return router.run("common.health", f"{router.address}:1025", "readiness").returncode == 0

    def refusal(self, router: Host) -> str:
        """The sentence with which the router ends."""
        service = router.services[0]
        self.wait_until(lambda: service.poll() is not None)
        assert service.returncode == REFUSED_STATUS, self.log.read_text()[-6000:]
        (sentence,) = [line for line in self.log.read_text().splitlines() if line.startswith("ep_level is 2")]
        return sentence

    def has_loaded(self) -> bool:
        return "preparing ep_rank" in self.log.read_text()


def test_one_cable_carries_every_pair_of_two_hosts(tmp_path: Path, model: Path) -> None:
    site = Site(tmp_path, model)
    with cabled_hosts() as (first, second):
        site.router(first)
        site.worker(first, "worker-0", first)
        site.worker(second, "worker-1", first)
        site.wait_until(lambda: site.serves(first))
        answer = second.run(*ASK, f"{first.address}:1025")
        assert answer.returncode == 0, answer.stderr
        assert "all 2 pairs of ranks on different servers reach each other" in site.log.read_text()


def test_cards_that_are_cabled_one_to_one_are_refused_with_the_pair(tmp_path: Path, model: Path) -> None:
    """A router at card 0 reaches card 0 of the other host, and not card 1."""
    site = Site(tmp_path, model)
    with cabled_hosts(num_cables=2) as (first, second):
        # Hosts answer for all of their cards; cards of NPUs do not.
        apart = ("ip", "rule", "add", "to", card_address(second, 1), "from", first.address, "unreachable")
        first.call(*apart)
        site.router(first)
        site.worker(second, "worker-0", first)
        other = {"EXPERTMESH_DATA_ADDRESS": card_address(second, 1)}
        site.worker(second, "worker-1", first, EXPERTMESH_AGENT_ADDRESS=second.address, **other)
        sentence = site.refusal(first)
        assert f"on the two servers {first.address} and {second.address}, which needs a switch" in sentence
        assert f"the router on {first.address} does not reach expert worker worker-1 (ep_rank" in sentence
        assert f"on {second.address} ({card_address(second, 1)}:" in sentence
        assert "set ep_level to 1" in sentence
        assert not site.has_loaded()


def test_a_direct_cable_that_hccn_tool_shows_is_refused(tmp_path: Path, model: Path) -> None:
    tool = tmp_path / "bin" / "hccn_tool"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\necho "System Description TLV"\n'
        'case "$*" in "-i 3 "*) echo AscendNPU;; *) echo Versatile Routing Platform;; esac\n'
    )
    tool.chmod(0o755)
    site = Site(tmp_path, model)
    path = {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
    with cabled_hosts() as (first, second):
        site.router(first, **path)
        for index, host in enumerate((first, second)):
            device = {"EXPERTMESH_DEVICE_ID": str(index + 2)}
            site.worker(host, f"worker-{index}", first, **path, **device)
        sentence = site.refusal(first)
        reason = f"device 3 of {second.address} is connected to another NPU"
        assert f"{reason}: its neighbour describes itself as 'AscendNPU'" in sentence
        assert not site.has_loaded()
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked) == ["-i 2 -lldp -g", "-i 3 -lldp -g"]


def test_three_hosts_on_a_switch_serve_until_two_are_left_that_must_not(tmp_path: Path, model: Path) -> None:
    site = Site(tmp_path, model, topology="direct")
    with switched_hosts(3) as (first, second, third):
        site.router(first)
        site.worker(second, "worker-0", first)
        site.worker(third, "worker-1", first)
        site.wait_until(lambda: site.serves(first))
        assert "the fleet is on 3 servers, and the rule is about two" in site.log.read_text()
        site.worker(second, "worker-2", first)
        site.wait_until(lambda: "expert worker worker-2 registered" in site.log.read_text())
        third.stop()
        why = f"on the two servers {first.address} and {second.address}, which needs a switch"
        site.wait_until(lambda: why in site.log.read_text())
        assert not site.serves(first)
        # The router goes on: what is missing may come.
        assert first.services[0].poll() is None
        site.worker(third, "worker-1", first)
        site.wait_until(lambda: site.serves(first))
