"""The picture of a tuning: throughput over staleness, one point a setting, the front as a line, as an SVG.

Invariants:
- a pure function of the tuning;
- every point lies within the axes;
- no library and no font is needed to draw it.

Written by `flowrl tune`.

Tests: tests/unit/tuning/test_picture.py
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from flowrl.telemetry.charts import number, ticks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flowrl.tuning.trials import Trial
    from flowrl.tuning.tune import Tuning

WIDTH, HEIGHT = 900, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 50, 60
MOST_POINTS = 4000
STYLE = (
    "text{font:14px sans-serif;fill:#222}.small{font-size:12px}.axis{stroke:#888}.grid{stroke:#e4e4e4}"
    ".tried{fill:#9ab;fill-opacity:.45}.front{stroke:#c40;stroke-width:2;fill:none}.best{fill:#c40}.present{fill:#048}"
)


def picture(tuning: Tuning) -> str:
    """Return the SVG."""
    most_stale = max([1e-3, *(stale for _, stale in tuning.looked), *(t.mean_staleness for t in tuning.front)]) * 1.05
    fastest = max([tuning.present.samples_per_s, *(t.samples_per_s for t in tuning.front),
                   *(rate for rate, _ in tuning.looked)]) * 1.08  # fmt: skip

    def at(staleness: float, samples_per_s: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * staleness / most_stale
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * samples_per_s / fastest

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="28">{tuning.num_trials:,} settings searched: learned samples/s over staleness</text>',
    ]
    for value in ticks(0.0, fastest, most=6):
        (x, y), end = at(0.0, value), WIDTH - RIGHT
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(0.0, most_stale, most=6):
        x, y = at(value, 0.0)
        parts.append(f'<text class="small" x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">policy versions</text>'
    )
    every = max(1, len(tuning.looked) // MOST_POINTS)
    for rate, stale in tuning.looked[::every]:
        x, y = at(stale, rate)
        parts.append(f'<circle class="tried" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    line = " ".join("{:.1f},{:.1f}".format(*at(t.mean_staleness, t.samples_per_s)) for t in tuning.front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for trial in tuning.front:
        parts += _mark(at(trial.mean_staleness, trial.samples_per_s), "best", 5, _words(trial))
    x_y = at(tuning.present.mean_staleness, tuning.present.samples_per_s)
    parts += _mark(x_y, "present", 6, f"at present: {tuning.present.samples_per_s:.3g} samples/s")
    x, y = at(tuning.recommended.mean_staleness, tuning.recommended.samples_per_s)
    parts.append(f'<circle class="front" cx="{x:.1f}" cy="{y:.1f}" r="10"/>')
    parts += _legend()
    return "\n".join([*parts, "</svg>", ""])


def _mark(place: tuple[float, float], kind: str, radius: int, words: str) -> list[str]:
    x, y = place
    return [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(words)}</title></circle>']


def _words(trial: Trial) -> str:
    changes = " ".join(f"{path}={value}" for path, value in trial.setting.items()) or "as it is"
    return f"{trial.samples_per_s:.3g} samples/s, staleness {trial.mean_staleness:.2f}: {changes}"


def _legend() -> Iterator[str]:
    named = [("tried", "tried"), ("best", "worth having (circled: recommended)"), ("present", "at present")]
    for place, (kind, words) in enumerate(named):
        y = HEIGHT - BOTTOM - 16 - 20 * (len(named) - 1 - place)
        yield f'<circle class="{kind}" cx="{WIDTH - 300}" cy="{y - 4}" r="5"/>'
        yield f'<text class="small" x="{WIDTH - 288}" y="{y}">{words}</text>'
