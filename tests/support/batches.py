"""Write and read files of refunds for the tests of ``lianlian batch`` and related commands."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict

PASSWORD = "s3cret"
FIELDS = ("no_refund", "dt_refund", "money_refund", "no_order")


def refund(number: int | str, **changes: str | None) -> dict[str, str]:
    """Return the fields of one refund of 10.00 yuan; None omits a field."""
    fields = {"no_refund": f"R-{number}", "dt_refund": "20261122020000", "money_refund": "10.00"}
    fields |= {"no_order": f"O-{number}"}
    return {name: text for name, text in (fields | changes).items() if text is not None}


def write_csv(path: Path, rows: list[dict[str, str]], *, encoding: str = "utf-8", **dialect: Any) -> Path:
    """Write a CSV file with every column that occurs in a row; return its path."""
    columns = list(dict.fromkeys(name for row in rows for name in row)) or list(FIELDS)
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, **dialect)
    table.writeheader()
    table.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a JSON Lines file; return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; check that it has a byte order mark, as Excel requires for UTF-8."""
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def url_of(database: str, *, password: str | None = PASSWORD) -> str:
    """Return the URL of the tests' PostgreSQL ``database``, which is a connection string."""
    parts = conninfo_to_dict(database)
    secret = "" if password is None else f":{password}"
    return f"postgresql://{parts['user']}{secret}@/{parts['dbname']}?host={parts['host']}"
