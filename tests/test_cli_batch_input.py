"""The input of ``lianlian batch``, and the errors that it finds before anything is sent."""

import json
import os
from contextlib import closing
from pathlib import Path

import anyio
import click
import pytest

from lianlian_async import RefundRequest
from lianlian_async.cli.batch.checked import Checked, derived_number
from lianlian_async.cli.batch.rows import Row
from lianlian_async.cli.sandbox.server import environment
from lianlian_async.errors import LianLianError
from tests.support.batches import refund, url_of, write_csv, write_lines
from tests.support.command import on_a_terminal, run

OPTIONS = {
    "derive": False,
    "dt_refund": None,
    "read_date": None,
    "read_money": None,
    "renamed": {},
    "ignore_unknown": False,
}


@pytest.fixture(autouse=True)
def journal(tmp_path, monkeypatch):
    """The journal of all commands."""
    monkeypatch.setenv("LIANLIAN_JOURNAL", str(tmp_path / "journal.sqlite"))
    return tmp_path / "journal.sqlite"


@pytest.fixture
def nowhere(gateway):
    """The environment of a gateway that is not served."""
    return environment(gateway, "http://127.0.0.1:9")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "refunds.csv"


def problems(ended):
    """Return the invalid lines and their problems."""
    assert ended.exit_code == 2
    return [(problem["line"], problem["problem"]) for problem in ended.json["problems"]]


# ── what it reads ────────────────────────────────────────────────────────────────────────────────


def test_a_dry_run_counts_and_sends_nothing(nowhere, file, journal):
    """--dry-run counts refunds and yuan, and creates no journal."""
    write_csv(file, [refund(1), refund(2, money_refund="0.5"), refund(3, money_refund="1200")])
    people, machine = (run("batch", file, "--dry-run", *more, env=nowhere) for more in ((), ("--json",)))
    assert people.exit_code == machine.exit_code == 0
    assert people.stderr.startswith("this journal is new, so every refund counts as never sent")
    assert "│ refunds                     │ 3 " in people.stdout
    assert "│ yuan                        │ 1,210.50 " in people.stdout
    assert "│ yuan of new refunds         │ 1,210.50 " in people.stdout
    assert "│ largest refund              │ 1,200.00 yuan (line 4) " in people.stdout
    assert "│ orders with several refunds │ 0 " in people.stdout
    assert machine.json == {
        "outcome": "valid, nothing was sent",
        "refunds": 3,
        "yuan": "1210.50",
        "invalid": 0,
        "problems": [],
        "remarks": [],
        "journal": str(journal),
        "found": {"new": 3, "made": 0, "open": 0},
        "new_yuan": "1210.50",
    }
    assert [path.name for path in file.parent.iterdir()] == ["refunds.csv"]


