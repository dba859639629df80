"""Draws the loss of a training run as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 45
MAX_POINTS = 240
TICKS = (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 8)


def smoothed(losses: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield step and mean loss of at most MAX_POINTS stretches of equal length."""
    stretch = max(1, math.ceil(len(losses) / MAX_POINTS))
    for first in range(0, len(losses), stretch):
        part = losses[first : first + stretch]
        yield first + len(part) / 2, fmean(part)


def draw_loss_curve(losses: Sequence[float]) -> str:
    """Return the picture: steps to the right, loss on a logarithmic axis."""
    points = list(smoothed(losses))
    low = math.floor(math.log10(min(loss for _, loss in points)) * 10) / 10
    high = math.ceil(math.log10(max(loss for _, loss in points)) * 10) / 10

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / len(losses)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(loss)) / (high - low)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">Training loss, nats per learned token</text>',
    ]
    lines += [
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
        f'stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        for tick in TICKS
        if low <= math.log10(tick) <= high
    ]
    for quarter in range(5):
        step = len(losses) * quarter / 4
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{round(step)}</text>')
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    lines += [
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>',
        f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
