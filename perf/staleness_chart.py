"""Learning curves as an SVG file, written by hand: no plotting library is needed to run the benchmarks.

One panel for each kind of correction, three in a row, on one scale; a line is the mean over seeds, the band around it
their least and greatest. Used by perf/staleness.
"""

from __future__ import annotations

from html import escape
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Curves = Mapping[str, Sequence[Sequence[float]]]  # label -> one curve for each seed

COLOURS = ("#1f3a5f", "#2a7f9e", "#4fae8c", "#d98b2b", "#b5352b", "#7a4b9a", "#555555")
WIDTH, HEIGHT, MARGIN = 430, 300, 58  # of a panel, pixels
ACROSS = 3  # panels in a row
LETTER = 8  # pixels
POINTS = 60  # of a curve: each is the mean of as many versions as it takes


def smoothed(curve: Sequence[float], points: int = POINTS) -> list[tuple[float, float]]:
    """Return (place, mean) of equal parts of a curve; a short one is returned as it is."""
    size = max(1, -(-len(curve) // points))
    starts = range(0, len(curve), size)
    return [
        (start + (len(curve[start : start + size]) - 1) / 2, fmean(curve[start : start + size])) for start in starts
    ]


def chart(panels: Mapping[str, Curves], *, title: str, x_name: str, y_name: str, top: float = 1.0) -> str:
    """Return the SVG; `top` is the greatest value of the y axis."""
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    across, down = min(ACROSS, len(panels)), -(-len(panels) // ACROSS)
    width = WIDTH * across + 40 + LETTER * max(map(len, labels))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT * down + 40}" font-family="sans-serif" '
        f'font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, curves) in enumerate(panels.items()):
        row, column = divmod(number, ACROSS)
        at = f"translate({column * WIDTH} {30 + row * HEIGHT})"
        parts.append(f'<g transform="{at}">{_panel(name, curves, x_name, y_name, top)}</g>')
    for place, label in enumerate(labels):
        x, y = WIDTH * across + 5, 60 + 20 * place
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 18}" y2="{y}" stroke="{_colour(place)}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(name: str, curves: Curves, x_name: str, y_name: str, top: float) -> str:
    right, bottom = WIDTH - 12, HEIGHT - MARGIN
    longest = max(len(curve) for rows in curves.values() for curve in rows)

    def at(x: float, y: float) -> str:
        across = MARGIN + (right - MARGIN) * x / max(1, longest - 1)
        return f"{across:.1f},{bottom - (bottom - 20) * min(y, top) / top:.1f}"

    parts = [f'<text x="{MARGIN}" y="12">{escape(name)}</text>']
    for step in range(5):
        value = top * step / 4
        y = at(0, value).partition(",")[2]
        parts.append(f'<line x1="{MARGIN}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:g}</text>')
    for place, rows in enumerate(curves.values()):
        seeds = [smoothed(curve) for curve in rows]
        columns = list(zip(*seeds, strict=True))
        low = [at(column[0][0], min(y for _, y in column)) for column in columns]
        high = [at(column[0][0], max(y for _, y in column)) for column in columns]
        mean = [at(column[0][0], fmean(y for _, y in column)) for column in columns]
        colour = _colour(place)
        parts.append(f'<polygon points="{" ".join([*low, *reversed(high)])}" fill="{colour}" opacity="0.12"/>')
        parts.append(f'<polyline points="{" ".join(mean)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    middle = (MARGIN + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)} (0 to {longest - 1})</text>'
    )
    turned = f'transform="rotate(-90 12 {bottom / 2})"'
    parts.append(f'<text x="12" y="{bottom / 2}" text-anchor="middle" {turned}>{escape(y_name)}</text>')
    return "".join(parts)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