@pytest.mark.parametrize("name", ["refunds.csv", "refunds.CSV", "refunds.tsv", "refunds", "refunds.txt"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_known_by_its_name_or_its_first_line(nowhere, tmp_path, name, delimiter):
    """A table is read with each delimiter, a byte order mark, blank lines and quoted cells."""
    file = write_csv(tmp_path / name, [refund(1), refund(2)], delimiter=delimiter, quoting=1)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n\r\n")
    assert run("batch", file, "--dry-run", "--json", env=nowhere).json["refunds"] == 2


@pytest.mark.parametrize("name", ["refunds.jsonl", "refunds.ndjson", "refunds.json", "refunds"])
def test_json_lines_are_known_by_their_name_or_their_first_line(nowhere, tmp_path, name):
    """Objects of strings and numbers are read line by line; blank lines are skipped."""
    file = write_lines(tmp_path / name, [refund(1), refund(2) | {"money_refund": 20.01, "oid_paybill": None}])
    file.write_text("\n" + file.read_text() + "\n" if name != "refunds" else file.read_text())
    assert run("batch", file, "--dry-run", "--json", env=nowhere).json["yuan"] == "30.01"


def test_stdin_is_read_by_its_first_line(nowhere):
    """``-`` reads stdin."""
    ended = run("batch", "-", "--dry-run", "--json", env=nowhere, stdin=json.dumps(refund(1)))
    assert ended.json["refunds"] == 1


def test_an_empty_file_holds_nothing(nowhere, file):
    """A file without lines, or with a header only, has no refunds."""
    for text in ("", "no_refund,dt_refund,money_refund,no_order\n"):
        file.write_text(text)
        assert run("batch", file, "--dry-run", "--json", env=nowhere).json["refunds"] == 0


def test_signature_and_partner_columns_are_accepted(nowhere, file, gateway):
    """Signature columns are ignored and the merchant's number is compared, so logged requests can be used."""
    mine = {"oid_partner": gateway.oid_partner, "sign_type": "RSA", "sign": "x"}
    write_csv(file, [refund(1) | mine, refund(2) | mine | {"oid_partner": "201304121000001004"}])
    ended = run("batch", file, "--json", env=nowhere)
    assert problems(ended) == [
        (3, f"oid_partner: must be the configured merchant's, {gateway.oid_partner} (got '201304121000001004')")
    ]


def test_map_renames_columns(nowhere, tmp_path):
    """--map reads a field from another column; a second column for the field is an error."""
    rows = [{"number": "R-1", "Yuan": "1.00", "no_order": "x" * 99, "order": "O-1", "customer": "王"}]
    options = ("--map", "no_refund=number", "--map", "money_refund=Yuan", "--map", "no_order=order")
    options += ("--dt-refund", "20261122020000", "--dry-run", "--json")
    for file in (write_csv(tmp_path / "a.csv", rows), write_lines(tmp_path / "a.jsonl", rows)):
        ended = run("batch", file, *options, "--ignore-unknown", env=nowhere)
        assert ended.exit_code == 2
        assert "more than one column for no_order" in ended.stdout
        del rows[0]["no_order"]
        again = write_csv(file, rows) if file.suffix == ".csv" else write_lines(file, rows)
        assert run("batch", again, *options, "--ignore-unknown", env=nowhere).json["yuan"] == "1.00"
        assert "column 'customer' is not a refund field" in run("batch", again, *options, env=nowhere).stdout
        rows[0]["no_order"] = "x"


def test_encoding_option_reads_gb18030(nowhere, file):
    """Bytes that are not UTF-8 are refused with their line, and read with --encoding."""
    write_csv(file, [refund(1, no_order="订单-1")], encoding="gb18030")
    ended = run("batch", file, "--dry-run", env=nowhere)
    assert ended.exit_code == 2
    assert "line 2 is not utf-8; give the encoding, such as --encoding gb18030" in ended.stderr
    assert run("batch", file, "--dry-run", "--encoding", "gb18030", env=nowhere).exit_code == 0


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────


def test_invalid_lines_are_listed_and_nothing_is_sent(env, gateway, file):
    """The first fifty invalid lines are listed by number, then the number of the others."""
    rows = [refund(1), *(refund(number, money_refund="0.001") for number in range(2, 62)), refund(62, no_order=None)]
    people, machine = (run("batch", write_csv(file, rows), "--yes", *more, env=env) for more in ((), ("--json",)))
    assert people.exit_code == 2
    assert people.stderr.startswith("line 3: money_refund: must ")
    assert "\nline 52: " in people.stderr
    assert "\nline 53: " not in people.stderr
    assert people.stderr.endswith("… and 11 more\n")
    assert "│ invalid lines               │ 61 " in people.stdout
    assert (machine.json["outcome"], machine.json["invalid"]) == ("invalid, nothing was sent", 61)
    assert len(problems(machine)) == 50
    narrow = run("batch", write_csv(file, rows[1:2]), env=env)
    assert narrow.stdout.startswith("invalid, nothing was sent")  # the title of a narrow table stays in one line
    assert not gateway.requests


def test_skipped_invalid_lines_exit_3(env, gateway, file, database):
    """With --skip-invalid, the exit code says that some lines were not sent, also for a dry run and for the queue."""
    write_csv(file, [refund(1), refund(2, money_refund="1O"), refund(3, money_refund="1000.01")])
    dsn = env | {"LIANLIAN_JOURNAL": url_of(database)}
    skip = ("batch", file, "--skip-invalid", "--json")
    assert run(*skip, "--dry-run", env=env).exit_code == 3
    assert run(*skip, "--yes", "--queue", env=dsn).exit_code == 3
    assert not gateway.requests
    Path(f"{file}.receipt").unlink()
    ended = run(*skip, "--yes", env=env)
    assert (ended.exit_code, ended.json["outcome"], ended.json["invalid"]) == (3, "rejected", 1)
    write_csv(file, [refund(1), refund(2, money_refund="1O")])
    ended = run(*skip, "--yes", env=env)
    assert (ended.exit_code, ended.json["outcome"], ended.json["invalid"]) == (3, "invalid", 1)
    assert run("batch", write_csv(file, [refund(1)]), "--skip-invalid", "--yes", env=env).exit_code == 0


def test_line_numbers_count_every_line_of_the_file(nowhere, file):
    """Blank lines and line breaks within quotes count."""
    header = "no_refund,dt_refund,money_refund,no_order,note\n"
    file.write_text(f'{header}R-1,20261122020000,1.00,O-1,"two\nlines"\n\nR-2,20261122020000,1.00,O-2\nR-3,x,1,O,\n')
    ended = run("batch", file, "--json", "--ignore-unknown", env=nowhere)
    assert [line for line, _ in problems(ended)] == [5, 6]
    assert problems(ended)[0][1] == "has 4 cells, but the header has 5"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no_refund,money_refund,money_refund\n", "line 1: more than one column for money_refund"),
        ("no_refund,mony_refund\n", "line 1: column 'mony_refund' is not a refund field"),
        ("R-1,20261122020000,1.00,O-1\n", "line 1: no column is no_refund or money_refund; add a header"),
        ('no_refund\nR-1\n"R-2\nR-3\n', "line 3: unexpected end of data"),
        ('no_refund\n"R"-1\n', "line 2: ',' expected after '\"'"),
        ('[{"no_refund": "R-1"}]', "line 1 is a JSON array; convert it to JSON Lines, with one object on each line"),
    ],
)
def test_unreadable_file_is_refused_despite_skip_invalid(nowhere, tmp_path, text, problem):
    """An unclear header or an open quote is refused even with --skip-invalid."""
    file = tmp_path / ("a.json" if text.startswith("[") else "a.csv")
    file.write_text(text)
    more = ("--ignore-unknown",) if text.startswith("R-1") else ()
    ended = run("batch", file, "--skip-invalid", "--yes", *more, env=nowhere)
    assert ended.exit_code == 2
    assert problem in ended.stderr


