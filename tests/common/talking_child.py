"""A child without torch: `python -m tests.common.talking_child --channel-fd N` does what it is told to."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

from common.channel import ChildChannel, Fatal, Shutdown, by_name
from common.lifeline import obey_parent_only
from common.progress_counter import ProgressCounter


@dataclass(frozen=True, slots=True)
class Say:
    what: str


@dataclass(frozen=True, slots=True)
class Hello:
    pid: int
    omp_wait_policy: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--progress-fd", type=int)
    arguments = parser.parse_args()
    obey_parent_only()
    channel = ChildChannel(arguments.channel_fd, by_name(Say, Shutdown))
    hello = Hello(os.getpid(), os.environ.get("OMP_WAIT_POLICY", ""))
    for message in channel:
        match message:
            case Say("hello"):
                channel.send(hello)
            case Say("fail"):
                channel.send(Fatal("CheckpointError", "the shard is damaged"))
                return
            case Say("stay"):
                channel.send(hello)
                time.sleep(60)
            case Say("babble"):
                channel.send(hello)
                os.write(arguments.channel_fd, b"no message\n")
            case Say("count"):
                counter = ProgressCounter(arguments.progress_fd)
                while True:
                    counter.tick()
            case Shutdown():
                return


if __name__ == "__main__":
    main()
