"""The command's output with other encodings, closed pipes and full disks."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lianlian_async import LianLianError
from lianlian_async.cli import main
from lianlian_async.cli.output import Output, line_writer, table
from lianlian_async.cli.sandbox.server import environment, serving
from tests.support import command
from tests.support.batches import refund, write_csv
from tests.support.command import ROOT

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def env(gateway, tmp_path):
    """The environment of the served gateway and of a journal."""
    with serving(gateway) as url:
        yield environment(gateway, url) | {"LIANLIAN_JOURNAL": str(tmp_path / "journal.sqlite")}


@pytest.fixture
def file(tmp_path):
    """Two refunds, one of which is rejected."""
    return write_csv(tmp_path / "退款.csv", [refund(1, no_order="订单-1"), refund(2, money_refund="1000.01")])


def start(*arguments, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """Run the command as a process whose output is bytes."""
    full = {name: text for name, text in os.environ.items() if not name.startswith("LIANLIAN_")} | env
    full |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "lianlian_async", *map(str, arguments)]
    return subprocess.Popen(command, env=full, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


@pytest.fixture(params=["ascii", "gbk", "C locale"])
def run(request, monkeypatch):
    """Run the command with streams of this encoding; return the exit code, stdout and stderr.

    Only a new process can have another locale.
    """

    def in_c_locale(*arguments, env):
        process = start(*arguments, env=env | C_LOCALE)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def in_this_process(*arguments, env):
        written = io.BytesIO(), io.BytesIO()
        for name, file in zip(("stdout", "stderr"), written, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(file, request.param, write_through=True))
        return called(*arguments, env=env, monkeypatch=monkeypatch), *(file.getvalue() for file in written)

    return in_c_locale if request.param == "C locale" else in_this_process


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_batch_ends_with_its_own_exit_code_in_every_encoding(run, env, gateway, file, more):
    """The exit code is 3 without a traceback, although Chinese text is shown."""
    exit_code, _, stderr = run("batch", file, "--yes", *more, env=env)
    assert (exit_code, b"Traceback" in stderr) == (3, False)
    assert gateway.times_made("R-1") == 1


def test_made_refund_exits_0_in_every_encoding(run, env, request):
    """The gateway's Chinese ret_msg is shown with the characters of the encoding."""
    options = (option for name, text in refund(1).items() for option in (f"--{name.replace('_', '-')}", text))
    exit_code, stdout, stderr = run("apply", *options, env=env)
    assert (exit_code, stderr) == (0, b"")
    expected = "交易成功".encode("gbk") if "gbk" in request.node.name else b"\\u4ea4"
    assert expected in stdout
    assert b"+---" in stdout  # a table drawn in ASCII


@pytest.mark.parametrize("arguments", [("--help",), ("batch", "--help"), ("batch", "没有.csv")])
def test_help_and_usage_errors_survive_every_encoding(run, arguments):
    """Help exits with 0, a usage error with 2."""
    exit_code, _, stderr = run(*arguments, env={})
    assert (exit_code, b"Traceback" in stderr) == (0 if "--help" in arguments else 2, False)


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("both", [False, True])
def test_closed_pipe_keeps_the_exit_code(env, gateway, file, more, both):
    """A closed pipe on stdout, or on both streams, causes no traceback; the exit code is still 3.

    The first line of stderr is the note that the journal is new.
    """
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        stderr = pipe if both else subprocess.PIPE
        process = start("batch", file, "--yes", *more, env=env, stdout=pipe, stderr=stderr)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told and told.splitlines()[1:]) == (3, None if both else [])
    assert gateway.times_made("R-1") == 1