@pytest.mark.parametrize("line", ["no json", "[1]", '{"no_refund": ["R"]}', '{"no_refund": "R", "no_refund": "S"}'])
def test_invalid_json_line_does_not_affect_other_lines(nowhere, tmp_path, line):
    """A line that is not a flat object is listed, and the other lines are read."""
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(refund(1))}\n{line}\n{json.dumps(refund(2) | {'mony': '1'})}\n")
    ended = run("batch", file, "--json", env=nowhere)
    assert [line for line, _ in problems(ended)] == [2, 3]
    assert ended.json["refunds"] == 1


def test_repeated_no_refund_must_have_the_same_content(env, gateway, file):
    """One number with two contents is invalid on both lines; a repeated line is noted and made once."""
    rows = [refund(1), refund(1, money_refund="10"), refund(2), refund(2, money_refund="9.00"), refund(2)]
    write_csv(file, [*rows, refund(3), refund(3, oid_paybill="20261122")])
    ended = run("batch", file, "--yes", "--json", env=env)
    assert problems(ended) == [
        (4, "no_refund R-2 has a different money_refund on line 5"),
        (5, "no_refund R-2 has a different money_refund on line 4"),
        (6, "no_refund R-2 is used for different refunds, see line 4"),
        (7, "no_refund R-3 has a different oid_paybill on line 8"),
        (8, "no_refund R-3 has a different oid_paybill on line 7"),
    ]
    assert ended.json["remarks"] == [{"line": 3, "remark": "repeats line 2: refund R-1 is made at most once"}]
    assert not gateway.requests
    ended = run("batch", file, "--yes", "--skip-invalid", env=env)
    assert ended.exit_code == 3
    assert "│ invalid lines │ 5 " in ended.stdout
    assert [record.no_refund for record in gateway.refunds] == ["R-1"]


def test_notify_url_is_required_in_row_or_merchant(nowhere, file):
    """Without a notify_url in the row or of the merchant, the row is invalid."""
    del nowhere["LIANLIAN_NOTIFY_URL"]
    write_csv(file, [refund(1), refund(2, notify_url="https://shop.example/refund")])
    ended = run("batch", file, "--json", env=nowhere)
    assert [line for line, _ in problems(ended)] == [2]
    assert problems(ended)[0][1].startswith("notify_url: required in the file or for the merchant")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--map", "mony=x"), "must be FIELD=COLUMN"),
        (("--map", "no_order"), "must be FIELD=COLUMN"),
        (("--map", "no_order=a", "--map", "no_order=b"), "map each field and each column only once"),
        (("--map", "no_order=a", "--map", "oid_paybill=a"), "map each field and each column only once"),
        (("--map", "notify_url=hook"), "no such column: hook"),
        (("--encoding", "klingon"), "klingon"),
        (("--dt-refund", "yesterday"), "14 digits"),
        (("--max-total", "much"), "decimal number"),
        (("--max-total", "9.99", "--yes"), "sum 10.00 yuan exceeds --max-total 9.99; nothing was sent"),
        (("--max-refund", "9.99", "--yes"), "line 2: 10.00 yuan exceeds --max-refund 9.99; nothing was sent"),
        (("--date-format", "YYYY/MM"), "must contain YYYY, MM, DD"),
        (("--date-format", "YYYY/MM/DD/MM"), "must contain YYYY, MM, DD"),
        (("--money-format", "9,999.00"), "must be the number 1,234.56 in the format of the file"),
        (("--money-format", "1.234.56"), "must be the number 1,234.56 in the format of the file"),
        (("--money-format", "1,234.56万元"), "must be the number 1,234.56 in the format of the file"),
        (("--rate", "0"), "--rate"),
        ((), "no terminal to ask for confirmation: use --yes"),
        (
            ("--queue", "a/b.csv"),
            "must be a postgresql:// URL, here or in LIANLIAN_JOURNAL, not 'a/b.csv'",
        ),
        (
            ("--queue", "host=db password=s3cret"),
            "must be a postgresql:// URL, here or in LIANLIAN_JOURNAL",
        ),
        (("--queue",), "must be a postgresql:// URL, here or in LIANLIAN_JOURNAL"),
        (("--queue", "postgresql://[::1"), "not a PostgreSQL URL"),
        (
            ("--queue", "postgresql://db/", "--rate", "1", "--keep-going"),
            "cannot be combined with --rate, --keep-going",
        ),
        (("--queue", "postgresql://db/", "--config", "refunds.csv"), "cannot be combined with --config"),
        (("--queue", "postgresql://me:s3cret@db/"), "other processes can read a password on the command line"),
        (("--journal", "postgresql://db/?password=s3cret"), "other processes can read a password on the command line"),
        (("--journal", "mysql://me:s3cret@db/"), "must be a path or postgresql://…"),
        (("--journal", "host=db user=me password=s3cret"), "must be a path or postgresql://…"),
        (("--out", "results.XLSX"), "must end in .csv; this command cannot write an Excel workbook"),
        (("--out", "refunds.csv"), "must not be the input, its receipt or the journal"),
        (("--out", "refunds.csv.receipt"), "must not be the input, its receipt or the journal"),
    ],
)
def test_invalid_options_are_usage_errors(nowhere, file, monkeypatch, options, hint):
    """Invalid or dangerous options are usage errors, without secrets in the message."""
    monkeypatch.chdir(file.parent)
    write_csv(file, [refund(1)])
    ended = run("batch", "refunds.csv", *options, env=nowhere)
    assert ended.exit_code == 2
    assert hint in " ".join(ended.stderr.split())
    assert "s3cret" not in ended.stderr


