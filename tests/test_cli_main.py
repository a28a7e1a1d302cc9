"""The command as such: its name, its extra, its exit codes."""

import inspect
import runpy
import sys

import pytest

from lianlian_async import __version__, errors
from lianlian_async.cli import main
from lianlian_async.cli.exit_codes import EXIT_OUTCOMES, error_document, exit_outcome_of
from lianlian_async.errors import LianLianError
from lianlian_async.signing import BACKEND
from tests.support.command import end, run, start


@pytest.mark.parametrize("sender", ["httpx", "aiohttp"])
def test_the_version_names_what_signs_and_what_sends(sender):
    """--version tells the release, the signing backend and the HTTP stack."""
    shown = run("--version", env={"LIANLIAN_HTTP_BACKEND": sender}).stdout
    assert shown == f"lianlian-async {__version__} (signs with {BACKEND}, sends with {sender})\n"


def test_the_version_of_a_wrong_configuration_is_a_usage_error():
    """--version says what is wrong with a backend that does not exist, and exits with 2."""
    ended = run("--version", env={"LIANLIAN_HTTP_BACKEND": "carrier pigeon"})
    assert ended.exit_code == 2
    assert "LIANLIAN_HTTP_BACKEND: must be httpx or aiohttp" in ended.stderr


@pytest.mark.parametrize("command", ["apply", "query", "batch", "worker", "verify", "keygen", "sandbox", "demo"])
def test_every_command_explains_itself_and_can_speak_json(command):
    """-h shows what a command does; each of them has --json."""
    ended = run(command, "-h")
    assert ended.exit_code == 0
    assert "--json" in ended.stdout


def test_the_exit_codes_stand_in_the_help():
    """Who writes a script around it finds the codes by --help."""
    assert "4 outcome unknown" in " ".join(run("--help").stdout.split())


def test_the_module_is_the_command():
    """``python -m lianlian_async`` runs it."""
    ended = end(start("--version"))
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.startswith("lianlian-async ")


def test_the_module_runs_only_as_the_program(monkeypatch, capsys):
    """A child process that imports the main module again does not run the command again."""
    monkeypatch.setattr(sys, "argv", ["lianlian", "--version"])
    runpy.run_module("lianlian_async", run_name="__mp_main__")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("lianlian_async", run_name="__main__")
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.fixture
def fresh(monkeypatch):
    """The command's modules are not imported yet."""
    for name in [name for name in sys.modules if name.startswith("lianlian_async.cli.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("package", ["click", "rich", "uvicorn"])
def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, package):
    """Without the packages of its extra the command says what to install, and exits with 2."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"lianlian needs {package}: pip install 'lianlian-async[cli]'\n"


@pytest.mark.usefixtures("fresh")
def test_any_other_missing_module_is_a_bug_and_shown_as_one(monkeypatch):
    """Only the extra's own packages are explained away."""
    monkeypatch.setitem(sys.modules, "lianlian_async.session", None)
    with pytest.raises(ModuleNotFoundError, match="session"):
        main()


def every(cls):
    """``cls`` and all of its public subclasses in the error tree."""
    tree = [cls, *(found for child in cls.__subclasses__() for found in every(child))]
    return [found for found in tree if found.__module__ == errors.__name__ and not found.__name__.startswith("_")]


def test_every_error_of_the_tree_has_an_ending():
    """No error of the public tree is left to chance, and all exit codes are the documented ones."""
    assert set(every(LianLianError)) == set(EXIT_OUTCOMES)
    assert {name for name, _ in inspect.getmembers(errors, inspect.isclass)} >= {cls.__name__ for cls in EXIT_OUTCOMES}
    assert {ending.exit_code for ending in EXIT_OUTCOMES.values()} == {1, 2, 3, 4, 5}


def test_an_error_without_a_row_ends_as_its_parent():
    """An error of a higher floor is at least an error."""

    class HigherError(LianLianError):
        pass

    assert exit_outcome_of(HigherError()) == EXIT_OUTCOMES[LianLianError]
    assert error_document(HigherError("full")) == {
        "outcome": "error",
        "error": {"type": "HigherError", "message": "full"},
    }
