"""The report of a case as Markdown: on the terminal, and as a section of RESULTS.md with its charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .runner import Spread

_HEAD = """# Results

`python -m benchmarks --out benchmarks/RESULTS.md` writes this file, one section for each case. A figure is the
median of its rounds, with minimum and maximum in brackets. A ratio is the median of the ratios of paired runs.
Programs run in turns (A B A B …), each in a fresh process, in most cases on one processor (with `--unpinned` on any).
The server process runs on another one (loopback). In the tables, *ours* is this library, and *to reach* is the goal.
"""


@dataclass
class Report:
    """One case's text, tables and charts."""

    case: str
    variant: Sequence[str]
    """Command-line options other than the usual."""
    title: str
    text: str
    parts: list[str] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)
    """SVG by file name."""

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        lines = [header, ["---"] * len(header), *rows]
        self.parts.append("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))

    def targets(self, rows: Sequence[tuple[str, Spread, str, float]]) -> None:
        """Add a table of goals; each row is a figure's name, its measured value, ``≤`` or ``≥``, and the bound."""
        shown = []
        for what, measured, sign, bound in rows:
            reached = measured.median <= bound if sign == "≤" else measured.median >= bound
            shown.append((what, f"{sign} {bound:g}", measured, "reached" if reached else "**not reached**"))
        self.table(["figure", "to reach", "measured", ""], shown)

    @property
    def command(self) -> str:
        """Return the arguments that run this case."""
        return " ".join([self.case, *self.variant])

    def titled(self, what: str) -> str:
        """Return a chart's title: ``what``, with the conditions that tell it from the charts of other variants."""
        shown = {"--tls": "TLS", "--unpinned": "two processors", "--quick": "a tenth of the work"}
        conditions = [shown.get(option, option.removeprefix("--bits ") + "-bit keys") for option in self.variant]
        return ", ".join([what, *(["one processor"] if "--unpinned" not in self.variant else []), *conditions])

    def chart(self, name: str, title: str, svg: str) -> None:
        """Add a chart, to be stored as ``name`` with the variant and ``.svg``."""
        name = "-".join([name, *(option.split()[-1].strip("-") for option in self.variant)]) + ".svg"
        self.charts[name] = svg
        self.parts.append(f"![{title}]({name})")

    def markdown(self, conditions: str) -> str:
        """Return the section."""
        paragraphs = [f"## `{self.command}`: {self.title}", self.text.strip(), *self.parts, f"_{conditions}_"]
        return "\n\n".join(paragraphs) + "\n"


def store(report: Report, out: Path, conditions: str) -> None:
    """Write the report's section into ``out``, in the place of an earlier one, and its charts beside it."""
    text = out.read_text("utf-8") if out.exists() else _HEAD
    begin, end = f"<!-- {report.command} -->\n", f"<!-- end of {report.command} -->\n"
    section = begin + report.markdown(conditions) + end
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    text = old.sub(lambda _: section, text) if old.search(text) else text + "\n" + section
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, "utf-8")
    for name, svg in report.charts.items():
        (out.parent / name).write_text(svg, "utf-8")