def test_out_cannot_be_a_hard_link_to_the_input(nowhere, file):
    """A hard link to the input is the input."""
    write_csv(file, [refund(1)])
    file.with_name("results.csv").hardlink_to(file)
    assert run("batch", file, "--yes", "--out", file.with_name("results.csv"), env=nowhere).exit_code == 2
    assert file.stat().st_size > 40


def test_full_disk_while_checking_is_an_error():
    """If the temporary file cannot grow, the error names the cure."""
    with closing(Checked(None, OPTIONS)) as checked:
        checked._file.execute("PRAGMA max_page_count = 5")

        def add_many():
            for number in range(10_000):
                checked.add(Row(number, refund(number)))

        with pytest.raises(LianLianError, match="temporary file: database or disk is full; set SQLITE_TMPDIR"):
            add_many()


# ── required fields ──────────────────────────────────────────────────────────────────────────────


def test_another_dt_refund_option_is_a_conflict(env, gateway, file):
    """The journal has the first value of --dt-refund: another one makes no second refund."""
    write_csv(file, [refund(1, dt_refund=None)])
    for moment, exit_code in (("20261122020000", 0), ("20261123020000", 1)):
        assert run("batch", file, "--dt-refund", moment, "--yes", env=env).exit_code == exit_code
    assert len(gateway.refunds) == 1


@pytest.mark.parametrize("missing", ["no_refund", "no_order", "money_refund", "dt_refund"])
def test_a_line_without_a_required_field_is_invalid(nowhere, file, missing):
    """The problem names the field; nothing is computed for it."""
    ended = run("batch", write_csv(file, [refund(1, **{missing: ""})]), "--json", env=nowhere)
    [(line, problem)] = problems(ended)
    assert (line, missing in problem) == (2, True)


# ── numbers that are derived ─────────────────────────────────────────────────────────────────────


def test_a_missing_number_is_derived_from_order_and_amount(env, gateway, file):
    """--derive gives an order and an amount the same number in every run, whatever else the file has."""
    rows = [refund(number, no_refund=None, no_order=f"O-{number}") for number in (1, 2)]
    rows += [refund(3, no_order="O-2"), refund(4, no_refund=None, no_order="O-2", money_refund="7")]
    assert run("batch", write_csv(file, rows), "--derive", "--yes", env=env).exit_code == 0
    made = {record.no_refund for record in gateway.refunds}
    assert ("R-3" in made, len(made), {len(number) for number in made}) == (True, 4, {32, 3})
    copy = write_lines(file.with_name("copy.jsonl"), rows[::-1])
    again = run("batch", copy, "--derive", "--yes", "--json", env=env)
    assert (again.exit_code, again.json["outcomes"]["made"]["refunds"]) == (0, 4)
    assert gateway.requests == {"apply": 4}


def test_derived_number_with_another_dt_refund_is_a_conflict(env, gateway, file):
    """The number does not depend on dt_refund: another value makes no second refund."""
    write_csv(file, [refund(1, no_refund=None, dt_refund=None)])
    for moment, exit_code in (("20261122020000", 0), ("20261123020000", 1)):
        assert run("batch", file, "--derive", "--dt-refund", moment, "--yes", env=env).exit_code == exit_code
    assert len(gateway.refunds) == 1


