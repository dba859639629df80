"""The native kernels for bfloat16: right beside float64, and the same bits for a row in every company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import expert_worker.kernels.cpu
import router.kernels.cpu
from common import cpu_linear, native_bf16, native_floats, native_library, rows
from common.errors import ConfigError
from common.native_bf16 import NativeBf16
from expert_worker.experts import LayerExperts
from tests.kernels.comparing import ROW_COUNTS, THREAD_COUNTS, num_threads, randn, some_rows

BFLOAT16 = torch.bfloat16
Linear = Callable[[Tensor, Tensor], Tensor]
needs_kernel = pytest.mark.skipif(
    native_bf16.why_unavailable() is not None, reason=str(native_bf16.why_unavailable())
)

# (N, K): a panel and a register, less, more, odd ends of either kind, several tasks.
SHAPES = [(16, 32), (1, 1), (3, 5), (17, 33), (8, 64), (40, 18), (33, 100), (530, 130)]
LARGE_SHAPES = [(2816, 2048), (2048, 1408), (576, 2048), (4096, 512)]
SEVERAL_ROW_COUNTS = (1, 2, 3, 5, 8, 10, 11, 13, 16, 17, 32, 63, 64, 65, 127, 129, 513)
# (D, F): odd, small, and V2-Lite's.
EXPERT_SHAPES = [(24, 7), (64, 32), (100, 40), (2048, 1408)]


@pytest.fixture
def kernel() -> NativeBf16:
    if native_bf16.why_unavailable() is not None:
        pytest.skip(str(native_bf16.why_unavailable()))
    return native_bf16.load()


@pytest.fixture(params=["AVX-512 BF16", "float32"])
def linear(request: pytest.FixtureRequest) -> Linear:
    """The product of each kernel that multiplies bfloat16 somewhere."""
    if request.param == "AVX-512 BF16":
        linear: Linear = request.getfixturevalue("kernel").linear
        return linear
    if native_library.why_unavailable() is not None:
        pytest.skip(str(native_library.why_unavailable()))
    return native_floats.load().linear


def some_weight(seed: int, num_out: int, num_in: int) -> Tensor:
    return (randn(seed, num_out, num_in) * num_in**-0.5).to(BFLOAT16)


def assert_rounded_once(output: Tensor, x: Tensor, weight: Tensor) -> None:
    """Compare with float64: half a unit of bfloat16's eight bits, and float32's error of K additions."""
    assert output.dtype == BFLOAT16
    exact = x.double() @ weight.double().T
    additions = x.shape[1] * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((output.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2 * additions).all()


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE_SHAPES], ids=str)
def test_a_product_is_that_of_float64_rounded_once(linear: Linear, shape: tuple[int, int]) -> None:
    weight, x = some_weight(1, *shape), randn(2, 77, shape[1], dtype=BFLOAT16)
    for count in (1, 7, 16, 77):
        assert_rounded_once(linear(x[:count], weight), x[:count], weight)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [*((shape, ROW_COUNTS) for shape in SHAPES), *((shape, SEVERAL_ROW_COUNTS) for shape in LARGE_SHAPES)],
    ids=str,
)
def test_a_row_gets_the_same_bits_in_every_batch_and_with_any_number_of_threads(
    linear: Linear, shape: tuple[int, int], counts: tuple[int, ...]
) -> None:
    weight, x = some_weight(1, *shape), randn(2, 600, shape[1], dtype=BFLOAT16)
    with num_threads(1):
        expected = linear(x, weight)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in counts:
                chosen = some_rows(count * 10 + threads, count, len(x))
                assert torch.equal(linear(x[chosen], weight), expected[chosen]), (count, threads)


def test_more_rows_than_are_computed_at_once_get_the_bits_of_a_few(linear: Linear) -> None:
    weight, x = some_weight(1, 40, 96), randn(2, 4500, 96, dtype=BFLOAT16)
    expected = torch.cat([linear(some, weight) for some in x.split(7)])
    assert torch.equal(linear(x, weight), expected)


def test_halves_are_rounded_to_even(linear: Linear) -> None:
    x = torch.tensor([[1, 2.0**-8], [1 + 2.0**-7, 2.0**-8], [-1, -(2.0**-8)], [1, 2.0**-8 + 2.0**-15]])
    output = linear(x.to(BFLOAT16), torch.ones(1, 2, dtype=BFLOAT16))
    assert output.flatten().tolist() == [1, 1 + 2.0**-6, -1, 1 + 2.0**-7]


def test_a_sum_is_kept_in_float32_until_it_is_whole(linear: Linear) -> None:
    x = torch.tensor([[256.0, 1.0, -256.0]], dtype=BFLOAT16).repeat_interleave(64, dim=1)
    assert linear(x, torch.ones(1, 192, dtype=BFLOAT16)).item() == 64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beside_a_weight_or_the_rows_is_used(linear: Linear, shape: tuple[int, int]) -> None:
    num_out, num_in = shape
    memory = torch.full((num_out * num_in + 200,), torch.nan, dtype=BFLOAT16)
    weight = memory[99 : 99 + num_out * num_in].view(num_out, num_in)
    weight.copy_(some_weight(1, num_out, num_in))
    wide = torch.full((90, num_in + 20), torch.nan, dtype=BFLOAT16)
    x = wide[::2, 7 : 7 + num_in]  # neither rows nor their elements begin at any particular address
    x.copy_(randn(2, 45, num_in))
    for count in (1, 9, 12, 45):
        assert_rounded_once(linear(x[:count], weight), x[:count], weight)


@pytest.mark.parametrize("count", [1, 10, 13, 70])
def test_a_row_that_is_not_finite_stays_alone(linear: Linear, count: int) -> None:
    weight, x = some_weight(1, 40, 50), randn(2, count, 50, dtype=BFLOAT16)
    expected = linear(x, weight)
    x[count // 2, 3], x[0, 49] = torch.nan, torch.inf
    output = linear(x, weight)
    others = [row for row in range(count) if row not in (0, count // 2)]
    assert torch.equal(output[others], expected[others])
    assert output[count // 2].isnan().all()
    assert not output[0].isfinite().any()


def test_no_rows_give_no_rows(linear: Linear) -> None:
    assert linear(torch.empty(0, 50, dtype=BFLOAT16), some_weight(1, 40, 50)).shape == (0, 40)


class Layer:
    """The weights of some experts."""

    def __init__(self, num_experts: int, hidden_size: int, size: int) -> None:
        self.gate_up = [some_weight(10 + e, 2 * size, hidden_size) for e in range(num_experts)]
        self.down = [some_weight(50 + e, hidden_size, size) for e in range(num_experts)]

    def one_by_one(self, kernel: NativeBf16, x: Tensor, counts: list[int]) -> Tensor:
        """Multiply, activate and multiply the rows of each expert by other calls."""
        outputs = []
        for rows_of_one, gate_up, down in zip(x.split(counts), self.gate_up, self.down, strict=True):
            gate, up = kernel.linear(rows_of_one, gate_up).chunk(2, dim=-1)
            outputs.append(kernel.linear(native_floats.load().swiglu(gate, up), down))
        return torch.cat(outputs)


@pytest.mark.parametrize("shape", EXPERT_SHAPES, ids=str)
def test_experts_in_one_call_have_the_bits_of_one_product_after_another(
    kernel: NativeBf16, shape: tuple[int, int]
) -> None:
    layer = Layer(5, *shape)
    for counts in ([0, 1, 2, 11, 90], [70, 0, 3, 64, 13], [1, 1, 1, 1, 1], [0, 0, 600, 0, 1], [0] * 5):
        x = randn(4, sum(counts), shape[0], dtype=BFLOAT16)
        expected = layer.one_by_one(kernel, x, counts)
        for threads in THREAD_COUNTS:
            with num_threads(threads):
                output = kernel.experts(x, torch.tensor(counts), layer.gate_up, layer.down)
                assert torch.equal(output, expected), (counts, threads)


def test_more_rows_of_experts_than_are_computed_at_once_get_the_same_bits(kernel: NativeBf16) -> None:
    layer, counts = Layer(5, 40, 24), [1500, 700, 0, 5, 2100]
    x = randn(4, sum(counts), 40, dtype=BFLOAT16)
    output = kernel.experts(x, torch.tensor(counts), layer.gate_up, layer.down)
    assert torch.equal(output, layer.one_by_one(kernel, x, counts))


def test_rows_of_experts_may_be_a_view(kernel: NativeBf16) -> None:
    layer, wide = Layer(2, 40, 24), randn(4, 20, 60, dtype=BFLOAT16)
    output = kernel.experts(wide[::2, 5:45], torch.tensor([4, 6]), layer.gate_up, layer.down)
    assert torch.equal(output, layer.one_by_one(kernel, wide[::2, 5:45].contiguous(), [4, 6]))


@needs_kernel
def test_a_layer_gives_the_same_bits_grouped_or_not_and_reports_progress_either_way() -> None:
    cpu = expert_worker.kernels.cpu
    gate, up, down = (list(randn(seed, 4, 32, 32, dtype=BFLOAT16)) for seed in (1, 2, 3))
    layer = LayerExperts(range(4), cpu.pack(gate, up, down), cpu)
    assert layer.is_fused
    x, counts = randn(4, 30, 32, dtype=BFLOAT16), torch.tensor([9, 0, 20, 1])
    outputs = []
    for is_grouped in (False, True):
        calls: list[None] = []
        report: Callable[[], None] = lambda calls=calls: calls.append(None)  # type: ignore[misc]  # noqa: E731
        outputs.append(layer.forward(x, counts, report, is_grouped=is_grouped))
        assert len(calls) == (1 if is_grouped else 3)
    assert torch.equal(*outputs)


def test_bfloat16_is_multiplied_by_the_kernel_of_this_processor_and_float32_by_torch() -> None:
    weight, x, bias = some_weight(1, 48, 64), randn(2, 5, 64, dtype=BFLOAT16), randn(3, 48, dtype=BFLOAT16)
    own = native_bf16.installed() or native_floats.installed() or rows
    assert torch.equal(cpu_linear.linear(x, weight), own.linear(x, weight))
    assert torch.equal(cpu_linear.linear(x, weight, bias), own.linear(x, weight) + bias)
    assert torch.equal(cpu_linear.linear(x.float(), weight.float()), rows.linear(x.float(), weight.float()))


@pytest.mark.parametrize("is_built", [True, False])
def test_without_the_instructions_floats_are_multiplied_and_without_a_library_torch_does_it(
    is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_bf16, "installed", lambda: None)
    if not is_built:
        monkeypatch.setattr(native_floats, "installed", lambda: None)
    own = native_floats.installed() or rows
    weight, x = some_weight(1, 48, 64), randn(2, 5, 64, dtype=BFLOAT16)
    assert torch.equal(router.kernels.cpu.linear(x, weight, None), own.linear(x, weight))
    cpu = expert_worker.kernels.cpu
    packed = cpu.pack(*([some_weight(seed, 16, 16)] for seed in (1, 2, 3)))
    assert not cpu.is_fused(packed)
    gate, up = own.linear(x[:, :16], packed.gate_up[0]).chunk(2, dim=-1)
    expected = own.linear(rows.swiglu(gate, up), packed.down[0])
    assert torch.equal(cpu.experts(x[:, :16], None, torch.tensor([5]), packed), expected)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(2, 32), torch.ones(16, 32, dtype=BFLOAT16)),
        (torch.ones(2, 32, dtype=BFLOAT16), torch.ones(16, 32)),
        (torch.ones(2, 31, dtype=BFLOAT16), torch.ones(16, 32, dtype=BFLOAT16)),
        (torch.ones(32, dtype=BFLOAT16), torch.ones(16, 32, dtype=BFLOAT16)),
        (torch.ones(2, 32, dtype=BFLOAT16), torch.ones(32, 16, dtype=BFLOAT16).T),
        (torch.ones(2, 0, dtype=BFLOAT16), torch.ones(16, 0, dtype=BFLOAT16)),
    ],
    ids=["float32 rows", "float32 weight", "other K", "one row", "transposed weight", "no columns"],
)
def test_rows_and_weights_that_do_not_belong_together_are_refused(
    kernel: NativeBf16, x: Tensor, weight: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"cannot be multiplied by a weight .*: give bfloat16 \[M, K\]"):
        kernel.linear(x, weight)


def test_rows_of_another_length_than_the_weight_has_are_refused(linear: Linear) -> None:
    with pytest.raises(ValueError, match=r"rows \[2, 31\].* cannot be multiplied by a weight \[16, 32\]"):
        linear(torch.ones(2, 31, dtype=BFLOAT16), torch.ones(16, 32, dtype=BFLOAT16))


def test_experts_that_do_not_belong_together_are_refused(kernel: NativeBf16) -> None:
    layer, other, x = Layer(2, 40, 24), Layer(1, 40, 16), randn(4, 5, 40, dtype=BFLOAT16)
    for counts in ([2, 2], [5], [6, -1]):
        with pytest.raises(ValueError, match="must count 5 rows of 2 experts with 2 down projections"):
            kernel.experts(x, torch.tensor(counts), layer.gate_up, layer.down)
    for gate_up, down in ((other.gate_up[0], layer.down[1]), (layer.gate_up[1], other.down[0])):
        with pytest.raises(ValueError, match=r"all experts of a call are \[2F, D\] and \[D, F\]"):
            kernel.experts(x, torch.tensor([2, 3]), [layer.gate_up[0], gate_up], [layer.down[0], down])
    for down in (layer.down[1].float(), layer.down[1].T.contiguous().T):
        with pytest.raises(ValueError, match="give a contiguous one of bfloat16"):
            kernel.experts(x, torch.tensor([2, 3]), layer.gate_up, [layer.down[0], down])
    with pytest.raises(ValueError, match="cannot be multiplied by a weight"):
        kernel.experts(x.float(), torch.tensor([2, 3]), layer.gate_up, layer.down)


def test_a_library_that_is_missing_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"were not built \(kernels.so is missing\): install expertmesh"):
        native_bf16.load(tmp_path / "kernels.so")
