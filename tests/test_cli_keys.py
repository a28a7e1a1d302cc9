"""``lianlian keygen``: key files, their permissions, and the output."""

import stat

import pytest

from lianlian_async.errors import ConfigurationError
from lianlian_async.signing import SigningKey, VerifyingKey
from tests.support.command import run

KEYGEN = ("keygen", "--bits", "1024")


def test_keygen_writes_the_pair_and_prints_the_public_key(tmp_path):
    """The private key has mode 0600, and the output is the public key for LianLian's dashboard."""
    ended = run(*KEYGEN, "--out", tmp_path)
    assert ended.exit_code == 0
    private, public = tmp_path / "merchant.pem", tmp_path / "merchant.pub.pem"
    key = SigningKey.load(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert ended.stdout == key.public_key().to_base64() + "\n"
    assert VerifyingKey.load(public).fingerprint == VerifyingKey.load(ended.stdout).fingerprint == key.fingerprint
    assert key.fingerprint in ended.stderr
    assert private.read_text()[100:160] not in ended.stdout + ended.stderr


def test_keygen_out_names_the_private_key(tmp_path):
    """--out can name the private key's file; --json has both files, fingerprint and public key."""
    ended = run(*KEYGEN, "--out", tmp_path / "shop", "--json")
    key = SigningKey.load(tmp_path / "shop")
    assert ended.json == {
        "private_key": str(tmp_path / "shop"),
        "public_key": str(tmp_path / "shop.pub"),
        "fingerprint": key.fingerprint,
        "public_key_base64": key.public_key().to_base64(),
    }
    assert ended.stderr == ""


@pytest.mark.parametrize("taken", ["merchant.pem", "merchant.pub.pem"])
@pytest.mark.parametrize("dangling", [False, True])
def test_keygen_never_overwrites_a_file(tmp_path, taken, dangling):
    """If one of the files exists, even as a dangling link, nothing is written."""
    if dangling:
        (tmp_path / taken).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / taken).write_text("precious")
    ended = run(*KEYGEN, "--out", tmp_path)
    assert ended.exit_code == 2
    assert "exists already" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_keygen_names_a_missing_folder(tmp_path):
    """The error names the path and the reason."""
    ended = run(*KEYGEN, "--out", tmp_path / "missing" / "key.pem")
    assert ended.exit_code == 2
    assert "key.pem: No such file or directory" in ended.stderr


def test_the_password_comes_from_the_environment(tmp_path):
    """--encrypt takes the password from the variable that also decrypts the key."""
    env = {"LIANLIAN_PRIVATE_KEY_PASSWORD": "correct horse"}
    ended = run(*KEYGEN, "--out", tmp_path, "--encrypt", env=env)
    assert ended.exit_code == 0
    assert SigningKey.load(tmp_path / "merchant.pem", "correct horse").bits == 1024
    with pytest.raises(ConfigurationError, match="encrypted"):
        SigningKey.load(tmp_path / "merchant.pem")


def test_password_prompt_shows_nothing(tmp_path):
    """The prompt asks twice on stderr, and shows no typed character."""
    ended = run(*KEYGEN, "--out", tmp_path, "--encrypt", stdin="correct horse\ncorrect horse\n")
    assert ended.exit_code == 0
    assert "correct horse" not in ended.stdout + ended.stderr
    assert SigningKey.load(tmp_path / "merchant.pem", "correct horse").bits == 1024


def test_other_sizes_are_a_usage_error(tmp_path):
    """Only three key sizes are allowed."""
    assert run("keygen", "--bits", "3072", "--out", tmp_path).exit_code == 2