def test_refunds_that_derive_cannot_tell_apart_are_refused(nowhere, file):
    """If two lines have the same order and amount, they may be one refund or two: both need a no_refund."""
    rows = [refund(1, no_refund=None, no_order="O-1") for _ in range(3)]
    ended = run("batch", write_csv(file, rows), "--derive", "--yes", "--json", env=nowhere)
    found = dict(problems(ended))
    assert (ended.exit_code, sorted(found)) == (2, [2, 3, 4])
    assert found[2] == "no_refund is required in both lines, because the order and the amount are the same on line 3"


def test_derived_numbers_never_change():
    """Later releases must derive the same numbers."""
    fields = {"no_refund": "R", "dt_refund": "20261122020000", "money_refund": "10"}
    order = RefundRequest(**fields, no_order="O-1", oid_paybill="2")
    payment = RefundRequest(**fields, oid_paybill="2")
    assert derived_number(order) == "LLAC9195E65E7ED9CC026AADBD4F6589"
    assert derived_number(payment) == "LLD696B0D56F1C55D979EAE3E844AE24"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"no_order": ""}, "no_order or oid_paybill is required"),
        ({"money_refund": ""}, "money_refund: is required"),
        ({"dt_refund": ""}, "dt_refund: is required"),
        ({"no_order": "2.02611E+17"}, "no_order: is damaged (number in scientific notation)"),
        ({"oid_paybill": "2026"}, "no_refund: is required in a line with no_order and oid_paybill"),
    ],
)
def test_derive_needs_a_valid_line(nowhere, file, changes, problem):
    """A line without order, amount or time is invalid, and so is a damaged order number.

    So is a line with both numbers of the order: a file with only one of them would make a second refund.
    """
    ended = run("batch", write_csv(file, [refund(1, no_refund="", **changes)]), "--derive", "--json", env=nowhere)
    [(line, text)] = problems(ended)
    assert (line, problem in text) == (2, True)


# ── asking ───────────────────────────────────────────────────────────────────────────────────────


def test_terminal_must_confirm_before_sending(env, gateway, file, journal, monkeypatch, capsys):
    """Without --yes the prompt shows file, gateway and what is new, and only the answer yes sends."""
    write_csv(file, [refund(1), refund(2, money_refund="1000.01")])
    run("batch", file, "--yes", env=env)
    gateway.requests.clear()
    write_csv(file, [refund(1), refund(2, money_refund="1000.01"), refund(3, no_order="O-1"), refund(4)])
    with pytest.raises(click.Abort):
        on_a_terminal(monkeypatch, "\n", "batch", file, env=env | {"COLUMNS": "200"})
    rows = [
        [cell.strip() for cell in line.split("│")[1:3]]
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["file", str(file)],
        ["merchant", gateway.oid_partner],
        ["endpoint", env["LIANLIAN_APPLY_URL"]],
        ["journal", str(journal)],
        ["refunds", "4"],
        ["yuan", "1,030.01"],
        ["new", "2"],
        ["made", "1"],
        ["open", "0"],
        ["rejected", "1"],
        ["yuan of new refunds", "20.00"],
        ["largest refund", "1,000.01 yuan (line 3)"],
        ["orders with several refunds", "1"],
    ]
    assert not gateway.requests
    assert on_a_terminal(monkeypatch, "y\n", "batch", file, env=env) == 3
    assert "Send 2 new refunds, 20.00 yuan? [y/N]" in capsys.readouterr().err
    assert len(gateway.refunds) == 3


def test_interruption_of_the_confirmation_exits_130(env, gateway, file, monkeypatch, capsys):
    """Ctrl-C and Ctrl-D at the prompt interrupt the command, and nothing is sent."""
    write_csv(file, [refund(1)])
    assert on_a_terminal(monkeypatch, "\x04", "batch", file, env=env) == 130
    assert capsys.readouterr().err.endswith("[y/N]: \ninterrupted\n")
    assert not gateway.requests["apply"]


def test_edited_lines_are_not_new(env, file):
    """A line that was edited after its refund was made is a conflict: only what is really sent is counted."""
    run("batch", write_csv(file, [refund(1), refund(2), refund(3)]), "--yes", env=env)
    edited = [refund(1, money_refund="500"), refund(2, no_order="O-9"), refund(3), refund(4, money_refund="7.5")]
    dry = run("batch", write_csv(file, edited), "--dry-run", "--json", env=env)
    assert dry.json["found"] == {"new": 1, "made": 1, "open": 0, "conflict": 2}
    assert dry.json["new_yuan"] == "7.50"
    ended = run("batch", file, "--yes", "--json", env=env)
    assert ended.json["outcomes"]["conflict"]["refunds"] == 2
    assert ended.json["attempts"] == 1