def test_disappeared_terminal_keeps_the_outcome(env, file):
    """The outcome is printed on stdout, although the progress bar cannot be drawn."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as terminal:
        process = start(
            *("batch", file, "--yes", "--query-first", "--json"),  # the bar is the first output on stderr
            env=env | {"FORCE_COLOR": "1", "TERM": "xterm"},
            stderr=terminal,
        )
        stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(stdout)["outcome"]) == (3, "rejected")


def test_closed_stdout_keeps_the_exit_code(env, gateway, file):
    """``>&-`` prints nothing."""
    shell = '"$0" -m lianlian_async batch "$1" --yes >&-'
    full = dict(os.environ) | env | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    ended = subprocess.run(
        ["/bin/sh", "-c", shell, sys.executable, file], env=full, stderr=subprocess.PIPE, check=False
    )
    assert (ended.returncode, ended.stderr.splitlines()[1:]) == (3, [])
    assert gateway.times_made("R-1") == 1


def stdout_is(monkeypatch, path_or_descriptor):
    stream = open(path_or_descriptor, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - it may be a descriptor
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_pipe_closed_while_printing_keeps_the_exit_code(nowhere, file, monkeypatch, capsys, more):
    """Text that could not be printed is not printed at exit either."""
    reader, writer = os.pipe()
    os.close(reader)
    with stdout_is(monkeypatch, writer):
        assert called("batch", file, "--dry-run", *more, env=nowhere, monkeypatch=monkeypatch) == 0
    assert "incomplete" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
def test_full_disk_under_stdout_is_noted(nowhere, file, monkeypatch, capsys):
    """The exit code shows the outcome, and stderr says that the output is incomplete."""
    with stdout_is(monkeypatch, "/dev/full"):
        assert called("batch", file, "--dry-run", env=nowhere, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err.endswith("/dev/full: No space left on device; the output is incomplete\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
@pytest.mark.parametrize(("more", "exit_code"), [(("--yes",), 3), (("--yes", "--json"), 3), (("--json",), 2)])
def test_full_disk_under_both_streams_keeps_the_exit_code(env, gateway, file, more, exit_code):
    """Also the note that the output is incomplete may be lost."""
    with Path("/dev/full").open("wb") as full:
        process = start("batch", file, "--query-first", *more, env=env, stdout=full, stderr=full)
        process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert gateway.times_made("R-1") == ("--yes" in more)


@pytest.fixture
def nowhere(gateway, tmp_path):
    """The environment of a gateway that is not served, and of a new journal."""
    return environment(gateway, "http://127.0.0.1:9") | {"LIANLIAN_JOURNAL": str(tmp_path / "journal.sqlite")}


def called(*arguments, env, monkeypatch):
    """Run the command in this process with its current streams; return the exit code."""
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(sys, "argv", ["lianlian", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_program_without_standard_streams(monkeypatch):
    """With closed descriptors Python has no streams, and the command still runs."""
    monkeypatch.setattr(sys, "stdout", None)
    assert called("--help", env={}, monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("batch", "-", "--dry-run"), "FILE - is stdin, but stdin is closed"),
        (("verify", "-"), "FILE - is stdin, but stdin is closed"),
        (("batch", "退款.csv"), "no terminal to ask for confirmation: use --yes or --dry-run; nothing was sent"),
    ],
    ids=repr,
)
def test_closed_stdin_is_a_usage_error(nowhere, file, monkeypatch, capsys, arguments, problem):
    """A command that needs stdin says that it is closed."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.chdir(file.parent)
    assert called(*arguments, env=nowhere, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.endswith(f"Error: {problem}\n")


def test_sentences_are_wrapped_between_words_on_a_terminal():
    """A terminal would break them in the middle of a word. In a pipe a sentence stays one line."""
    piped = command.run("help", "unknown").stdout
    shown = command.run("help", "unknown", env={"FORCE_COLOR": "1", "COLUMNS": "50"}).stdout
    assert shown.split() == piped.split()
    assert max(map(len, piped.splitlines())) > 80
    assert max(map(len, shown.splitlines())) <= 50


@pytest.mark.parametrize("no_color", ["1", ""])
def test_no_color_prints_no_escape_byte(no_color):
    """On a terminal, NO_COLOR suppresses colours, bold text and cursor movements; an empty variable does nothing."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": no_color}
    command = [sys.executable, "-m", "lianlian_async", "demo", "--refunds", "5", "--bits", "1024"]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # Linux reports EIO when the other side is closed
            while chunk := os.read(ours, 65536):
                shown += chunk
    os.close(ours)
    assert process.returncode == 0
    assert b"made" in shown
    assert (b"\x1b" in shown) is not bool(no_color)


def test_no_text_of_a_table_controls_the_terminal(capsys):
    """Control characters of a gateway's field are escaped, also in the title."""
    Output().show({}, table("refund R\x1b[2J", ("", ""), [("ret_msg", "\x1b[31m")]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"refund R\x1b[2J" in shown


# ── a file of lines ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["results.csv", "results.jsonl"])
def test_an_error_of_the_caller_is_not_an_error_of_the_file(tmp_path, name):
    """``TimeoutError`` is an ``OSError``: the writer closes the file and raises it unchanged."""

    def run_late():
        with line_writer(tmp_path / name, ["a", "b"]) as write:
            write({"a": 1, "b": "=2"})
            raise TimeoutError("too late")

    with pytest.raises(TimeoutError, match="too late"):
        run_late()
    assert "1" in (tmp_path / name).read_text("utf-8-sig")


@pytest.mark.parametrize("name", ["results.csv", "results.jsonl"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    """The error has the file's name and the reason."""
    path = tmp_path / "missing" / name
    with pytest.raises(LianLianError, match=f"{name}: No such file or directory"), line_writer(path, ["a"]):
        pass
