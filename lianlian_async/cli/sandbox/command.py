"""``lianlian sandbox``: the fake gateway on a socket, until it is told to stop."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import click

from lianlian_async import wire
from lianlian_async.cli.output import Output, json_option, pass_output
from lianlian_async.cli.secret_files import refuse_existing, write_new
from lianlian_async.errors import LianLianError
from lianlian_async.sandbox import Fault, Notifier, Repeated, SandboxGateway
from lianlian_async.sandbox.statement import statement
from lianlian_async.signing import SigningKey

from .server import environment, serving

__all__ = ["sandbox"]


_NAP: Final = 0.5
"""Seconds: a signal that comes in the very moment before a sleep ends it only when the sleep is over."""

_FAULTS: Final = {fault.value.replace(" ", "-"): fault for fault in Fault}


def _read_faults(_ctx: click.Context, _option: click.Parameter, values: Iterable[str]) -> dict[Fault, float]:
    faults = {}
    for value in values:
        name, _, probability = value.partition("=")
        try:
            faults[_FAULTS[name]] = float(probability)
        except KeyError:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(_FAULTS)}") from None
        except ValueError:
            raise click.BadParameter(f"{value!r} must be NAME=PROBABILITY, such as reset=0.1") from None
    return faults


def _read_money(_ctx: click.Context, _option: click.Parameter, value: str) -> Decimal:
    try:
        return wire.parse_money(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command
@click.option("--host", default="127.0.0.1", help="The address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The port to listen at; 0 takes a free one.")
@click.option(
    "--env-file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("lianlian-sandbox.env"),
    help="Where to write the LIANLIAN_ variables; it must not exist, and is removed at the end.",
)
@click.option("--keys", type=click.Path(file_okay=False, path_type=Path), help="A directory to keep the keys in.")
@click.option("--oid-partner", default="201103171000000000", help="The merchant's number.")
@click.option(
    "--repeated",
    type=click.Choice([repeated.value for repeated in Repeated]),
    default=Repeated.REJECT.value,
    help="What a second application under one no_refund meets.",
)
@click.option(
    "--fault", "faults", metavar="NAME=P", multiple=True, callback=_read_faults, help=f"One of {', '.join(_FAULTS)}."
)
@click.option("--seed", type=int, default=0, help="Where the dice that throw the faults start.")
@click.option("--settle-after", type=click.FloatRange(min=0), default=2.0, help="Seconds until a refund is final.")
@click.option("--default-order", default="10000.00", callback=_read_money, help="What every order is worth, in yuan.")
@click.option(
    "--notify",
    metavar="[URL]",
    is_flag=False,
    flag_value="http://127.0.0.1:8000/lianlian/refund",
    help="Notify of final refunds as LianLian does; URL (else port 8000 here) is for requests that name none.",
)
@click.option(
    "--statement",
    "statement_file",
    type=click.Path(path_type=Path),
    help="Where to write, at the end, LianLian's statement of what has succeeded; in a folder it gets LianLian's name.",
)
@json_option
@pass_output
def sandbox(
    output: Output,
    /,
    *,
    host: str,
    port: int,
    env_file: Path,
    keys: Path | None,
    repeated: str,
    notify: str | None,
    statement_file: Path | None,
    **options: Any,
) -> None:
    """Serve a fake of LianLian's gateway, until SIGINT or SIGTERM. No money is anywhere near it.

    A file with the LIANLIAN_ variables of a merchant that it knows makes it reachable for this command and for
    every program that uses Merchant.from_env().
    """
    refuse_existing(env_file)
    gateway = SandboxGateway(repeated=Repeated(repeated), **_kept_keys(keys), **options)
    app: SandboxGateway | Notifier = gateway
    settings = {}
    if notify is not None:
        app = Notifier(gateway, on_delivery=lambda delivery: output.note(str(delivery)))
        settings = {"notify_url": notify}
    with (
        _statement_at_the_end(gateway, statement_file),
        _until_told_to_stop(),
        serving(app, host, port) as url,
        _written(env_file, environment(gateway, url, **settings)),
    ):
        path = env_file.absolute()
        output.show(
            {"url": url, "env_file": str(path)},
            f"sandbox gateway at {url}",
            f"use it:  set -a; . {shlex.quote(str(path))}; set +a",
        )
        while True:
            time.sleep(_NAP)


def _kept_keys(directory: Path | None) -> dict[str, Any]:
    """The keys in ``directory``, made there if they are missing; none at all leaves them to the gateway."""
    if directory is None:
        return {}
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = {}
    for name in ("merchant", "gateway"):
        path = directory / f"{name}.pem"
        if not path.exists():
            write_new(path, SigningKey.generate().to_pem())
        keys[f"{name}_key"] = SigningKey.load(path, name=str(path))
    return keys


@contextmanager
def _statement_at_the_end(gateway: SandboxGateway, file: Path | None) -> Iterator[None]:
    yield
    if file is not None:
        name = f"JYMX_{gateway.oid_partner}_{wire.format_timestamp(gateway.time_of_day())[:8]}.txt"
        gateway.advance(86_400.0)  # what is under way arrives and settles
        try:
            (file / name if file.is_dir() else file).write_text(statement(gateway), "utf-8")
        except OSError as error:
            raise LianLianError(f"{file}: {error.strerror}") from error


@contextmanager
def _until_told_to_stop() -> Iterator[None]:
    """SIGINT and SIGTERM, at whatever moment, end the block and nothing else."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _written(env_file: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """The environment file, as long as it leads anywhere."""
    lines = (f"{name}={shlex.quote(text)}\n" for name, text in variables.items())
    write_new(env_file, "".join(lines))
    try:
        yield
    finally:
        env_file.unlink(missing_ok=True)