@pytest.mark.anyio
async def test_checked_refunds_keep_their_order():
    """A thousand refunds are read back in the order in which they were added."""
    with closing(Checked(None, OPTIONS)) as checked:
        for number in range(1001):
            checked.add(Row(number + 2, refund(number)))
        assert checked.totals[:2] == (1001, 10010)
        with anyio.fail_after(60):
            assert [line.request.no_refund async for line in checked.lines()] == [f"R-{n}" for n in range(1001)]


def test_last_line_without_a_line_end_is_remarked(nowhere, file):
    """A file that is still being written may end in the middle of an amount."""
    for text, remarks in (("20", [3]), ("200.01", [3]), ("200.01\r", []), ("200.01\n", []), ("x", [])):
        file.write_text(
            f"no_refund,dt_refund,no_order,money_refund\nR-1,20261122020000,O-1,1\nR-2,20261122020000,O-2,{text}"
        )
        ended = run("batch", file, "--dry-run", "--json", env=nowhere)
        assert [remark["line"] for remark in ended.json["remarks"]] == remarks
    assert ended.json["problems"][0]["line"] == 3


# ── declared forms ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "text", "read"),
    [
        ("YYYY/MM/DD hh:mm", "2026/11/01 10:20", "20261101102000"),
        ("YYYY/MM/DD hh:mm", "2026/1/2 9:05", "20260102090500"),
        ("YYYY/MM/DD hh:mm", "２０２６／１１／０１　１０：２０", "20261101102000"),
        ("YYYY/MM/DD hh:mm", "20261101102003", "20261101102003"),
        ("DD.MM.YYYY", "01.02.2026", "20260201000000"),
        ("YYYY年MM月DD日", "2026年11月1日", "20261101000000"),
        ("YYYYMMDD hh:mm:ss", "20261101 9:05:07", "20261101090507"),
    ],
)
def test_date_format_is_declared(nowhere, tmp_path, form, text, read):
    """--date-format reads dates and times in China Standard Time; 14 digits are always read."""
    file = write_lines(tmp_path / "refunds.jsonl", [refund(1, dt_refund=text, dt_order=text)])
    same = write_lines(tmp_path / "same.jsonl", [refund(1, dt_refund=read, dt_order=read)])
    both = file.read_text() + same.read_text()
    ended = run("batch", "-", "--dry-run", "--json", "--date-format", form, env=nowhere, stdin=both)
    assert ended.json["remarks"] == [{"line": 2, "remark": "repeats line 1: refund R-1 is made at most once"}]


@pytest.mark.parametrize(
    ("form", "text", "yuan"),
    [
        ("¥1,234.56", "1,234.50", "1234.50"),
        ("¥1,234.56", "¥88.00", "88.00"),
        ("¥1,234.56", "￥ １，２３４", "1234.00"),
        ("￥1,234.56", "¥0.5", "0.50"),
        ("1.234,56 €", "1.234", "1234.00"),
        ("1.234,56 €", "1.234,5 €", "1234.50"),
        ("1 234.56", "1\u00a0234.50", "1234.50"),
        ("1234.56", "８８．００", "88.00"),
        ("1,234元", "12,345元", "12345.00"),
        ("-1,234.56", "-1,234.50", "1234.50"),
        ("(1,234.56)", "（88）", "88.00"),
    ],
)
def test_money_format_is_declared(nowhere, file, form, text, yuan):
    """--money-format reads separators, the sign of the currency and full-width digits."""
    write_csv(file, [refund(1, money_refund=text)])
    ended = run("batch", file, "--dry-run", "--json", "--money-format", form, env=nowhere)
    assert ended.json["yuan"] == yuan


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("--date-format", "YYYY/MM/DD hh:mm"), {"dt_refund": "2026-11-01 10:20"}),
        (("--date-format", "YYYY/MM/DD"), {"dt_refund": "2026/11/01 10:20"}),
        (("--date-format", "YYYYMMDD hh:mm"), {"dt_refund": "2026111 10:20"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "1.234"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "1,23.50"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "$1.50"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "-1.50"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "200.0①"}),
        (("--money-format", "¥1,234.56"), {"money_refund": "1,000²"}),
        (("--money-format", "1,234"), {"money_refund": "12.00"}),
        (("--money-format", "-1,234.56"), {"money_refund": "12.00"}),
        (("--money-format", "1,234.56-"), {"money_refund": "12.00"}),
        (("--money-format", "(1,234.56)"), {"money_refund": "(12.00"}),
    ],
)
def test_other_form_than_declared_is_refused(nowhere, file, options, changes):
    """A value in another form is invalid, and the problem names the declared form."""
    write_csv(file, [refund(1, **changes)])
    [(_, problem)] = problems(run("batch", file, "--json", *options, env=nowhere))
    [(name, text)] = changes.items()
    assert problem == f"{name}: does not match {options[0]} {options[1]!r} (got {text!r})"


