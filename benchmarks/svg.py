"""Charts as SVG text, legible on light and dark pages: bars with their spread, and lines over a log axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .runner import Spread

_WIDTH = 760
_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px } .soft { fill: #57606a } .end { text-anchor: end }
.mid { text-anchor: middle } .grid { stroke: #8c959f; stroke-opacity: .35 }
.spread { stroke: #24292f; stroke-width: 1.5 }
.s0 { fill: #0969da; stroke: #0969da } .s1 { fill: #bc4c00; stroke: #bc4c00 } .s2 { fill: #1a7f37; stroke: #1a7f37 }
.s3 { fill: #8250df; stroke: #8250df } .s4 { fill: #6e7781; stroke: #6e7781 } .s5 { fill: #bf3989; stroke: #bf3989 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .soft { fill: #9198a1 } .spread { stroke: #e6edf3 }
  .s0 { fill: #4493f8; stroke: #4493f8 } .s1 { fill: #f0883e; stroke: #f0883e } .s2 { fill: #3fb950; stroke: #3fb950 }
  .s3 { fill: #ab7df8; stroke: #ab7df8 } .s4 { fill: #9198a1; stroke: #9198a1 } .s5 { fill: #db61a2; stroke: #db61a2 }
}
.line { fill: none; stroke-width: 2.2 } .bar { stroke: none } .name { stroke: none; font-weight: 600 }
</style>"""


def _document(height: int, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([head, _STYLE, f'<text class="title" x="8" y="22">{escape(title)}</text>', *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text.replace("`", ""))}</text>'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bars(title: str, unit: str, rows: Mapping[str, Spread], ours: Sequence[str] = ()) -> str:
    """Draw a horizontal bar for each row, its spread as a line; the rows in ``ours`` have another colour."""
    left, right, top, step = 310, 80, 40, 30
    longest, shortest = max(row.high for row in rows.values()), min(row.low for row in rows.values())
    is_log = longest > 200 * shortest  # else the shortest bar would be less than three pixels
    floor = math.floor(math.log10(shortest)) - 0.5

    def width(value: float) -> float:
        share = (math.log10(value) - floor) / (math.log10(longest) - floor) if is_log else value / longest
        return (_WIDTH - left - right) * share

    parts = []
    for place, (label, row) in enumerate(rows.items()):
        y = top + place * step
        middle = y + step / 2 - 3
        style = "s0" if label in ours else "s4"
        parts += [
            _text(left - 10, middle + 4, label, "end"),
            f'<rect class="bar {style}" x="{left}" y="{y}" width="{width(row.median):.1f}" height="{step - 8}"/>',
            f'<path class="spread" d="M{left + width(row.low):.1f} {middle:.1f}H{left + width(row.high):.1f}"/>',
            _text(left + width(row.high) + 8, middle + 4, _number(row.median)),
        ]
    bottom = top + len(rows) * step + 14
    scale = ", logarithmic scale" if is_log else ""
    parts.append(_text(8, bottom, f"{unit}{scale}; the thin line spans all rounds", "soft"))
    return _document(bottom + 12, title, parts)


def lines(
    title: str, x_title: str, y_title: str, series: Mapping[str, Mapping[int, float]], *, log_y: bool = False
) -> str:
    """Draw a line for each of ``series`` (x → y) over a logarithmic x axis, with its name at its right end."""
    left, right, top, height = 70, max(250, 20 + 8 * max(map(len, series))), 60, 300
    xs = sorted({x for line in series.values() for x in line})
    ys = [y for line in series.values() for y in line.values()]
    y_of = math.log10 if log_y else float
    floor = y_of(10 ** math.floor(math.log10(min(ys)))) if log_y else 0.0
    ceiling = y_of(10 ** math.ceil(math.log10(max(ys)))) if log_y else max(ys) * 1.05

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - math.log(xs[0])) / ((math.log(xs[-1]) - math.log(xs[0])) or 1)
        return left + share * (_WIDTH - left - right), top + height * (1 - (y_of(y) - floor) / (ceiling - floor))

    middle = (left + _WIDTH - right) / 2
    parts = [_text(8, top - 16, y_title, "soft"), _text(middle, top + height + 40, x_title, "soft mid")]
    for tick in _ticks(floor, ceiling, log_y=log_y):
        y = at(xs[0], tick)[1]
        parts += [
            f'<path class="grid" d="M{left} {y:.1f}H{_WIDTH - right}"/>',
            _text(left - 8, y + 4, _number(tick), "soft end"),
        ]
    parts += [_text(at(x, max(ys))[0], top + height + 20, _number(x), "soft mid") for x in xs]
    ends = []
    for place, (label, line) in enumerate(series.items()):
        points = [at(x, y) for x, y in sorted(line.items())]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="s{place} line" d="M{path}"/>')
        parts += [f'<circle class="s{place}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        ends.append((points[-1][1], place, label))
    free = 0.0
    for y, place, label in sorted(ends):  # each name at the end of its line, without overlaps
        free = max(y + 4, free)
        parts.append(_text(_WIDTH - right + 10, free, label, f"s{place} name"))
        free += 16
    return _document(top + height + 52, title, parts)


def _ticks(floor: float, ceiling: float, *, log_y: bool) -> list[float]:
    if log_y:
        return [10.0**power for power in range(round(floor), round(ceiling) + 1)]
    step = 10 ** math.floor(math.log10(ceiling))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if ceiling / (step * part) <= 6)
    return [step * count for count in range(int(ceiling / step) + 1)]
