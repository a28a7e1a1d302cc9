"""``lianlian keygen``: generate a merchant's key pair."""

from __future__ import annotations

import os
from pathlib import Path

import click

from lianlian_async.errors import ConfigurationError
from lianlian_async.secret import without_locals
from lianlian_async.signing import SigningKey

from .output import Output, json_option, pass_output
from .secret_files import refuse_existing, write_new


@click.command
@click.option("--bits", type=click.Choice(["1024", "2048", "4096"]), default="2048", help="Size of the key.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="File for the private key, or a folder for merchant.pem.",
)
@click.option(
    "--password-env", metavar="NAME", help="Encrypt the private key with the password in this environment variable."
)
@click.option("--password-prompt", is_flag=True, help="Ask for a password and encrypt the private key with it.")
@json_option
@pass_output
@without_locals
def keygen(output: Output, bits: str, out: Path, password_env: str | None, password_prompt: bool) -> None:
    """Generate a key pair for LianLian's dashboard.

    The public key is printed in the form that the dashboard accepts. The private key is written with mode 0600, and
    the public key beside it. Existing files are never replaced.
    """
    private = out / "merchant.pem" if out.is_dir() else out
    public = private.with_suffix(".pub" + private.suffix)
    refuse_existing(private, public)
    password = _password(password_env, prompt=password_prompt)
    key = SigningKey.generate(int(bits))
    write_new(private, key.to_pem(password))
    write_new(public, key.public_key().to_pem(), mode=0o644)
    base64 = key.public_key().to_base64()
    names = {"private_key": str(private), "public_key": str(public), "fingerprint": key.fingerprint}
    if not output.as_json:
        for name, text in names.items():
            output.note(f"{name}: {text}")
    output.show({**names, "public_key_base64": base64}, base64)


def _password(variable: str | None, *, prompt: bool) -> str | None:
    if variable is not None:
        password = os.environ.get(variable)
        if not password:
            raise ConfigurationError(f"--password-env: the variable {variable} is not set")
        return password
    if prompt:
        entered: str = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        return entered
    return None
