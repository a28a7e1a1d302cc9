"""What the user sees: results on stdout, as tables or as one JSON object, and everything else on stderr."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

import attrs
import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lianlian_async.errors import InvalidRequest, LianLianError, RefundOutcomeUnknown
from lianlian_async.models import RefundQuery

from .exit_codes import error_document, exit_outcome_of

__all__ = ["Output", "json_option", "pass_output", "printable", "query_command", "table"]


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Raise, as Rich itself would exit with code 1, whatever the outcome was."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def _console(*, stderr: bool = False) -> Console:
    # Rich draws in ASCII only if it is given the stream and so its encoding. What came over the wire is never markup.
    file = sys.stderr if stderr else sys.stdout
    return _Console(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def _surviving(stream: TextIO) -> Iterator[None]:
    """Go on where ``stream`` is a closed pipe or a full disk: the exit code still tells the outcome."""
    try:
        yield
    except OSError as error:
        with Path(os.devnull).open("w") as nowhere:  # else what is buffered would fail again when the process exits
            os.dup2(nowhere.fileno(), stream.fileno())
        if not isinstance(error, BrokenPipeError):
            click.echo(f"{stream.name}: {error.strerror}; the output is incomplete", err=True)


@attrs.define
class Output:
    """Where a command's words go."""

    as_json: bool = False

    def show(self, document: Mapping[str, Any], *renderings: RenderableType) -> None:
        """The result: ``document`` in one line of JSON, or ``renderings`` (tables, lines of text) for people."""
        with _surviving(sys.stdout):
            if self.as_json:
                click.echo(json.dumps(document))  # plain ASCII: no terminal and no code page can spoil it
                return
            for rendering in renderings:
                if isinstance(rendering, str):
                    _console().print(printable(rendering), soft_wrap=True)
                else:
                    _console().print(rendering)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        with _surviving(sys.stderr):
            _console(stderr=True).print(printable(text), soft_wrap=True)

    def failure(self, error: LianLianError) -> None:
        """What went wrong, and what can be done: JSON on stdout if that is asked for, else words on stderr."""
        if self.as_json:
            self.show(error_document(error))
            return
        word = exit_outcome_of(error).word
        if isinstance(error, InvalidRequest):
            self.note(f"{word}: nothing was sent")
            for problem in error.problems:
                self.note(f"  {problem}")
        else:
            self.note(f"{word}: {error}")
        if isinstance(error, RefundOutcomeUnknown):
            self.note(f"ask with: {query_command(error.query())}")

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[], object]]:
        """A progress bar on stderr, silent unless that is a terminal; call what it yields for each step."""
        with self.live(description, total) as advance:
            yield lambda: advance(description)

    @contextmanager
    def live(self, description: str, total: int) -> Iterator[Callable[[str], object]]:
        """As :meth:`progress`; each step says how things stand, and how long the rest will take is shown."""
        console = _console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(description, total=total)
            yield lambda description: progress.update(task, advance=1, description=description)


def _set_json(ctx: click.Context, _option: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Output).as_json = value


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_set_json, help="Print one JSON object on stdout."
)
pass_output = click.make_pass_decorator(Output, ensure=True)


def printable(text: str) -> str:
    """``text`` with control characters escaped: a message must not steer the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A small table; long values are folded, never cut."""
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(printable(str(cell)) for cell in row))
    return drawn


def query_command(query: RefundQuery) -> str:
    """The command line that asks about a refund."""
    options = (f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in query.to_dict().items())
    return f"lianlian query {' '.join(options)}"
