"""The operator's day: ``python -m tests.programs.operator_day --lines 3000 --seed 1``.

A realistic export of a spreadsheet (Chinese headers, GB18030, several forms of amounts, repeated lines, damaged cells)
is checked and mended until no line is refused. Then ``lianlian batch`` sends it to a faulty ``lianlian sandbox`` with
the orders of the file; it is killed twice (SIGKILL) and run again. In the end the result file must show every refund as
made, and ``lianlian reconcile`` must find every refund once in the sandbox's statement, with the amount of the export.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs

from lianlian_async.journal import JournalError, SqliteReader, State
from tests.support.batches import read_csv
from tests.support.command import start, until

FIELDS = {"no_refund": "退款单号", "no_order": "订单号", "dt_refund": "退款时间", "money_refund": "退款金额"}
COLUMNS = [*FIELDS.values(), "客户", "备注"]
NAMES = ("--encoding", "gb18030", "--ignore-unknown", *(f"--map={name}={text}" for name, text in FIELDS.items()))
FORMS = ("--date-format", "YYYY/MM/DD hh:mm", "--money-format", "¥1,234.56")
REMARKS = ("", "", "质量问题", "发错货,已退回", '客户说"不要了"', "第一行\n第二行", "=SUM(A1:A9)")
FAULTS = ("reset=0.01", "bad-gateway=0.01", "delay=0.01", "busy=0.01", "late=0.005")
GRACE = 3.0
"""Seconds: longer than a late request of the sandbox is on its way."""

Row = list[str]

DAMAGE: dict[str, Callable[[Row], Row]] = {
    "invisible character": lambda row: [f"{row[0]}\u200b", *row[1:]],
    "number that is too long": lambda row: [row[0] * 4, *row[1:]],
    "no number": lambda row: ["", *row[1:]],
    "number in scientific notation": lambda row: [row[0], "2.02611E+13", *row[2:]],
    "error value": lambda row: [row[0], "#N/A", *row[2:]],
    "other form of a date": lambda row: [*row[:2], "01/02/2026", *row[3:]],
    "day that does not exist": lambda row: [*row[:2], "2026/02/30 10:20", *row[3:]],
    "negative amount": lambda row: [*row[:3], f"-{row[3]}", *row[4:]],
    "third decimal": lambda row: [*row[:3], "5.005", *row[4:]],
    "misplaced thousands separator": lambda row: [*row[:3], "12,34.00", *row[4:]],
    "no amount": lambda row: [*row[:3], "", *row[4:]],
    "amount in words": lambda row: [*row[:3], "五元", *row[4:]],
    "too many cells": lambda row: [*row, "多余"],
}


# ── the export ───────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Export:
    """The rows of an export as they should be, and the damaged ones by index."""

    rows: list[Row]
    amounts: dict[str, Decimal]
    """The amount of each refund."""
    damaged: dict[int, Row]

    def write(self, path: Path) -> dict[int, int]:
        """Write the file, and return the index of the row that begins at each line."""
        text, lines, line = io.StringIO(newline=""), {}, 2
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for index, row in enumerate(self.rows):
            lines[line] = index
            writer.writerow(self.damaged.get(index, row))
            line += 1 + sum(cell.count("\n") for cell in row)
        path.write_bytes(text.getvalue().encode("gb18030"))
        return lines


def amount_in_a_form(amount: Decimal, dice: random.Random) -> str:
    """Return an amount as people write it: with thousands separators, a currency sign, or full-width digits."""
    text = f"{amount:,.2f}"
    full_width = text.translate({code: code + 0xFEE0 for code in range(ord("0"), ord("9") + 1)})
    return dice.choice([text, text.replace(",", ""), f"¥{text}", f"￥{text}", full_width, text.removesuffix(".00")])


def export(count: int, dice: random.Random) -> Export:
    """Return an export of about ``count`` lines: 2 % repeat a line, at least 3 % are damaged, some orders have two."""
    rows, amounts = list[Row](), dict[str, Decimal]()
    for number in range(1, count - count // 50 + 1):
        no_refund, order = f"TK2026{number:06}", f"DD2026{number - (number % 5 == 0):06}"
        amount = Decimal(dice.choice([1, 8800, dice.randint(1, 100_000), dice.randint(1, 10_000_000)])) / 100
        when = f"2026/{dice.randint(1, 11)}/{dice.randint(1, 28)} {dice.randint(0, 23)}:{dice.randint(0, 59):02}"
        rows.append([no_refund, order, when, amount_in_a_form(amount, dice), f"客户{number}", dice.choice(REMARKS)])
        amounts[no_refund] = amount
    one, other, *places = dice.sample(range(len(rows)), 2 + count // 50 + max(len(DAMAGE), count * 3 // 100))
    repeated, damaged = places[: count // 50], places[count // 50 :]
    kinds = list(DAMAGE.values())
    changed = {index: kinds[turn % len(kinds)](rows[index]) for turn, index in enumerate(damaged)}
    changed[one] = [rows[other][0], *rows[one][1:]]  # a line that was copied, with the number of the other line
    return Export([*rows, *(rows[index] for index in repeated)], amounts, changed)


# ── the day ──────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Report:
    """What happened on the day."""

    lines: int
    damaged: int
    checks: int
    """How often the file was checked until no line was refused."""
    false_alarms: list[str]
    """Problems that the check found in lines without damage."""
    hints: list[str]
    """The options that the first check asked for."""
    finished_at_kills: list[int]
    """Refunds whose outcome was known at each kill."""
    outcomes: dict[str, int]
    """The number of lines of the result file with each outcome."""
    reconciled: dict[str, Any]
    contradictions: dict[str, str]
    """Refunds for which the statement differs from the export, or the result file from its line."""
    seconds: float


def lianlian(*arguments: object, env: Mapping[str, str] | None = None, exit_codes: tuple[int, ...] = (0,)) -> Any:
    """Run a command with ``--json``; return its document, or its exit code and stderr if more codes are allowed."""
    process = start(*arguments, "--json", env=env)
    stdout, stderr = process.communicate()
    if process.returncode not in exit_codes:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}: {stdout[-500:]}{stderr[-500:]}")
    return json.loads(stdout) if len(exit_codes) == 1 else (process.returncode, stderr)


def check_and_mend(export: Export, file: Path) -> tuple[int, list[str]]:
    """Mend the lines that the check refuses, until it refuses none; return the number of checks and false alarms."""
    checks, alarms = 0, list[str]()
    numbers = Counter(row[0] for row in export.damaged.values())
    while True:
        lines = export.write(file)
        exit_code, stderr = lianlian("batch", file, *NAMES, *FORMS, "--dry-run", exit_codes=(0, 2))
        checks += 1
        if exit_code == 0:
            return checks, alarms
        problems = re.findall(r"^line (\d+): (?!repeats line)(.*)", stderr, re.MULTILINE)
        mended = {index for line, _ in problems if (index := lines[int(line)]) in export.damaged}
        # The check cannot know which of two lines with one number is the damaged one.
        alarms += [
            f"line {line}: {problem}"
            for line, problem in problems
            if lines[int(line)] not in export.damaged and not numbers[export.rows[lines[int(line)]][0]]
        ]
        if not mended:
            raise RuntimeError(f"no damaged line is named: {stderr[-1000:]}")
        for index in mended:
            del export.damaged[index]


@contextmanager
def sandbox(file: Path, folder: Path) -> Iterator[dict[str, str]]:
    """Run ``lianlian sandbox`` with the file's orders; yield its environment; it writes its statement at the end."""
    env_file = folder / "sandbox.env"
    faults = (f"--fault={fault}" for fault in FAULTS)
    process = start(
        *("sandbox", "--env-file", env_file, "--orders", file, "--statement", folder, *NAMES, *FORMS, *faults)
    )
    try:
        until(lambda: process.poll() is not None or (env_file.exists() and "NOTIFY_URL" in env_file.read_text("utf-8")))
        if process.poll() is None:
            yield dict(word.split("=", 1) for word in shlex.split(env_file.read_text("utf-8")))
    finally:
        process.terminate()
        _, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the sandbox ended with {process.returncode}: {stderr[-500:]}")


