"""``lianlian reconcile``: compare LianLian's statements with a journal."""

import sqlite3
from collections.abc import Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final

import anyio
import click

from lianlian_async.errors import ConfigurationError, JournalError, LianLianError, QueryRejected, RefundNotFound
from lianlian_async.journal import Entry
from lianlian_async.merchant import Merchant
from lianlian_async.models import Refund, RefundRequest
from lianlian_async.reconcile import Reconciliation, StatementError, Verdict
from lianlian_async.recording import learn
from lianlian_async.session import RefundSession
from lianlian_async.worker_pool import iterate, run_workers

from .options import load_merchant
from .output import Output, table
from .stores import find_journal, make_journal, open_reader

_MEANING: Final = {
    Verdict.AGREES: "in both",
    Verdict.AMOUNT_DIFFERS: "in both, with different amounts; `lianlian explain` shows the journal's amount",
    Verdict.NOT_IN_JOURNAL: "in a statement, but not made according to the journal; ask who made it",
    Verdict.TWICE_IN_STATEMENT: "more than once in the statements; ask LianLian",
    Verdict.MISSING_IN_STATEMENT: "only in the journal; ask LianLian",
    Verdict.UNKNOWN_PROVED: "in a statement, but unresolved in the journal; use --apply",
    Verdict.OUTSIDE_PERIOD: "only in the journal; the statement of its day or of the next day was not given",
}


def reconcile(
    output: Output, /, statements: Sequence[Path], is_applied: bool, place: str | None, config: Path | None
) -> int:
    place = find_journal(place, config)
    found = Reconciliation()
    try:
        for path in statements:
            _read(found, path, statements)
        anyio.run(_compare, found, place, output)
    except StatementError as error:
        raise click.BadParameter(str(error), param_hint="STATEMENTS") from None
    except sqlite3.Error as error:
        raise LianLianError(f"temporary file: {error}; set SQLITE_TMPDIR to a folder with more space") from error
    if is_applied:
        anyio.run(_apply, found, load_merchant(config), place, output)
    for _, text in found.unreadable:
        output.note(text)
    document: dict[str, object] = {verdict: found.numbers.get(verdict, found.counts[verdict]) for verdict in Verdict}
    document["unreadable"] = [line for line, _ in found.unreadable]
    rows = [
        (verdict.replace("_", " "), found.counts[verdict], found.yuan[verdict], meaning)
        for verdict, meaning in _MEANING.items()
    ]
    output.show(
        document,
        table("Statements and journal", ("", "refunds", "yuan", "meaning"), rows),
        more=(_difference(found, verdict, number) for verdict, numbers in found.numbers.items() for number in numbers),
    )
    return 3 if found.unreadable or any(found.numbers.values()) else 0


def _difference(found: Reconciliation, verdict: Verdict, no_refund: str) -> str:
    rows = "; ".join(f"{row['evidence']}: {row['money_refund']} yuan" for row in found.records(no_refund))
    return f"{verdict.replace('_', ' ')}: {no_refund}" + (f" ({rows})" if rows else "")


def _read(found: Reconciliation, path: Path, statements: Sequence[Path]) -> None:
    if path.name.startswith("JYMXSUM_") and path.with_name(path.name.replace("SUM", "", 1)) in statements:
        return  # read together with its statement
    summary = path.with_name(path.name.replace("JYMX_", "JYMXSUM_", 1))
    totals = summary.read_text(_encoding(summary)) if summary.exists() else None
    with path.open(encoding=_encoding(path)) as file:
        found.add_statement(path.name, file, totals)


def _encoding(path: Path) -> str:
    for encoding in ("utf-8-sig", "gb18030"):
        with suppress(UnicodeDecodeError), path.open(encoding=encoding) as file:
            for _ in file:
                pass
            return encoding
    raise StatementError(f"{path.name}: is neither UTF-8 nor GB18030")


async def _compare(found: Reconciliation, place: str, output: Output) -> None:
    async with open_reader(place, output.note) as reader:
        if (owner := reader.owner) is not None and owner.oid_partner != found.oid_partner:
            raise ConfigurationError(f"the journal belongs to merchant {owner.oid_partner}, not {found.oid_partner}")
        async with aclosing(iterate(reader.entries())) as entries:
            async for entry in entries:
                found.compare(entry)
    found.finish()


async def _apply(found: Reconciliation, merchant: Merchant, place: str, output: Output) -> None:
    """Query the refunds that are in a statement but unresolved in the journal. Send no refund."""
    proved = frozenset(found.numbers[Verdict.UNKNOWN_PROVED])

    async def ask(entry: Entry) -> None:
        if entry.no_refund not in proved:
            return
        try:
            try:
                refund = await session.query_refund(RefundRequest.from_record(entry.fields).query())
            except QueryRejected as error:
                if error.ret_code != "3005":  # older than three months: the gateway no longer answers
                    raise
                refund = Refund.from_dict(found.records(entry.no_refund)[0])
            await learn(journal, refund, session.clock(), "query" if refund.evidence is None else "statement")
        except JournalError:
            raise
        except RefundNotFound:
            output.note(f"{entry.no_refund} is in a statement, but LianLian has no such record: ask LianLian's support")
        except LianLianError as error:
            output.note(str(error))

    async with make_journal(place) as journal, RefundSession(merchant, journal=journal) as session:
        await run_workers(journal.pending(), ask, workers=session.max_connections, intake=anyio.CancelScope())
