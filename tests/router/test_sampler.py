"""Logits to tokens: against a brute-force oracle, in any batch, and at the edges of every parameter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import native_argmax, native_library
from router.sampler import FIRST_LOOK, draw, likeliest, sample, uniform
from router.sequence import Sampling, Sequence

VOCAB = 24
CHI_SQUARE_999 = {7: 24.32, 3: 16.27}


def sequence(length: int = 5, **sampling: object) -> Sequence:
    return Sequence("r", [0] * length, length, 10, Sampling(**sampling))  # type: ignore[arg-type]


def token(row: torch.Tensor, length: int = 5, **sampling: object) -> int:
    (drawn,) = sample(row[None], [sequence(length, **sampling)])
    assert drawn is not None
    return drawn.token_id


def oracle(logits: list[float], sampling: Sampling, noise: float) -> tuple[int, float]:
    """The token by plain Python, and how close the noise came to an edge between two tokens."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    highest = logits[order[0]]
    weights = [math.exp((logits[i] - highest) / sampling.temperature) for i in order]
    if sampling.top_k:
        order, weights = order[: sampling.top_k], weights[: sampling.top_k]
    total = math.fsum(weights)
    kept = len(order)
    for n in range(1, len(order) + 1):
        if math.fsum(weights[:n]) >= sampling.top_p * total:
            kept = n
            break
    edges = [math.fsum(weights[: n + 1]) for n in range(kept)]
    target = noise * edges[-1]
    slack = min(abs(edge - target) for edge in edges)
    slack = min(
        [slack, *(abs(math.fsum(weights[:n]) - sampling.top_p * total) for n in range(1, len(order) + 1))]
    )
    return next((order[n] for n, edge in enumerate(edges) if edge > target), order[kept - 1]), slack


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=40),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    noise=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_is_what_sorting_and_adding_by_hand_gives(
    logits: list[float], temperature: float, top_k: int, top_p: float, noise: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    expected, slack = oracle(logits, sampling, noise)
    drawn = draw(np.array(logits, dtype=np.float32), sampling, noise)
    assert drawn == expected or slack < 1e-9


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.5])
def test_a_flat_vocabulary_longer_than_the_first_look_is_drawn_to_its_end(top_p: float) -> None:
    row = np.zeros(FIRST_LOOK * 40, dtype=np.float32)
    for noise in (0.0, 0.01, 0.3, 0.9, 1 - 2**-53):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        expected = min(int(noise * math.ceil(top_p * len(row))), len(row) - 1)
        assert abs(draw(row, sampling, noise) - expected) <= 1


def test_sorting_less_at_first_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = (torch.randn(20, 3000, generator=generator) * 2).numpy()
    cases = [
        (row, Sampling(temperature=1.3, top_p=top_p), uniform(9, position))
        for position, row in enumerate(rows)
        for top_p in (1.0, 0.95)
    ]
    little = [draw(*case) for case in cases]
    monkeypatch.setattr("router.sampler.FIRST_LOOK", 10_000)
    assert [draw(*case) for case in cases] == little


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        ({"temperature": 1.0}, [0.36, 0.2, 0.12, 0.1, 0.08, 0.07, 0.05, 0.02]),
        ({"temperature": 1.0, "top_k": 4}, [0.36, 0.2, 0.12, 0.1]),
        ({"temperature": 1.0, "top_p": 0.75}, [0.36, 0.2, 0.12, 0.1]),
    ],
)
def test_many_draws_follow_the_distribution(sampling: dict[str, float], probabilities: list[float]) -> None:
    row = torch.tensor([0.36, 0.2, 0.12, 0.1, 0.08, 0.07, 0.05, 0.02]).log()
    draws = [token(row, length=position, seed=11, **sampling) for position in range(1, 4001)]
    counts = np.bincount(draws, minlength=8)
    assert not counts[len(probabilities) :].any()
    expected = np.array(probabilities) / sum(probabilities) * len(draws)
    chi_square = float(((counts[: len(expected)] - expected) ** 2 / expected).sum())
    assert chi_square < CHI_SQUARE_999[len(expected) - 1]


def test_noise_depends_on_seed_and_position_and_covers_the_unit_interval() -> None:
    noise = [uniform(seed, position) for seed in range(-5, 45) for position in range(50)]
    assert len(set(noise)) == len(noise)
    assert min(noise) >= 0
    assert max(noise) < 1
    assert abs(float(np.mean(noise)) - 0.5) < 0.02
    assert uniform(7, 100) == uniform(7, 100)
    assert uniform((1 << 64) - 1, 3) == uniform(-1, 3)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_same_seed_and_position_give_the_same_draw_in_any_batch(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    count = data.draw(st.integers(1, 6))
    logits = torch.randn(count, 700, generator=generator) * 3
    sequences = [
        sequence(
            length=data.draw(st.integers(1, 50)),
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
            top_k=data.draw(st.sampled_from([0, 1, 5])),
            top_p=data.draw(st.sampled_from([1.0, 0.9])),
            seed=data.draw(st.integers(-(2**63), 2**63 - 1)),
            logprobs=data.draw(st.sampled_from([None, 0, 3])),
        )
        for _ in range(count)
    ]
    together = sample(logits, sequences)
    alone = [sample(logits[i : i + 1].clone(), [one])[0] for i, one in enumerate(sequences)]
    assert together == alone


def test_greedy_takes_the_first_of_equals_and_so_does_top_k_of_one() -> None:
    row = torch.tensor([0.0, 3.0, 3.0, 1.0])
    assert token(row) == 1
    assert token(row, temperature=2.0, top_k=1, seed=5) == 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1e-300},
        {"temperature": 1.0, "top_p": 1e-12},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1e-9, "top_k": 7},
    ],
)
def test_a_tiny_temperature_or_nucleus_is_greedy(sampling: dict[str, float]) -> None:
    rows = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(1))
    for position, row in enumerate(rows):
        assert token(row, length=position + 1, seed=3, **sampling) == int(row.argmax())


