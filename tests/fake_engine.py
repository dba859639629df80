"""An engine without a model: `python -m tests.fake_engine --channel-fd N` speaks router.messages and counts.

Token i of an answer is (prompt[0] + i) % 100 + 10. A prompt that begins with 1 is answered slowly, 2 ends
the process after three tokens, unless another has given them, and 6 at once, 3 loses ep_rank 0 once and 5
in every epoch before its second token, 4 is never answered. Without an epoch nothing is answered, unless it
needs none. Tune is agreed to, unless micro_batches is one of the numbers below; what is committed with it
must be the epoch it was told to hold. The number of steps it reports tells what is in force: 100 * ep_level
+ micro_batches.
"""

from __future__ import annotations

import argparse
import os
import queue
import threading
import time

from common.channel import ChildChannel, Shutdown
from router.messages import (
    TO_ENGINE,
    Abort,
    CommitTune,
    Configure,
    Connect,
    Disconnect,
    Linked,
    Loaded,
    Loading,
    Lost,
    Stats,
    Submit,
    TakeUp,
    Tokens,
    Tune,
    Tuned,
    TuneRefused,
)

SLOW, DIES, LOSES, SILENT, LOSES_ALWAYS, DIES_ALWAYS = 1, 2, 3, 4, 5, 6
AGREES_AND_DIES, DIES_WHEN_ASKED, NEVER_AGREES, REFUSES = 5, 6, 7, 8
"""Values of micro_batches."""
INT8_LAYERS = [1]
"""What it says of its checkpoint."""


def token_at(prompt: list[int], index: int) -> int:
    return (prompt[0] + index) % 100 + 10


class FakeEngine:
    def __init__(self, channel: ChildChannel) -> None:
        self.channel = channel
        self.inbox: queue.Queue[object] = queue.Queue()
        self.running: dict[str, tuple[Submit, int]] = {}
        self.epoch = 0
        self.held = 0
        self.needs_epoch = True
        self.lost: set[str] = set()
        self.num_replayed = 0
        self.tuning = 0
        self.proposed: Tune | None = None

    def serve(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        while True:
            try:
                is_busy = self.running and (self.epoch or not self.needs_epoch)
                message = self.inbox.get(timeout=0.005 if is_busy else None)
            except queue.Empty:
                message = None
            if message is None:
                self.step()
            elif isinstance(message, Shutdown | str):
                return
            else:
                self.take(message)

    def read(self) -> None:
        for message in self.channel:
            self.inbox.put(message)
        self.inbox.put("the parent is gone")

    def take(self, message: object) -> None:
        send = self.channel.send
        match message:
            case Configure():
                self.needs_epoch = not message.experts_in_process
                send(Loading(1, 2))
                max_seq_len = message.max_seq_len or 64
                send(Loaded(2, 8, message.block_size, max_seq_len, "127.0.0.1", 1, INT8_LAYERS))
                self.put_in_force(Tune(**message.tune))
            case Connect():
                self.connect(message)
            case Disconnect():
                self.disconnect(message)
            case Submit():
                if message.prompt[0] == DIES_ALWAYS:
                    os._exit(3)
                self.running[message.request_id] = (message, len(message.generated))
            case Abort():
                self.running.pop(message.request_id, None)
                self.report()
            case Tune():
                self.consider(message)
            case TakeUp():
                self.take_up(message.epoch)
            case _:
                self.commit(message)

    def connect(self, message: Connect) -> None:
        if message.waits_for_commit:
            self.held = message.epoch
        else:
            self.epoch = message.epoch
        self.channel.send(Linked(message.epoch, []))
        if not self.running:
            self.report()

    def disconnect(self, message: Disconnect) -> None:
        if message.epoch == self.held:
            self.held = 0
        elif message.epoch == self.epoch:
            self.lose(-1, message.reason)

    def commit(self, message: object) -> None:
        if not isinstance(message, CommitTune) or self.proposed is None:
            os._exit(4)
        if self.proposed.tune_id != message.tune_id or message.epoch != self.held:
            os._exit(4)
        self.take_up(message.epoch or self.epoch)
        self.put_in_force(self.proposed)

    def take_up(self, epoch: int) -> None:
        if epoch not in (self.held, self.epoch):
            os._exit(4)
        self.epoch, self.held = epoch, 0
        self.report()

    def consider(self, message: Tune) -> None:
        self.proposed = message
        match message.micro_batches:
            case n if n == DIES_WHEN_ASKED:
                os._exit(3)
            case n if n == REFUSES:
                self.channel.send(TuneRefused(message.tune_id, "8 parts are too many"))
            case n if n != NEVER_AGREES:
                self.channel.send(Tuned(message.tune_id))
                if n == AGREES_AND_DIES:
                    os._exit(3)

    def put_in_force(self, message: Tune) -> None:
        self.tuning = 100 * message.ep_level + message.micro_batches
        self.report()

    def report(self) -> None:
        self.channel.send(
            Stats(len(self.running), 0, 0, self.tuning, self.epoch, replayed_steps=self.num_replayed)
        )

    def lose(self, ep_rank: int, reason: str) -> None:
        epoch, self.epoch = self.epoch, 0
        self.channel.send(Lost(epoch, ep_rank, reason))

    def loses(self) -> bool:
        """Whether a worker is lost in this step."""
        for name, (submit, index) in self.running.items():
            is_first = index == 1 and name not in self.lost
            if (index == 1 and submit.prompt[0] == LOSES_ALWAYS) or (is_first and submit.prompt[0] == LOSES):
                self.lost.add(name)
                return True
        return False

    def step(self) -> None:
        if self.loses():
            self.lose(0, "expert worker a (ep_rank 0) was lost at layer 1 in phase combine")
            return
        events: list[dict[str, object]] = []
        for name, (submit, index) in list(self.running.items()):
            if submit.prompt[0] == SILENT:
                continue
            if submit.prompt[0] == SLOW:
                time.sleep(0.05)
            if submit.prompt[0] == DIES and index == 3 and not submit.generated:
                os._exit(3)
            token = token_at(submit.prompt, index)
            end = "stop" if token in submit.stop_token_ids else None
            end = end or ("length" if index + 1 >= submit.max_tokens else None)
            event: dict[str, object] = {"id": name, "token": token, "fin": end}
            if submit.logprobs is not None:
                event |= {"logprob": -0.5, "top": [[token, -0.5], [0, -1.5]][: submit.logprobs]}
            events.append(event)
            if end:
                del self.running[name]
            else:
                self.running[name] = (submit, index + 1)
        if events:
            self.num_replayed += bool(self.lost)
            self.lost.clear()
            self.channel.send(Tokens(events))
            self.report()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channel-fd", type=int, required=True)
    FakeEngine(ChildChannel(parser.parse_args().channel_fd, TO_ENGINE)).serve()


if __name__ == "__main__":
    main()
