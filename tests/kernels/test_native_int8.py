"""The native int8 kernel is exact on every path, and gives a row the same bits in every company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import native_int8, native_library
from common.errors import ConfigError
from common.int8_reference import PackedInt8
from common.native.compiler import COMPILERS, compile_library
from common.native_int8 import NativeInt8, PackedWeight
from common.native_library import PATHS
from tests.kernels import int8_oracle as oracle
from tests.kernels.comparing import ROW_COUNTS, THREAD_COUNTS, num_threads, randn, some_rows
from tests.kernels.int8_oracle import Weight, some_int8_rows, some_weight

needs_library = pytest.mark.skipif(
    native_library.why_unavailable() is not None, reason=str(native_library.why_unavailable())
)

# (N, K): a block, less, more, odd ends of either kind, several tasks.
SHAPES = [(16, 16), (1, 1), (3, 5), (17, 33), (15, 64), (40, 18), (33, 100), (530, 130)]
LARGE_SHAPES = [(2816, 2048), (2048, 1408)]
SEVERAL_ROW_COUNTS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 127, 128, 129, 257, 513)


@pytest.fixture(params=PATHS)
def kernel(request: pytest.FixtureRequest) -> NativeInt8:
    """The library on one of its paths."""
    if native_library.why_unavailable() is not None:
        pytest.skip(str(native_library.why_unavailable()))
    if request.param not in native_library.available_paths():
        pytest.skip(f"this processor has no {request.param}")
    return native_int8.load(path=request.param)


def pack(kernel: NativeInt8, weight: Weight) -> PackedWeight:
    return kernel.pack_int8(weight.codes, weight.scale, weight.bias)


def assert_linear_is_exact(kernel: NativeInt8, rows: Tensor, row_scales: Tensor, weight: Weight) -> None:
    output = kernel.int8_linear(rows, row_scales, pack(kernel, weight))
    assert output.dtype == torch.float32
    assert torch.equal(output, oracle.linear(rows, row_scales, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_exact_for_any_number_of_rows_and_threads(
    kernel: NativeInt8, shape: tuple[int, int]
) -> None:
    weight = some_weight(1, *shape)
    packed = pack(kernel, weight)
    rows, row_scales = some_int8_rows(2, 600, shape[1])
    expected = oracle.linear(rows, row_scales, weight)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in ROW_COUNTS:
                chosen = some_rows(count * 10 + threads, count, len(rows))
                output = kernel.int8_linear(rows[chosen], row_scales[chosen], packed)
                assert torch.equal(output, expected[chosen]), f"{count} rows, {threads} threads"


@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_linear_is_exact_at_real_sizes(kernel: NativeInt8, shape: tuple[int, int]) -> None:
    weight = some_weight(1, *shape)
    packed = pack(kernel, weight)
    rows, row_scales = some_int8_rows(2, 300, shape[1])
    expected = oracle.linear(rows, row_scales, weight)
    for threads, counts in ((1, (1, 17)), (2, (1, 2, 3, 4, 5, 8, 12, 16, 33, 300)), (3, (7, 65))):
        with num_threads(threads):
            for count in counts:
                chosen = some_rows(count, count, len(rows))
                output = kernel.int8_linear(rows[chosen], row_scales[chosen], packed)
                assert torch.equal(output, expected[chosen]), f"{count} rows, {threads} threads"


@pytest.mark.parametrize("weight_code", [-128, -127, -1, 0, 127])
@pytest.mark.parametrize("row_code", [-128, -127, 0, 127])
def test_linear_does_not_saturate_where_every_product_is_extreme(
    kernel: NativeInt8, row_code: int, weight_code: int
) -> None:
    weight = Weight(torch.full((20, 4100), weight_code, dtype=torch.int8), torch.ones(20))
    for count in (1, 2, 5, 17):
        rows = torch.full((count, 4100), row_code, dtype=torch.int8)
        assert_linear_is_exact(kernel, rows, torch.ones(count), weight)


def test_linear_is_exact_where_extreme_products_alternate_in_sign(kernel: NativeInt8) -> None:
    signs = torch.tensor([1, 1, -1, -1, 1, -1, 1, 1]).repeat(512)
    weight = Weight((127 * signs).to(torch.int8).repeat(20, 1), torch.ones(20))
    rows = torch.stack([127 * signs.roll(shift) for shift in range(8)]).to(torch.int8)
    assert_linear_is_exact(kernel, rows, torch.ones(8), weight)


def test_linear_is_exact_at_the_largest_number_of_in_features(kernel: NativeInt8) -> None:
    num_in = native_int8.MAX_IN_FEATURES
    weight = Weight(torch.full((2, num_in), 127, dtype=torch.int8), torch.ones(2))
    weight.codes[1] = -127
    rows = torch.full((3, num_in), 127, dtype=torch.int8)
    rows[1] = -127
    assert_linear_is_exact(kernel, rows, torch.ones(3), weight)


def test_a_bias_joins_the_integer_sums(kernel: NativeInt8) -> None:
    plain = some_weight(1, 37, 50)
    bias = torch.arange(37, dtype=torch.int32) * 1_000_003 - 20_000_000
    for count in (1, 6, 20):
        assert_linear_is_exact(kernel, *some_int8_rows(2, count, 50), Weight(plain.codes, plain.scale, bias))


def test_linear_takes_rows_and_weights_that_are_views(kernel: NativeInt8) -> None:
    wide = some_weight(1, 40, 60)
    weight = Weight(wide.codes[::2, 10:40], wide.scale[::2])
    rows, row_scales = some_int8_rows(2, 22, 60)
    assert_linear_is_exact(kernel, rows[1::2, 30:], row_scales[1::2], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_quantizing_linear_has_the_bits_of_quantising_multiplying_and_rounding(
    kernel: NativeInt8, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = some_weight(1, *shape)
    packed = pack(kernel, weight)
    x = randn(2, 600, shape[1], dtype=dtype)
    x[3] = 0
    expected = kernel.int8_linear(*kernel.quantize_rows(x), packed).to(dtype)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in SEVERAL_ROW_COUNTS:
                chosen = some_rows(count * 10 + threads, count, len(x))
                output = kernel.quantizing_linear(x[chosen], packed)
                assert output.dtype == dtype
                assert torch.equal(output, expected[chosen]), f"{count} rows, {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_mlp_has_the_bits_of_a_single_expert(kernel: NativeInt8, dtype: torch.dtype) -> None:
    layer = Layer(kernel, 1, 40, 24, 1.0)
    (gate_up,), (down,) = layer.packed
    x = randn(2, 600, 40, dtype=dtype)
    rows = kernel.quantize_rows(x)
    expected = layer.forward(*rows, [600]).to(dtype)
    assert torch.equal(kernel.int8_experts(*rows, torch.tensor([600]), layer.joined, dtype), expected)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in SEVERAL_ROW_COUNTS:
                chosen = some_rows(count * 10 + threads, count, len(x))
                assert torch.equal(kernel.mlp(x[chosen], gate_up, down), expected[chosen]), (count, threads)


def test_no_rows_give_no_rows(kernel: NativeInt8) -> None:
    packed, down = pack(kernel, some_weight(1, 24, 16)), pack(kernel, some_weight(1, 16, 12))
    none = torch.empty(0, 16, dtype=torch.int8)
    assert kernel.int8_linear(none, torch.empty(0), packed).shape == (0, 24)
    joined = kernel.join_experts([packed] * 2, [down] * 2)
    no_counts = torch.zeros(2, dtype=torch.int64)
    assert kernel.int8_experts(none, torch.empty(0), no_counts, joined).shape == (0, 16)
    rows, scales = kernel.quantize_rows(torch.empty(0, 16))
    assert (rows.shape, scales.shape) == ((0, 16), (0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 5, 16, 33, 1408])
def test_rows_are_quantised_one_by_one_with_halves_to_even(
    kernel: NativeInt8, size: int, dtype: torch.dtype
) -> None:
    x = randn(1, 600, size) * torch.logspace(-44, 37, 600).unsqueeze(1)  # subnormal rows too
    x[3] = 0
    x[4] = 127
    x[4, : size // 2] = torch.arange(size // 2) % 200 - 99.5
    x = x.to(dtype)
    expected_rows, expected_scales = oracle.quantize_rows(x.float())
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in SEVERAL_ROW_COUNTS:
                chosen = some_rows(count, count, 600)
                rows, scales = kernel.quantize_rows(x[chosen])
                assert torch.equal(rows, expected_rows[chosen])
                assert torch.equal(scales, expected_scales[chosen])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_another_dtype_or_a_view_are_quantised_like_the_same_numbers_in_float32(
    kernel: NativeInt8, dtype: torch.dtype
) -> None:
    x = randn(1, 18, 100, dtype=dtype)[::2, ::2]
    for found, expected in zip(kernel.quantize_rows(x), oracle.quantize_rows(x.float()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(
    kernel: NativeInt8, value: float, dtype: torch.dtype
) -> None:
    x = randn(1, 3, 40, dtype=dtype)
    expected = oracle.quantize_rows(x.float())
    x[1, 7] = value
    rows, scales = kernel.quantize_rows(x)
    assert scales.isfinite().tolist() == [True, False, True]
    assert torch.equal(rows[::2], expected[0][::2])
    output = kernel.int8_linear(rows, scales, pack(kernel, some_weight(1, 20, 40)))
    assert output.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not output[1].isfinite().any()


class Layer:
    """Some experts of one shape, packed for a kernel."""

    def __init__(
        self, kernel: NativeInt8, num_experts: int, hidden_size: int, size: int, scale: float
    ) -> None:
        self.kernel = kernel
        self.gate_up = [some_weight(10 + e, 2 * size, hidden_size, scale) for e in range(num_experts)]
        self.down = [some_weight(50 + e, hidden_size, size) for e in range(num_experts)]
        self.packed = [pack(kernel, weight) for weight in self.gate_up], [pack(kernel, w) for w in self.down]
        self.joined = kernel.join_experts(*self.packed)

    def forward(self, rows: Tensor, row_scales: Tensor, counts: list[int]) -> Tensor:
        return self.kernel.int8_experts(rows, row_scales, torch.tensor(counts), self.joined)

    def compose(self, rows: Tensor, row_scales: Tensor, counts: list[int]) -> Tensor:
        return oracle.experts(rows, row_scales, counts, self.gate_up, self.down)


# With the largest scale, gates reach far beyond where exp overflows; with the smallest they are nearly 0.
@pytest.mark.parametrize("scale", [1e-9, 0.01, 1.0, 1e4])
@pytest.mark.parametrize(("hidden_size", "size"), [(64, 32), (24, 7), (50, 21), (300, 96)])
def test_experts_equal_their_steps_done_one_by_one(
    kernel: NativeInt8, hidden_size: int, size: int, scale: float
) -> None:
    layer = Layer(kernel, 5, hidden_size, size, scale)
    for counts in ([1, 0, 2, 0, 0], [0, 0, 0, 0, 1], [3, 1, 17, 16, 5], [0, 300, 1, 513, 0]):
        rows, row_scales = some_int8_rows(1, sum(counts), hidden_size)
        expected = layer.compose(rows, row_scales, counts)
        for threads in THREAD_COUNTS:
            with num_threads(threads):
                assert torch.equal(layer.forward(rows, row_scales, counts), expected), (counts, threads)


def test_experts_equal_their_steps_at_real_sizes(kernel: NativeInt8) -> None:
    layer = Layer(kernel, 3, 2048, 1408, 0.001)
    rows, row_scales = some_int8_rows(1, 40, 2048)
    with num_threads(2):
        output = layer.forward(rows, row_scales, [1, 31, 8])
    assert torch.equal(output, layer.compose(rows, row_scales, [1, 31, 8]))


# F so wide that the workspace holds one job (of 64 and of 256 rows) at a time, and so that it holds three.
@pytest.mark.parametrize(
    ("size", "counts"), [(12000, [1, 130, 0, 65]), (3000, [257, 300]), (1100, [256] * 7)]
)
def test_experts_that_take_turns_in_the_workspace_equal_their_steps(
    kernel: NativeInt8, size: int, counts: list[int]
) -> None:
    layer = Layer(kernel, len(counts), 16, size, 0.01)
    rows, row_scales = some_int8_rows(1, sum(counts), 16)
    expected = layer.compose(rows, row_scales, counts)
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            assert torch.equal(layer.forward(rows, row_scales, counts), expected), threads


def test_experts_give_a_row_the_same_bits_in_every_company(kernel: NativeInt8) -> None:
    layer = Layer(kernel, 3, 48, 40, 0.01)
    rows, row_scales = some_int8_rows(1, 600, 48)
    expert_of = torch.arange(600) * 3 // 600  # [R], sorted
    with num_threads(1):
        expected = layer.forward(rows, row_scales, [200, 200, 200])
    for threads in THREAD_COUNTS:
        with num_threads(threads):
            for count in (1, 2, 3, 5, 8, 16, 17, 40, 127, 128, 129, 513, 600):
                chosen = some_rows(count, count, 600)
                chosen = chosen[torch.argsort(expert_of[chosen], stable=True)]
                counts = torch.bincount(expert_of[chosen], minlength=3).tolist()
                output = layer.forward(rows[chosen], row_scales[chosen], counts)
                assert torch.equal(output, expected[chosen]), f"{count} rows, {threads} threads"


def test_the_described_swiglu_is_accurate_to_a_few_last_bits() -> None:
    gate = torch.cat([torch.linspace(-87, 88, 100_001), torch.logspace(-30, 1, 1000), torch.zeros(1)])
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    found = oracle.swiglu(gate, torch.ones_like(gate)).double()
    assert float(((found - exact).abs() / exact.abs().clamp(min=1e-36)).max()) < 4e-7


def test_the_described_swiglu_of_large_gates_is_their_limit() -> None:
    gate = torch.tensor([-1e30, -1000.0, -120.0, 90.0, 1000.0, 1e30])
    found = oracle.swiglu(gate, torch.ones_like(gate))
    assert torch.equal(found, torch.where(gate < 0, -torch.zeros(()), gate))


@needs_library
def test_rows_that_do_not_fit_are_refused_with_what_fits() -> None:
    kernel = native_int8.load()
    packed = kernel.pack_int8(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))
    rows = torch.ones(3, 8, dtype=torch.int8)
    fits = r"fit weights of 8 in-features: give int8 \[M, 8\] and float32 \[M\]"
    for wrong in ((rows[:, :7], torch.ones(3)), (rows, torch.ones(2)), (rows.float(), torch.ones(3))):
        with pytest.raises(ValueError, match=fits):
            kernel.int8_linear(*wrong, packed)
    with pytest.raises(ValueError, match=fits):
        kernel.int8_linear(rows, torch.ones(3, dtype=torch.float64), packed)


@needs_library
def test_experts_that_do_not_belong_together_are_refused() -> None:
    kernel = native_int8.load()
    small, large = Layer(kernel, 2, 16, 8, 1.0), Layer(kernel, 2, 16, 12, 1.0)
    rows, row_scales = some_int8_rows(1, 3, 16)
    for counts in ([1, 1], [4, -1], [-1, 4]):
        with pytest.raises(ValueError, match=r"tokens_per_expert \[.*\] does not count 3 rows"):
            small.forward(rows, row_scales, counts)
    for wrong in (torch.tensor([1, 1, 1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"must be int64 \[2\]"):
            kernel.int8_experts(rows, row_scales, wrong, small.joined)
    mixed = [small.packed[0][0], large.packed[0][1]], [small.packed[1][0], large.packed[1][1]]
    with pytest.raises(
        ValueError, match=r"an expert with gate_up \[24, 16\] and down \[16, 12\] does not fit"
    ):
        kernel.join_experts(*mixed)
    plain = PackedInt8((torch.ones(4, 8, dtype=torch.int8),), torch.ones(4), None)
    with pytest.raises(ValueError, match="2 of 4 weights can be joined"):
        kernel.join_experts([small.packed[0][0], plain], [small.packed[1][0], plain])


@needs_library
def test_a_weight_that_cannot_be_summed_in_int32_is_refused() -> None:
    wide = torch.ones(1, native_int8.MAX_IN_FEATURES + 1, dtype=torch.int8)
    for weight in (wide, torch.ones(1, 8)):
        with pytest.raises(ValueError, match="cannot be packed: give int8"):
            native_int8.load().pack_int8(weight, torch.ones(1))


def test_without_the_library_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"were not built \(kernels.so is missing\): install expertmesh again"
    ):
        native_int8.load(tmp_path / "kernels.so")
    broken = tmp_path / "kernels.so"
    broken.write_text("no library")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        native_int8.load(broken)


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler was found"), ("false", "false failed")]
)
def test_a_build_that_fails_says_why_and_leaves_no_library_of_older_code(
    tmp_path: Path, compiler: str, reason: str
) -> None:
    target = tmp_path / "kernels.so"
    target.write_text("older")
    found = compile_library([compiler], target)
    assert found is not None
    assert found.startswith(reason)
    assert list(tmp_path.iterdir()) == []


@needs_library
def test_a_library_just_compiled_is_like_the_installed_one(tmp_path: Path) -> None:
    target = tmp_path / "kernels.so"
    reason = compile_library(["no-such-compiler", *COMPILERS], target)
    if reason is not None:
        pytest.skip(reason)
    kernel = native_int8.load(target)
    assert_linear_is_exact(kernel, *some_int8_rows(1, 5, 70), some_weight(2, 40, 70))
