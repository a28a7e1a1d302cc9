"""Output of the command: results on stdout as text or JSON, everything else on stderr."""

import csv
import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

import attrs
import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from lianlian_async.errors import InvalidRequest, LianLianError, RefundOutcomeUnknown
from lianlian_async.models import RefundQuery

from .exit_codes import INTERRUPTED, error_document, exit_outcome_of

_FORMULA: Final = tuple("=+-@\t\r\n＝＋－＠")
_FORMS: Final = {int: "{:,}", float: "{:,.1f}", Decimal: "{:,.2f}"}
_NEGATIVE: Final = re.compile(r"-[0-9]+([.,][0-9]+)*")


class _Console(Console):
    def __init__(self, *, stderr: bool = False) -> None:
        # Text from the wire must not be interpreted as markup. NO_COLOR alone would not stop Rich from moving the
        # cursor and printing bold text.
        is_terminal = False if os.environ.get("NO_COLOR") else None  # None: Rich asks the stream
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, force_terminal=is_terminal)

    def on_broken_pipe(self) -> NoReturn:
        """Raise ``BrokenPipeError``: Rich would exit with code 1, which hides the outcome."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    @property
    def can_redraw(self) -> bool:
        """Whether this is a terminal that can move its cursor."""
        return self.is_terminal and not self.is_dumb_terminal


class _Pace(ProgressColumn):
    """The finished and the total number of refunds, the recent rate, and the time that remains."""

    def render(self, task: Task) -> Text:
        left = "-" if task.time_remaining is None else timedelta(seconds=int(task.time_remaining))
        return Text(f"{task.completed:,.0f} of {task.total:,.0f}  {task.speed or 0:,.0f}/s  ETA {left}")


@contextmanager
def _surviving(stream: TextIO) -> Iterator[None]:
    """Continue if ``stream`` is a closed pipe or on a full disk, so that the exit code still shows the outcome."""
    try:
        yield
    except OSError as error:
        with Path(os.devnull).open("w") as nowhere:  # otherwise the buffered text fails again at exit
            os.dup2(nowhere.fileno(), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            with _surviving(sys.stderr):  # it may be on the same full disk
                click.echo(f"{stream.name}: {error.strerror}; the output is incomplete", err=True)


@attrs.define
class Output:
    """The output streams of a command."""

    as_json: bool = False
    _stdout: _Console = attrs.field(factory=_Console, init=False)
    _stderr: _Console = attrs.field(factory=lambda: _Console(stderr=True), init=False)

    def show(self, document: Mapping[str, Any], *parts: RenderableType, more: Iterable[str] = ()) -> None:
        """Print the result: ``document`` as one line of JSON if ``--json`` is given, else tables and lines of text.

        On a terminal a ``Text`` is wrapped between words. A ``str`` stays one line, so that it can be copied.
        """
        with _surviving(sys.stdout):
            self._print(document, *parts, more=more)

    def _print(self, document: Mapping[str, Any], *parts: RenderableType, more: Iterable[str] = ()) -> None:
        if self.as_json:
            click.echo(json.dumps(document))  # plain ASCII, readable in every terminal encoding
            return
        for part in chain(parts, more):
            if isinstance(part, str):
                click.echo(printable(part))  # much faster than Rich, for a million lines
            else:
                self._stdout.print(part, soft_wrap=isinstance(part, Text) and not self._stdout.is_terminal)

    @contextmanager
    def screen(self) -> Iterator[Callable[..., object]]:
        """Yield ``draw(document, *parts)``: redraw a terminal with ``parts``, else print like :meth:`show`."""
        with _surviving(sys.stdout):  # a closed pipe ends the block
            if self.as_json or not self._stdout.can_redraw:
                yield self._print
            else:
                with Live(console=self._stdout, auto_refresh=False) as live:
                    yield lambda _document, *parts: live.update(Group(*parts), refresh=True)

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        with _surviving(sys.stderr):
            self._stderr.print(printable(text), soft_wrap=not self._stderr.is_terminal)

    def interrupted(self, *parts: RenderableType, **facts: Any) -> int:
        """Print that the command was interrupted, with ``parts`` or, in JSON, ``facts``; return the exit code."""
        self.show({"outcome": INTERRUPTED.word, **facts}, *parts)
        self.note(INTERRUPTED.word)
        return INTERRUPTED.exit_code

    def confirm(self, file: str, facts: Mapping[str, Any], question: str) -> None:
        """Ask. Raises ``click.Abort`` at no, ``KeyboardInterrupt`` at Ctrl-C, a usage error if there is no terminal."""
        if file == "-" or sys.stdin is None or not sys.stdin.isatty():
            raise click.UsageError("no terminal to ask for confirmation: use --yes or --dry-run; nothing was sent")
        self._stderr.print(*tables({"": {"file": file, **facts}}))
        try:
            is_confirmed = click.confirm(question, err=True)
        except click.Abort:  # click's error for Ctrl-C and Ctrl-D
            click.echo(err=True)  # end the line of the prompt
            raise KeyboardInterrupt from None
        if not is_confirmed:
            raise click.Abort

    def failure(self, error: LianLianError | OSError) -> int:
        """Print an error and advice: JSON on stdout with ``--json``, else text on stderr; return the exit code."""
        if isinstance(error, OSError):  # such as a folder that the user may not enter
            error = LianLianError(str(error))
        outcome = exit_outcome_of(error)
        if self.as_json:
            self.show(error_document(error))
            return outcome.exit_code
        problems = error.problems if isinstance(error, InvalidRequest) else ()
        self.note(f"{outcome.word}: {'nothing was sent' if problems else error}")
        for problem in problems:
            self.note(f"  {problem}")
        if isinstance(error, RefundOutcomeUnknown):
            self.note(f"query it with: {query_command(error.query())}")
        return outcome.exit_code

    @contextmanager
    def progress(self, total: int, status: Callable[[], RenderableType]) -> Iterator[Callable[..., object]]:
        """Show a bar with ``status`` below it if stderr is a terminal. Yield a function to call after each step.

        Notes appear above the bar. A call with a new total adds no step; if there is no bar, it prints a line.
        """
        # The bar is green: yellow marks unknown refunds, red all others that were not made.
        bar = BarColumn(20, complete_style="green", pulse_style="green")
        progress = Progress(bar, _Pace(), console=self._stderr)
        progress.add_task("", total=total)
        [task] = progress.tasks
        live = Live(get_renderable=lambda: Group(progress, status()), console=self._stderr, transient=True)

        def step(total: int | None = None) -> None:
            progress.update(task.id, advance=total is None)
            if total is not None:
                task.total, task.finished_time = total, None  # update(total=) would forget the speed
                if not live.is_started:
                    self.note(f"{_Pace().render(task)}  {status()}")

        if self._stderr.can_redraw:
            with _surviving(sys.stderr):
                self._stderr.show_cursor(False)  # if `start` failed to do this, Rich would be in a broken state
            live.start(refresh=True)
        try:
            yield step
        finally:
            with _surviving(sys.stderr):  # the terminal may have disappeared
                live.stop()


def printable(text: str) -> str:
    """Escape the control characters of ``text``, so that a message cannot control the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def local_time(moment: datetime) -> str:
    """Format a moment in the local time zone, with its UTC offset."""
    return moment.astimezone().isoformat(sep=" ", timespec="seconds")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Return a table with wrapped long values, and ``-`` for None; without column names it has no header."""
    drawn = Table(title=printable(title), title_justify="left", show_header=any(columns), min_width=len(title))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        cells = ("-" if cell is None else _FORMS.get(type(cell), "{}").format(cell) for cell in row)
        drawn.add_row(*map(printable, cells))
    return drawn


def tables(parts: Mapping[str, Mapping[str, object]]) -> Iterator[Table]:
    """Yield a table of names and values for each part of a JSON document; skip None values and empty parts."""
    for title, part in parts.items():
        if rows := [(name.replace("_", " "), value) for name, value in part.items() if value is not None]:
            yield table(title, ("", ""), rows)


def query_command(query: RefundQuery) -> str:
    """Return the command line that queries a refund."""
    options = (f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in query.to_dict().items())
    return f"lianlian query {' '.join(options)}"


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Convert ``OSError`` to a ``LianLianError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise LianLianError(f"{path}: {error.strerror}") from error


@contextmanager
def line_writer(
    path: Path, columns: Iterable[str], delimiter: str = ","
) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Replace ``path``; yield a function that writes one line: CSV if the name ends in .csv, else JSON Lines.

    Values not in ``columns`` are omitted. CSV starts with a byte order mark, so that Excel reads UTF-8. Cells that a
    spreadsheet would run as formulas are escaped: https://owasp.org/www-community/attacks/CSV_Injection
    """
    names = list(columns)
    is_csv = path.suffix.lower() == ".csv"
    encoding = "utf-8-sig" if is_csv else "utf-8"

    @file_errors(path)
    def write(line: Mapping[str, Any]) -> None:
        if is_csv:
            csv.writer(file, delimiter=delimiter).writerow([_no_formula(line.get(name)) for name in names])
        else:
            file.write(json.dumps({name: line.get(name) for name in names}, ensure_ascii=False) + "\n")

    with file_errors(path):
        file = path.open("w", encoding=encoding, errors="backslashreplace", newline="")
    try:
        if is_csv:
            write(dict(zip(names, names, strict=True)))
        yield write
    finally:
        with file_errors(path):
            file.close()


def _no_formula(value: object) -> object:
    """Escape a cell that a spreadsheet would run as a formula: a leading apostrophe marks text."""
    is_formula = isinstance(value, str) and value.startswith(_FORMULA) and not _NEGATIVE.fullmatch(value)
    return f"'{value}" if is_formula else value