@pytest.mark.parametrize("top_k", [0, 6])
def test_a_token_of_minus_infinity_is_never_drawn(top_k: int) -> None:
    row = torch.full((VOCAB,), -math.inf)
    row[[3, 8, 20]] = torch.tensor([0.0, 1.0, 0.5])
    draws = {token(row, length=position, temperature=50.0, top_k=top_k, seed=2) for position in range(1, 200)}
    assert draws == {3, 8, 20}
    for noise in (0.0, 1 - 2**-53):
        assert draw(row.numpy(), Sampling(temperature=50.0, top_k=top_k), noise) in {3, 8, 20}


def test_logprobs_are_of_the_raw_logits_whatever_is_sampled() -> None:
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(8)) * 4
    expected = torch.log_softmax(row.double(), dim=-1)
    (drawn,) = sample(row[None], [sequence(temperature=3.0, top_k=5, top_p=0.9, seed=1, logprobs=4)])
    assert drawn is not None
    assert drawn.logprob is not None
    assert drawn.logprob == pytest.approx(float(expected[drawn.token_id]), abs=1e-12)
    values, ids = torch.sort(expected, descending=True, stable=True)
    assert [top_id for top_id, _ in drawn.top] == ids[:4].tolist()
    assert [logprob for _, logprob in drawn.top] == pytest.approx(values[:4].tolist(), abs=1e-12)


def test_logprobs_of_zero_report_the_chosen_token_alone_and_none_reports_nothing() -> None:
    row = torch.arange(4.0)
    first, second = sample(row.repeat(2, 1), [sequence(logprobs=0), sequence()])
    assert first is not None
    assert first.logprob is not None
    assert first.top == ()
    assert second is not None
    assert second.logprob is None


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (drawn,) = sample(torch.arange(4.0)[None], [sequence(logprobs=20)])
    assert drawn is not None
    assert [top_id for top_id, _ in drawn.top] == [3, 2, 1, 0]


def test_rows_without_a_finite_maximum_give_nothing_and_leave_the_others_alone() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 5] = math.nan
    logits[1] = -math.inf
    logits[2, 3] = math.inf
    logits[3, 9] = 1.0
    drawn = sample(logits, [sequence(temperature=0.0 if i % 2 else 1.0) for i in range(3)] + [sequence()])
    assert drawn[:3] == [None, None, None]
    assert drawn[3] is not None
    assert drawn[3].token_id == 9


def mixed() -> tuple[torch.Tensor, list[Sequence]]:
    """Rows in bfloat16, some without an answer, and sequences that ask for what there is to ask for."""
    logits = (torch.randn(60, 9001, generator=torch.Generator().manual_seed(5)) * 3).bfloat16()
    logits[3::5, 100:200] = 20.0
    logits[::8, 3], logits[1::11, 8500], logits[2::13] = math.nan, math.inf, -math.inf
    askings: tuple[dict[str, object], ...] = (
        {},
        {"logprobs": 0},
        {"logprobs": 5},
        {"temperature": 1.2, "logprobs": 3},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
    )
    return logits, [sequence(length=5 + i, seed=i, **askings[i % len(askings)]) for i in range(len(logits))]


@pytest.mark.parametrize("is_native", [True, False], ids=["native", "torch"])
def test_bfloat16_logits_give_the_draws_of_the_same_logits_in_float32(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, sequences = mixed()
    if not is_native:
        monkeypatch.setattr(native_argmax, "installed", lambda: None)
    elif native_argmax.installed() is None:
        pytest.skip(str(native_library.why_unavailable()))
    drawn = sample(logits, sequences)
    assert drawn == sample(logits.float(), sequences)
    assert [draw is None for draw in drawn] == [not bool(row.max().isfinite()) for row in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernel_changes_no_draw(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_argmax.installed() is None:
        pytest.skip(str(native_library.why_unavailable()))
    logits, sequences = mixed()
    drawn = sample(logits.to(dtype), sequences)
    monkeypatch.setattr(native_argmax, "installed", lambda: None)
    assert sample(logits.to(dtype), sequences) == drawn


def test_the_likeliest_are_sorted_by_logit_then_id() -> None:
    row = np.array([1, 2, 2, 0, 2, 1], dtype=np.float32)
    assert [likeliest(row, count).tolist() for count in (0, 2, 4, 9)] == [
        [],
        [1, 2],
        [1, 2, 4, 0],
        [1, 2, 4, 0, 5, 3],
    ]


def test_noise_on_the_edge_between_two_tokens_draws_the_later_one() -> None:
    row = np.zeros(4, dtype=np.float32)
    sampling = Sampling(temperature=1.0)
    assert [draw(row, sampling, noise) for noise in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]
