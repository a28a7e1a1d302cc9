"""Options and arguments of several commands, and the functions that read their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import click

from lianlian_async import wire
from lianlian_async.errors import InvalidRequest, MalformedMessage, Problem
from lianlian_async.journal import Journal
from lianlian_async.merchant import Merchant
from lianlian_async.retry import RetryPolicy
from lianlian_async.session import RefundSession

Command = TypeVar("Command", bound=Callable[..., Any])
"""A command's function, which options decorate."""

# The session adds these fields itself. LianLian's sample requests spell one of them with a trailing blank.
SIGNATURE_FIELDS: Final = ("sign_type", "sign_type ", "sign")

config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with the merchant; by default the LIANLIAN_ environment variables.",
)
deadline_option = click.option(
    "--deadline",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    help="Time limit for each refund.",
)
_concurrency_option = click.option(
    "--concurrency", metavar="NUMBER", type=click.IntRange(1, 10_000), default=20, help="Number of concurrent refunds."
)
_not_found_grace_option = click.option(
    "--not-found-grace",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=RetryPolicy().not_found_grace,
    help="Time until the gateway's answer 'no such record' is believed; less is safe only if the gateway rejects a "
    "second refund with the same no_refund.",
)


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a callback that converts ``ValueError`` and ``LookupError`` of ``parse`` to usage errors."""

    def callback(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except (ValueError, LookupError) as error:
            raise click.BadParameter(str(error)) from None

    return callback


def load_merchant(config: Path | None) -> Merchant:
    """Load the merchant from ``config`` or the environment; raises ``ConfigurationError``."""
    return Merchant.from_env() if config is None else Merchant.from_toml(config)


def session_options(command: Command) -> Command:
    """Add the options for :func:`make_session`."""
    return _concurrency_option(deadline_option(_not_found_grace_option(command)))


def make_session(
    merchant: Merchant, *, journal: Journal, concurrency: int, not_found_grace: float, **options: Any
) -> RefundSession:
    """Create a session with the values of :func:`session_options`, and with ``options`` of ``RefundSession``."""
    policy = RetryPolicy(not_found_grace=not_found_grace)
    return RefundSession(merchant, journal=journal, max_connections=concurrency, retry=policy, **options)


def file_argument(*, required: bool) -> Callable[[Command], Command]:
    """Add the argument FILE; ``-`` is stdin."""
    return click.argument("file", type=click.File("rb"), required=required)


def read_message(file: BinaryIO) -> dict[str, str]:
    """Read the fields of a JSON message; raises a usage error."""
    try:
        # Read one byte more than allowed, to detect a message that is too long.
        return wire.decode(file.read(wire.MAX_MESSAGE_BYTES + 1).removeprefix(b"\xef\xbb\xbf"))
    except MalformedMessage as error:
        raise click.BadParameter(str(error), param_hint="FILE") from None


def check_partner(oid_partner: str, merchant: Merchant) -> None:
    """Raise ``InvalidRequest`` if ``oid_partner`` is not the merchant's number."""
    if oid_partner != merchant.oid_partner:
        rule = f"must be the configured merchant's, {merchant.oid_partner}"
        raise InvalidRequest([Problem("oid_partner", rule, repr(oid_partner))])
