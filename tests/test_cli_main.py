"""The command group ``lianlian``: its name, its extra, its help, its exit codes."""

import ast
import errno
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import attrs
import click
import pytest

import lianlian_async
from lianlian_async import __version__, errors
from lianlian_async.cli import main
from lianlian_async.cli.app import lianlian
from lianlian_async.cli.exit_codes import EXIT_OUTCOMES, error_document, exit_outcome_of
from lianlian_async.cli.sandbox.options import FAULTS
from lianlian_async.errors import LianLianError
from lianlian_async.models import RefundQuery, RefundRequest, RefundStatus
from lianlian_async.retry import RetryPolicy
from lianlian_async.sandbox import Fault, Repeated
from lianlian_async.signing import BACKEND
from tests.support.command import end, run, start


@pytest.mark.parametrize("sender", ["httpx", "aiohttp"])
def test_version_names_signing_and_http_backend(sender):
    """--version shows the release, the signing backend and the HTTP backend."""
    shown = run("--version", env={"LIANLIAN_HTTP_BACKEND": sender}).stdout
    assert shown == f"lianlian-async {__version__} (signs with {BACKEND}, sends with {sender})\n"


def test_the_version_of_a_wrong_configuration_is_an_error():
    """--version names a backend that does not exist, and exits with 2."""
    ended = run("--version", env={"LIANLIAN_HTTP_BACKEND": "carrier pigeon"})
    assert ended.exit_code == 2
    assert "LIANLIAN_HTTP_BACKEND: must be httpx or aiohttp" in ended.stderr


@pytest.mark.parametrize(
    "command", ["apply", "query", "batch", "worker", "verify", "keygen", "sandbox", "demo", "help"]
)
def test_every_command_has_help_and_json(command):
    """-h shows what a command does, and every command has --json."""
    ended = run(command, "-h")
    assert ended.exit_code == 0
    assert "--json" in ended.stdout


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_version_as_json(arguments):
    """--json may stand before or after --version."""
    shown = run(*arguments, env={"LIANLIAN_HTTP_BACKEND": "httpx"}).json
    assert shown == {"version": __version__, "signs_with": BACKEND, "sends_with": "httpx"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("apply", "--json", "--nope"), "--nope"),
        (("--json", "nope"), "No such command 'nope'"),
        (("--nope", "--json"), "--nope"),
        (("help", "nope", "--json"), "'nope' is not one of 'unknown', 'journal', 'processes'"),
        (("worker", "--json", "--not-found-grace", "inf"), "inf is not in the range 0<=x<=1000000000"),
        (("worker", "--json", "--not-found-grace", "nan"), "'--not-found-grace': 'nan' is not a number"),
        (("worker", "--json", "--interval", "nan"), "'--interval': 'nan' is not a number"),
    ],
)
def test_usage_errors_as_json(arguments, message):
    """With --json a usage error is one JSON object on stdout, and the exit code is 2."""
    ended = run(*arguments)
    assert (ended.exit_code, ended.stderr, ended.json["outcome"]) == (2, "", "usage error")
    assert message in ended.json["error"]["message"]


@pytest.mark.parametrize("topic", ["unknown", "journal", "processes"])
def test_help_explains_a_topic(topic):
    """``help TOPIC`` explains one concept, ``help`` all of them, also as JSON before or after the command."""
    text = run("help", topic).stdout
    assert text.startswith(f"{topic}\n\n")
    assert text in run("help").stdout
    assert run("--json", "help", topic).json == run("help", topic, "--json").json
    assert run("help", topic, "--json").json[topic].splitlines() == text.splitlines()[2:]


def test_completion_lists_commands():
    """The completion that the README describes works."""
    completing = {"_LIANLIAN_COMPLETE": "bash_complete", "COMP_WORDS": "lianlian qu", "COMP_CWORD": "1"}
    assert end(start(env=completing)).stdout == "plain,query\n"


def test_help_lists_the_exit_codes():
    """--help lists the exit codes for scripts."""
    assert "4 some unknown" in " ".join(run("--help").stdout.split())


def test_the_module_is_the_command():
    """``python -m lianlian_async`` runs the command."""
    ended = end(start("--version"))
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("lianlian-async ")


