"""What several commands read: the merchant from the environment or a file, and a message in JSON."""

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

__all__ = [
    "SIGNATURE_FIELDS",
    "Command",
    "check_partner",
    "config_option",
    "file_argument",
    "load_merchant",
    "make_session",
    "read_message",
    "session_options",
]

Command = TypeVar("Command", bound=Callable[..., Any])
"""What an option decorates."""

# What the session adds by itself. LianLian's sample requests spell one of them with a trailing blank.
SIGNATURE_FIELDS: Final = ("sign_type", "sign_type ", "sign")

config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The merchant's TOML file, instead of the LIANLIAN_ variables of the environment.",
)


def load_merchant(config: Path | None) -> Merchant:
    """The merchant of ``--config`` or of the environment; raises ``ConfigurationError``."""
    return Merchant.from_env() if config is None else Merchant.from_toml(config)


def session_options(command: Command) -> Command:
    """The options that :func:`make_session` takes."""
    grace = RetryPolicy().not_found_grace
    for option in (
        click.option(
            "--not-found-grace",
            type=click.FloatRange(min=0),
            default=grace,
            help="Seconds until the gateway's 'no such record' is believed; less only if you know that it refuses "
            "a second refund under one number.",
        ),
        click.option(
            "--deadline", type=click.FloatRange(min=0, min_open=True), default=30.0, help="Seconds for one refund."
        ),
        click.option("--concurrency", type=click.IntRange(1, 10_000), default=20, help="Refunds at the same time."),
    ):
        command = option(command)
    return command


def make_session(
    merchant: Merchant,
    *,
    journal: Journal,
    concurrency: int,
    deadline: float,
    not_found_grace: float,
    query_first: bool = False,
) -> RefundSession:
    """A session, to be opened, as :func:`session_options` say."""
    policy = RetryPolicy(not_found_grace=not_found_grace)
    return RefundSession(
        merchant,
        journal=journal,
        max_connections=concurrency,
        deadline=deadline,
        retry=policy,
        query_first=query_first,
    )


def file_argument(*, required: bool) -> Callable[[Command], Command]:
    """The argument FILE; ``-`` is stdin."""
    return click.argument("file", type=click.File("rb"), required=required)


def read_message(file: BinaryIO) -> dict[str, str]:
    """The fields of a JSON message; what is no message is a usage error."""
    try:
        # One byte more than allowed tells that it is too long.
        return wire.decode(file.read(wire.MAX_MESSAGE_BYTES + 1).removeprefix(b"\xef\xbb\xbf"))
    except MalformedMessage as error:
        raise click.BadParameter(str(error), param_hint="FILE") from None


def check_partner(oid_partner: str, merchant: Merchant) -> None:
    """Raise ``InvalidRequest`` if what names ``oid_partner`` speaks of another merchant."""
    if oid_partner != merchant.oid_partner:
        rule = f"must be the configured merchant's, {merchant.oid_partner}"
        raise InvalidRequest([Problem("oid_partner", rule, repr(oid_partner))])