def test_day_of_a_declared_form_must_exist(nowhere, file):
    """A date that does not exist is invalid."""
    write_csv(file, [refund(1, dt_refund="2026/11/31 10:20")])
    [(_, problem)] = problems(run("batch", file, "--json", "--date-format", "YYYY/MM/DD hh:mm", env=nowhere))
    assert problem.startswith("dt_refund: is not a valid date and time")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dt_refund", "2026/11/01 10:20"),
        ("dt_refund", "01/02/2026"),
        ("dt_order", "20261101"),
        ("dt_refund", "yesterday"),
        ("money_refund", "1,234.50"),
        ("money_refund", "¥88.00"),
        ("money_refund", "８８．００"),
        ("money_refund", "1.234"),
        ("money_refund", "1.230"),
        ("money_refund", "0.001"),
        ("money_refund", "-88.00"),
    ],
)
def test_undeclared_form_is_refused_with_its_option(nowhere, file, name, text):
    """Nothing is guessed: the problem names the option that declares a form."""
    write_csv(file, [refund(1, **{name: text})])
    [(_, problem)] = problems(run("batch", file, "--json", env=nowhere))
    assert problem.startswith(f"{name}: ")
    option = "--money-format '¥1,234.56'" if name == "money_refund" else "--date-format 'YYYY/MM/DD hh:mm'"
    assert f"; declare the format, such as {option}" in problem


def test_dry_run_needs_no_keys(file):
    """--dry-run checks a file without a merchant, and says what it cannot check."""
    write_csv(file, [refund(1) | {"oid_partner": "201103171000000000"}])
    ended = run("batch", file, "--dry-run")
    assert ended.exit_code == 0
    assert "missing: LIANLIAN_OID_PARTNER, LIANLIAN_PRIVATE_KEY" in ended.stderr
    assert "not checked: oid_partner, whether notify_url is missing, and the journal" in ended.stderr
    assert "│ yuan                        │ 10.00 " in ended.stdout
    assert run("batch", file, "--yes").exit_code == 2


# ── what spreadsheets do ─────────────────────────────────────────────────────────────────────────

DAMAGED = [
    *("2.02611E+17", "2.02611e+17", "2,02611E+17", "2E+17", "2.02611E+017", "2.02611220001E17"),
    *("123.0", "202611220001.00", "202,611,220,001"),
    *(
        "#N/A",
        "#REF!",
        "#VALUE!",
        "#NAME?",
        "#DIV/0!",
        "#NULL!",
        "#NUM!",
        "#SPILL!",
        "#BEZUG!",
        "#NV",
        "####",
        "Err:502",
    ),
    *('="123"', "=A1", "'123", "`123", "’123", '"123"'),
    *("NULL", "null", "nan", "NaN", "None", "N/A", "<NA>", "\\N", "undefined"),
    *("2-Jan", "Jan-26", "1月2日"),
    *("合计", "合 计", "Total", "Summe"),
]


@pytest.mark.parametrize("column", ["no_refund", "no_order", "oid_paybill", "trader_refund"])
@pytest.mark.parametrize("value", DAMAGED)
def test_damaged_identifier_is_refused(nowhere, file, column, value):
    """A value that a spreadsheet or program wrote instead of an identifier is invalid; the message has advice."""
    ended = run("batch", write_csv(file, [refund(1, **{column: value})]), "--json", env=nowhere)
    [(line, problem)] = problems(ended)
    assert line == 2
    assert problem.startswith(f"{column}: ")
    assert "write the identifier itself: in a spreadsheet, format the column as text" in problem
    assert f"(got {value!r})" in problem


@pytest.mark.parametrize(
    "value", ["20261122", "R-1.0", "2026E-001", "12E5", "A#1", "O=1", "O'1", "NULLA", "Jan-R1", "1.5", "订单（2026）01"]
)
def test_identifier_similar_to_damage_is_accepted(nowhere, file, value):
    """Existing order numbers remain refundable."""
    ended = run("batch", write_csv(file, [refund(1, no_order=value)]), "--dry-run", "--json", env=nowhere)
    assert (ended.exit_code, ended.json["remarks"]) == (0, [])


@pytest.mark.parametrize("value", ["2026112200010000", "202611220001234000"])
def test_rounded_number_is_remarked(nowhere, file, value):
    """Numbers with more than 15 digits that end in zeros are noted, and sent."""
    rows = [refund(1, no_order=value), refund(2, no_order=value[:-1] + "1"), refund(3, no_order="202611220001000")]
    ended = run("batch", write_csv(file, rows), "--dry-run", "--json", env=nowhere)
    expected = f"no_order {value} ends in zeros: a spreadsheet may have rounded it; compare it with its source"
    assert ended.json["remarks"] == [{"line": 2, "remark": expected}]


@pytest.mark.parametrize(("cell", "is_remarked"), [("a\nR-2,20261122020000,1.00,O-2,b", True), ("a\nb, c\n", False)])
def test_cell_that_contains_a_row_is_remarked(nowhere, file, cell, is_remarked):
    """A quotation mark without its end hides all rows until the next one."""
    write_csv(file, [refund(1) | {"note": cell}])
    ended = run("batch", file, "--dry-run", "--ignore-unknown", "--json", env=nowhere)
    assert [remark["line"] for remark in ended.json["remarks"]] == [2] * is_remarked