def test_main_module_can_be_imported_without_running(monkeypatch, capsys):
    """A child process that imports the main module again does not run the command again."""
    monkeypatch.setattr(sys, "argv", ["lianlian", "--version"])
    file = Path(lianlian_async.__file__).with_name("__main__.py")  # pytest's import hook does not support runpy
    code = compile(file.read_text("utf-8"), file, "exec")
    exec(code, {"__name__": "__mp_main__", "__package__": "lianlian_async"})
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as caught:
        exec(code, {"__name__": "__main__", "__package__": "lianlian_async"})
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.fixture
def fresh(monkeypatch):
    """Forget the command's modules, so that they are imported again."""
    for name in [name for name in sys.modules if name.startswith("lianlian_async.cli.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("package", ["click", "rich", "uvicorn"])
def test_missing_package_of_the_extra_is_named(monkeypatch, capsys, package):
    """A missing package of the extra ``cli`` gives one line with the command that installs it, and exit code 2."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["lianlian", "sandbox"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"lianlian needs {package}: pip install 'lianlian-async[cli]'\n"


@pytest.mark.usefixtures("fresh")
def test_other_missing_module_is_raised(monkeypatch):
    """A missing module that is not part of the extra is a bug, and its traceback is shown."""
    monkeypatch.setitem(sys.modules, "lianlian_async.session", None)
    monkeypatch.setattr(sys, "argv", ["lianlian", "apply"])
    with pytest.raises(ModuleNotFoundError, match="session"):
        main()


def every_command(command=lianlian, path=()):
    """Yield the names of every command and group, each as a tuple."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, (*path, name))


def test_help_of_every_command_imports_no_slow_package():
    """``--help`` is fast: it imports click and light modules only. One new process shows the help of all commands."""
    check = "import sys; from lianlian_async.cli.app import lianlian; "
    check += "[lianlian([*path.split(), '--help'], standalone_mode=False) for path in sys.argv[1:]]; "
    check += "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    paths = list(map(" ".join, every_command()))
    arguments = [sys.executable, "-c", check, *paths]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert [line.split(" [")[0].strip() for line in shown.splitlines() if line.startswith("Usage: ")] == [
        f"Usage: -c {path}".strip() for path in paths
    ]
    slow = {"Crypto", "aiohttp", "anyio", "asyncio", "attr", "attrs", "cryptography", "httpx", "rich", "uvicorn"}
    assert slow.isdisjoint(ast.literal_eval(shown.splitlines()[-1]))


def test_declared_choices_and_defaults_are_those_of_the_library():
    """The declarations repeat values of modules that --help must not import."""
    options = {
        path: {option.name: option for option in command.params}
        for path in every_command()
        if (command := functools.reduce(lambda group, name: group.commands[name], path, lianlian))
    }
    assert list(options["apply",])[1:9] == [field.name for field in attrs.fields(RefundRequest)]
    assert set(list(options["query",])[1:5]) == {field.name for field in attrs.fields(RefundQuery)}
    assert options["worker",]["not_found_grace"].default == RetryPolicy().not_found_grace
    assert list(options["notify", "send"]["sta_refund"].type.choices) == [status.value for status in RefundStatus]
    assert list(options["sandbox",]["repeated"].type.choices) == [repeated.value for repeated in Repeated]
    assert [name.replace("-", " ") for name in FAULTS] == [fault.value for fault in Fault]


def test_help_has_the_first_line_of_each_command():
    """The list of commands shows the first line of each command's own help, and every command is in it."""
    context = click.Context(lianlian)
    commands = {name: lianlian.get_command(context, name) for name in lianlian.list_commands(context)}
    shown = " ".join(run("--help").stdout.split())
    for name, command in commands.items():
        assert f" {name} {command.help.splitlines()[0]}" in shown
    assert list(commands) == [command.name for command in commands.values()]


def test_unknown_command_is_a_usage_error():
    """A command that does not exist is named, with exit code 2."""
    ended = run("refund")
    assert (ended.exit_code, "No such command 'refund'" in ended.stderr) == (2, True)


def every(cls):
    """Return ``cls`` and all of its public subclasses."""
    tree = [cls, *(found for child in cls.__subclasses__() for found in every(child))]
    return [found for found in tree if found.__module__ == errors.__name__ and not found.__name__.startswith("_")]


def test_every_error_has_an_exit_outcome():
    """Every public error has its own entry, and every exit code is documented."""
    assert set(every(LianLianError)) == set(EXIT_OUTCOMES)
    assert {name for name, _ in inspect.getmembers(errors, inspect.isclass)} >= {cls.__name__ for cls in EXIT_OUTCOMES}
    assert {ending.exit_code for ending in EXIT_OUTCOMES.values()} == {1, 2, 3, 4, 5}


def test_unlisted_error_has_the_outcome_of_its_parent():
    """An error class without an entry has the exit outcome of its parent."""

    class HigherError(LianLianError):
        pass

    assert exit_outcome_of(HigherError()) == EXIT_OUTCOMES[LianLianError]
    assert error_document(HigherError("full")) == {
        "outcome": "error",
        "error": {"type": "HigherError", "message": "full"},
    }


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("keygen", "--out", TOO_LONG),
        ("explain", "R-1", "--journal", TOO_LONG),
        ("journal", "show", "--journal", TOO_LONG),
        ("sandbox", "--keys", TOO_LONG),
    ],
    ids=" ".join,
)
def test_an_error_of_the_operating_system_is_shown_without_a_traceback(arguments, tmp_path, monkeypatch):
    """For example, an operator may have no permission for the folder of a journal."""
    monkeypatch.chdir(tmp_path)
    ended = run(*arguments)
    assert (ended.exit_code, ended.stderr) == (
        1,
        f"error: [Errno {errno.ENAMETOOLONG}] File name too long: '{TOO_LONG}'\n",
    )
