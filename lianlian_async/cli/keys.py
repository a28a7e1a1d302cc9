"""``lianlian keygen``: generate a merchant's key pair."""

import os
from pathlib import Path

import click

from lianlian_async.secret import without_locals
from lianlian_async.signing import SigningKey

from .commands import PASSWORD
from .output import Output
from .secret_files import refuse_existing, write_new


@without_locals
def keygen(output: Output, /, bits: str, out: Path, encrypt: bool) -> None:
    """Run ``lianlian keygen``."""
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