def test_rows_of_delimiters_are_blank(nowhere, file):
    """Rows without values are skipped, whatever their number of cells."""
    file.write_text("no_refund,dt_refund,money_refund,no_order\n,,,\nR-1,20261122020000,1,O-1\n,,,,,,\n , ,,\n")
    assert run("batch", file, "--dry-run", "--json", env=nowhere).json["refunds"] == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["refunds.csv", "refunds.jsonl"])
def test_utf_16_is_read(nowhere, tmp_path, encoding, name):
    """UTF-16 is recognized by its byte order mark, or named with --encoding."""
    rows = [refund(number, no_order=f"订单-{number}ਊ") for number in range(3000)]  # U+0A0A: its bytes are line feeds
    write = write_csv if name.endswith("csv") else write_lines
    text = write(tmp_path / name, rows).read_bytes().decode()
    (tmp_path / name).write_bytes(text.encode(encoding))
    said = () if encoding == "utf-16" else ("--encoding", encoding)
    assert run("batch", tmp_path / name, "--dry-run", "--json", *said, env=nowhere).json["refunds"] == 3000


def test_utf_16_needs_a_byte_order_mark_or_a_byte_order(nowhere, file):
    """``utf-16`` names no byte order, so a file without a byte order mark is refused."""
    file.write_bytes("no_refund\n".encode("utf-16-le"))
    ended = run("batch", file, "--dry-run", "--encoding", "utf-16", env=nowhere)
    assert ended.exit_code == 2
    assert "line 1 is not utf-16; give the encoding" in ended.stderr


def test_utf_16_without_byte_order_mark_is_suggested(nowhere, file):
    """NUL bytes suggest UTF-16 without a byte order mark."""
    file.write_bytes("no_refund\n".encode("utf-16-le"))
    ended = run("batch", file, "--dry-run", env=nowhere)
    assert ended.exit_code == 2
    assert "line 1 contains NUL bytes; if it is UTF-16, use --encoding utf-16-le" in ended.stderr


@pytest.mark.parametrize(
    ("encoding", "order", "is_refused"),
    [
        ("gb18030", "单号-1", True),
        ("cp1252", "Rück-1", True),
        ("gb18030", "R-1", False),
        ("gb18030", "元", False),
        ("gb18030", "订单", False),
    ],
)
def test_utf_8_is_not_read_in_another_encoding(nowhere, file, encoding, order, is_refused):
    """Read as GB18030, UTF-8 often gives other valid characters. Some Chinese in GBK is valid UTF-8, too."""
    write_csv(file, [refund(1, no_order=order)], encoding="utf-8" if is_refused else "gb18030")
    ended = run("batch", file, "--dry-run", "--encoding", encoding, env=nowhere)
    assert ended.exit_code == 2 * is_refused
    assert (f"the file is UTF-8, not {encoding}: omit --encoding" in ended.stderr) is is_refused


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (
            b"PK\x03\x04\x14\0",
            "an Excel workbook (.xlsx) or another zip archive: open it and save it as CSV (UTF-8)",
        ),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", "an old Excel workbook (.xls): open it and save it as CSV (UTF-8)"),
        (b"\x1f\x8b\x08\0", "compressed with gzip: decompress it first"),
    ],
)
def test_workbook_or_archive_is_named(nowhere, file, first, reason):
    """A workbook is recognized by its first bytes, whatever its name."""
    file.write_bytes(first + os.urandom(100))
    ended = run("batch", file, "--dry-run", env=nowhere)
    assert ended.exit_code == 2
    assert reason in ended.stderr


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_every_kind_of_line_end_is_read(nowhere, file, end):
    """CR, LF and CRLF end lines and count for line numbers."""
    lines = ("no_refund,dt_refund,money_refund,no_order", "R-1,20261122020000,1,O-1", "R-2,x,1,O-2")
    file.write_bytes("".join(line + end for line in lines).encode())
    assert [line for line, _ in problems(run("batch", file, "--json", env=nowhere))] == [3]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_sep_line_names_the_delimiter(nowhere, file, delimiter):
    """The line ``sep=;``, which Excel writes, names the delimiter and counts as a line."""
    write_csv(file, [refund(1, dt_refund="x")], delimiter=delimiter)
    file.write_bytes(f"sep={delimiter}\r\n".encode() + file.read_bytes())
    assert [line for line, _ in problems(run("batch", file, "--json", env=nowhere))] == [3]


def test_wrong_encoding_names_its_line(nowhere, file):
    """The line number is right after thousands of lines."""
    rows = [refund(number) for number in range(5000)]
    write_csv(file, [*rows, refund("x", no_order="订单")], encoding="gb18030")
    assert "line 5002 is not utf-8" in run("batch", file, "--dry-run", env=nowhere).stderr
