"""What several commands read: the merchant from the environment or a file, and a message in JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click

from lianlian_async import wire
from lianlian_async.errors import MalformedMessage
from lianlian_async.merchant import Merchant

__all__ = ["Command", "config_option", "file_argument", "load_merchant", "read_message"]

Command = TypeVar("Command", bound=Callable[..., Any])
"""What an option decorates."""

config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The merchant's TOML file, instead of the LIANLIAN_ variables of the environment.",
)


def load_merchant(config: Path | None) -> Merchant:
    """The merchant of ``--config`` or of the environment; raises ``ConfigurationError``."""
    return Merchant.from_env() if config is None else Merchant.from_toml(config)


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
