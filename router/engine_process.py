"""The router's child process (`python -m router.engine_process --channel-fd N`): loads, then runs the steps.

The main thread computes, and waits without a deadline when there is nothing to do; one thread reads the
channel, and one per epoch joins links.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from common.channel import ChildChannel, Fatal, Shutdown
from common.errors import CheckpointError, ConfigError, ControlError
from common.lifeline import obey_parent_only
from common.logs import configure_logging
from router.connector import Connector
from router.engine import Engine, Membership
from router.engine_loading import LoadedEngine, load
from router.messages import (
    TO_ENGINE,
    Abort,
    AskLoads,
    CommitTune,
    Configure,
    Connect,
    Disconnect,
    Linked,
    LinkFailed,
    Progress,
    Submit,
    TakeUp,
    Tune,
)
from router.progress_inquiry import ProgressInquiry

logger = logging.getLogger(__name__)

END_GRACE_S = 2.0
"""How long a step or a load may still take when the parent is gone."""

BAD_INPUT_STATUS = 2


class EngineProcess:
    """The engine at one end of a channel. What arrives waits in the inbox for the gap between two steps."""

    def __init__(self, channel: ChildChannel) -> None:
        self._channel = channel
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._inquiry = ProgressInquiry(channel.send)

    def run(self) -> int:
        """Serve until Shutdown or the end of the channel; the exit status."""
        threading.Thread(target=self._read, name="channel", daemon=True).start()
        try:
            return self._load_and_serve()
        except (BrokenPipeError, ConnectionResetError):
            return 1  # nobody is left to tell

    def _load_and_serve(self) -> int:
        first = self._inbox.get()
        if isinstance(first, Shutdown):
            return 0
        try:
            if not isinstance(first, Configure):
                raise ControlError(f"the first message is {type(first).__name__}, but it must be Configure")
            loaded = load(first, self._channel.send, self._inquiry.ask, self._inbox.put)
        except (ConfigError, CheckpointError) as error:
            logger.error("the engine cannot start: %s", error)
            return self._end(error, BAD_INPUT_STATUS)
        except Exception as error:
            return self._fail(error)
        try:
            self._serve(loaded)
            return 0
        except Exception as error:
            return self._fail(error)
        finally:
            loaded.engine.close()
            if loaded.timeline is not None and first.trace_file is not None:
                loaded.timeline.write(Path(first.trace_file))

    def _serve(self, loaded: LoadedEngine) -> None:
        engine = loaded.engine
        while True:
            while not engine.has_work or not self._inbox.empty():
                if self._inbox.empty():
                    engine.report()
                message = self._inbox.get()
                if isinstance(message, Shutdown):
                    return
                self._take(message, loaded)
            engine.step()

    def _take(self, message: object, loaded: LoadedEngine) -> None:
        engine, connector = loaded.engine, loaded.connector
        match message:
            case Submit():
                engine.submit(message)
            case Tune():
                engine.tune(message)
            case CommitTune():
                engine.commit(message.tune_id, message.epoch)
            case TakeUp():
                engine.take_up(message.epoch)
            case AskLoads():
                engine.report_loads(message)
            case Abort():
                engine.abort(message.request_id)
            case Disconnect():
                if connector is not None:
                    connector.give_up(message.epoch)
                engine.disconnect(message.epoch, message.reason)
            case Exception():
                raise message
            case _:
                self._take_epoch(message, engine, connector)

    def _take_epoch(self, message: object, engine: Engine, connector: Connector | None) -> None:
        """Join an epoch, or take up one that is joined."""
        match message:
            case Connect() if connector is not None:
                connector.connect(message)
            case Connect():
                self._channel.send(LinkFailed(message.epoch, -1, "the experts are in the router's process"))
            case Membership() if connector is not None and connector.wants(message.epoch):
                if message.waits_for_commit:
                    engine.hold(message)
                else:
                    engine.adopt(message)
                self._channel.send(Linked(message.epoch, list(message.transports)))
            case Membership():
                message.exchange.close()
                self._channel.send(LinkFailed(message.epoch, -1, "the epoch was given up meanwhile"))
            case LinkFailed():
                self._channel.send(message)
            case _:
                raise ControlError(f"{type(message).__name__} is not expected here")

    def _read(self) -> None:
        """Hand on what the parent says. Answers to questions go straight to the step that asked."""
        try:
            for message in self._channel:
                if isinstance(message, Progress):
                    self._inquiry.answer(message)
                else:
                    self._inbox.put(message)
        except (OSError, ControlError) as error:
            self._inbox.put(error)
        else:
            self._inbox.put(Shutdown())
        # Without a parent nobody needs the step or the load that may keep the main thread busy.
        time.sleep(END_GRACE_S)
        os._exit(1)

    def _fail(self, error: Exception) -> int:
        if isinstance(error, BrokenPipeError | ConnectionResetError):
            return 1
        logger.error("the engine failed", exc_info=error)
        return self._end(error, 1)

    def _end(self, error: Exception, status: int) -> int:
        self._channel.send(Fatal(type(error).__name__, str(error)))
        return status


def main() -> None:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m router.engine_process", description=__doc__)
    parser.add_argument("--channel-fd", type=int, required=True, help="the inherited socket")
    arguments = parser.parse_args()
    obey_parent_only()
    configure_logging("info", "engine")
    with torch.inference_mode():
        status = EngineProcess(ChildChannel(arguments.channel_fd, TO_ENGINE)).run()
    logging.shutdown()
    sys.stderr.flush()
    # Threads that wait on links, and links that wait for peers, must not hold up the end of the process.
    os._exit(status)


if __name__ == "__main__":
    main()