async def finished(journal: Path) -> int:
    """Return the number of refunds in the journal whose outcome is known."""
    try:
        async with SqliteReader(journal) as reader:
            counts = await reader.counts()
    except JournalError:  # it does not exist yet
        return 0
    return sum(counts.values()) - counts[State.UNRESOLVED]


def send_with_kills(command: tuple[object, ...], env: Mapping[str, str], journal: Path, refunds: int) -> list[int]:
    """Run the batch twice; kill it (SIGKILL) after a third and after two thirds of the refunds."""
    made = []
    for part in (1, 2):
        process = start(*command, "--rate", max(50, refunds // 10), env=env)
        while process.poll() is None and anyio.run(finished, journal) < refunds * part // 3:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        if process.returncode != -9:
            raise RuntimeError(f"the batch ended with {process.returncode} before it was killed")
        made.append(anyio.run(finished, journal))
    return made


def operator_day(folder: Path, *, lines: int, seed: int) -> Report:
    """Run everything in ``folder``."""
    began, exported = time.monotonic(), export(lines, random.Random(seed))
    file, out, journal = folder / "退款申请.csv", folder / "结果.csv", folder / "journal.sqlite"
    damaged = len(exported.damaged)
    exported.write(file)
    _, undeclared = lianlian("batch", file, *NAMES, "--dry-run", exit_codes=(0, 2))
    hints = sorted(set(re.findall(r"declare the format, such as (--\S+)", undeclared)))
    checks, alarms = check_and_mend(exported, file)
    command = ("batch", file, *NAMES, *FORMS, "--journal", journal, "--yes", "--out", out)
    command += ("--deadline", 5, "--not-found-grace", GRACE, "--wait-unknown")
    with sandbox(file, folder) as env:
        kills = send_with_kills(command, env, journal, len(exported.amounts))
        lianlian(*command, env=env)
    [statement] = folder.glob("JYMX_*.txt")
    reconciled = lianlian("reconcile", statement, "--journal", journal)
    results, begins = read_csv(out), exported.write(file)
    return Report(
        lines=len(exported.rows),
        damaged=damaged,
        checks=checks,
        false_alarms=alarms,
        hints=hints,
        finished_at_kills=kills,
        outcomes=dict(Counter(result["outcome"] for result in results)),
        reconciled=reconciled,
        contradictions=contradictions(
            exported, statement, [(exported.rows[begins[int(one["line"])]], one) for one in results]
        ),
        seconds=round(time.monotonic() - began, 1),
    )


def contradictions(exported: Export, statement: Path, results: list[tuple[Row, dict[str, str]]]) -> dict[str, str]:
    """Compare the statement and the result file with the export."""
    found = {row[0]: "result of another line" for row, result in results if result[COLUMNS[0]] != row[0]}
    times, yuan = Counter[str](), dict[str, Decimal]()
    for cells in csv.reader(statement.read_text("utf-8").splitlines()):
        times[cells[0]] += 1
        yuan[cells[0]] = -Decimal(cells[6])
    for number in exported.amounts.keys() | times.keys():
        if times[number] != 1 or yuan[number] != exported.amounts.get(number):
            found[number] = f"{times[number]} times in the statement, {yuan.get(number)} yuan"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = operator_day(Path(folder), lines=options.lines, seed=options.seed)
    print(json.dumps({"seed": options.seed, **attrs.asdict(report)}, indent=2, ensure_ascii=False))
    is_good = report.outcomes.keys() == {"made", "repeated"} and not report.contradictions and not report.false_alarms
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
