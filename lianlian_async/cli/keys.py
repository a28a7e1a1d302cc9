"""``lianlian keygen``: generate a merchant's key pair. Files with secrets are readable by their owner only."""

import os
from pathlib import Path

import click

from lianlian_async.errors import ConfigurationError
from lianlian_async.secret import without_locals
from lianlian_async.signing import SigningKey

from .commands import PASSWORD
from .output import Output


@without_locals
def keygen(output: Output, /, bits: str, out: Path, encrypt: bool) -> None:
    private = out / "merchant.pem" if out.is_dir() else out
    public = private.with_suffix(".pub" + private.suffix)
    refuse_existing(private, public)
    password: str | None = None
    if encrypt:
        password = os.environ.get(PASSWORD) or click.prompt(
            "Password", hide_input=True, confirmation_prompt=True, err=True
        )
    key = SigningKey.generate(int(bits))
    write_new(private, key.to_pem(password))
    write_new(public, key.public_key().to_pem(), mode=0o644)
    base64 = key.public_key().to_base64()
    names = {"private_key": str(private), "public_key": str(public), "fingerprint": key.fingerprint}
    if not output.as_json:
        for name, text in names.items():
            output.note(f"{name}: {text}")
    output.show({**names, "public_key_base64": base64}, base64)


def refuse_existing(*paths: Path) -> None:
    """Raise ``ConfigurationError`` if one of ``paths`` exists."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigurationError(f"{path}: exists already; remove it or choose another name")


@without_locals
def write_new(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write a new file; raises ``ConfigurationError`` if it exists or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
