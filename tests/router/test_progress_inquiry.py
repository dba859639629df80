"""Questions asked in the middle of a step and answered by another thread."""

from __future__ import annotations

import threading
import time
from typing import Any

from router.messages import AskProgress, Progress
from router.progress_inquiry import ProgressInquiry


def test_each_question_gets_its_own_answer_whatever_their_order() -> None:
    asked: list[Any] = []
    inquiry = ProgressInquiry(asked.append, timeout_s=10)
    answers: dict[int, int | None] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: answers.__setitem__(rank, inquiry.ask(rank)))
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(asked) < len(threads) and time.monotonic() < deadline:
        time.sleep(0.001)
    for question in reversed(asked):
        assert isinstance(question, AskProgress)
        inquiry.answer(Progress(question.ask_id, None if question.ep_rank == 3 else 100 + question.ep_rank))
    for thread in threads:
        thread.join(10)
    assert answers == {0: 100, 1: 101, 2: 102, 3: None}


def test_silence_is_no_answer_and_a_late_answer_is_dropped() -> None:
    asked: list[Any] = []
    inquiry = ProgressInquiry(asked.append, timeout_s=0.05)
    start = time.monotonic()
    assert inquiry.ask(0) is None
    assert 0.05 <= time.monotonic() - start < 2
    inquiry.answer(Progress(asked[0].ask_id, 5))
    inquiry.answer(Progress(999, 5))
    assert inquiry.ask(0) is None
