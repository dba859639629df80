"""The heatmap: an even layer is one shade, a hot expert the darkest, many experts share a cell."""

from __future__ import annotations

from expertmesh.heatmap import SHADES, imbalance, shades


def test_an_even_layer_has_one_shade_and_an_idle_one_is_blank() -> None:
    assert shades([5, 5, 5, 5], 96) == SHADES[3] * 4
    assert shades([0, 0, 0], 96) == "   "
    assert shades([], 96) == ""


def test_the_shade_grows_with_the_share_and_ends_at_twice_the_average() -> None:
    line = shades([0, 2, 10, 8, 100], 96)
    assert [SHADES.index(cell) for cell in line] == [0, 1, 1, 1, 4]


def test_more_experts_than_cells_are_averaged_in_order() -> None:
    line = shades([0] * 128 + [8] * 128, 96)
    assert len(line) == 96
    assert line[:48] == " " * 48
    assert set(line[48:]) == {SHADES[4]}


def test_the_imbalance_is_the_maximum_over_the_mean() -> None:
    assert imbalance([1, 1, 2]) == 1.5
    assert imbalance([0, 0]) == 0.0
