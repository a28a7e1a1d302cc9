"""Schema and statements of a journal file, and the stored form of a moment.

``refunds`` contains the columns that rarely grow, so that SQLite's pages stay full. ``bodies`` contains a refund's
signed body while the refund is unresolved, with its ``evidence``: the boot clock, its timeline and the gateway's clock
at ``sent_at`` (microseconds since 1970, UTC), and ``Entry.refused``. ``endings`` contains the outcomes. ``journal`` has
one row: its id, its owner, whether ``Journal.begin_acting`` was called, the file's inode (number and generation), by
which a copy is recognized, and the moment (``restored_at``, ``evidence``) at which it was restored from a backup.

A write and a read pass all rows as one JSON text: ``sqlite3`` releases and re-acquires the GIL for every row and every
statement, and a busy event loop may keep the GIL each time.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from lianlian_async.clock import Moment

APPLICATION_ID: Final = 0x4C4C5246  # "LLRF"
SCHEMA_VERSION: Final = 10

CHECKPOINT_PAGES: Final = 4000
"""Pages in the WAL (16 MB) that trigger a checkpoint: so many that most bodies are deleted before it."""

IN_WAL: Final = " wal"
"""The end of the inode's text in the file after a checkpoint: the next commits are in the WAL."""

SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE refunds (
    id INTEGER PRIMARY KEY,
    no_refund TEXT NOT NULL UNIQUE,
    fields TEXT NOT NULL,
    state TEXT NOT NULL,
    sent_at INTEGER
);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT, history TEXT NOT NULL);
CREATE TABLE endings (id INTEGER PRIMARY KEY, record TEXT NOT NULL, history TEXT NOT NULL);
CREATE INDEX not_done ON refunds (id, state) WHERE state <> 'done';
CREATE TABLE journal (
    id TEXT NOT NULL, oid_partner TEXT, apply_url TEXT, is_acting INTEGER NOT NULL, inode TEXT,
    restored_at INTEGER, evidence TEXT
);
INSERT INTO journal SELECT lower(hex(randomblob(16))), NULL, NULL, 0, NULL, NULL, NULL;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

UPGRADES: Final[dict[int, str]] = {}
"""Statements that upgrade a file from each released version of the schema to the next one."""

READ: Final = """
SELECT json_group_array(
    json_array(id, no_refund, json(fields), sent_at, body, json(evidence), state, json(record),
        coalesce(bodies.history, endings.history))
)
FROM refunds LEFT JOIN bodies USING (id) LEFT JOIN endings USING (id)
WHERE """
"""Append one condition: ``FIND``, ``PENDING``, ``ENTRIES`` or ``CANARIES``."""
FIND: Final = "no_refund IN (SELECT value FROM json_each(?))"
PENDING: Final = """id IN (
    SELECT id FROM refunds
    WHERE state IN ('unresolved', 'accepted', 'final') AND state <> 'done' AND id > ? AND id <= ? ORDER BY id LIMIT ?
)"""
ENTRIES: Final = "id IN (SELECT id FROM refunds WHERE id > ? AND id <= ? ORDER BY id LIMIT ?)"
COUNT: Final = """
SELECT json_group_object(state, n) FROM (
    SELECT state, count(*) AS n FROM refunds WHERE state <> 'done' GROUP BY state
    UNION ALL SELECT 'all', count(*) FROM refunds
)"""
LAST_ROWID: Final = "SELECT coalesce(max(id), 0) FROM refunds"
CANARIES: Final = """id IN (
    WITH RECURSIVE starts(distance, start) AS (
        SELECT (SELECT max(id) FROM refunds) - min(id), min(id) FROM refunds
        UNION ALL SELECT distance / 2, start + distance - distance / 2 FROM starts WHERE distance > 0
    )
    SELECT (
        SELECT id FROM refunds JOIN endings USING (id)
        WHERE id >= start AND state IN ('accepted', 'final', 'done') AND json_extract(record, '$.evidence') IS NULL
        ORDER BY id LIMIT 1
    ) FROM starts
)"""
"""The first canary from the oldest entry on, from the middle one on, from three quarters on, and so on."""
STATUS: Final = """
SELECT json_array(id, oid_partner, apply_url, is_acting, inode, restored_at, json(evidence)) FROM journal
"""
SET_INODE: Final = "UPDATE journal SET inode = ?"
SET_RESTORED_AT: Final = "UPDATE journal SET restored_at = :now, evidence = :evidence"
MARK_RESTORED: Final = (
    SET_RESTORED_AT,
    "UPDATE refunds SET sent_at = :now WHERE state = 'unresolved'",
    "UPDATE bodies SET evidence = :evidence",
)
BIND: Final = "UPDATE journal SET oid_partner = ?, apply_url = ?"
BEGIN_ACTING: Final = "UPDATE journal SET is_acting = 1"

# Inserting a row into this view replaces all rows of its refund.
CHANGES: Final = """
CREATE TEMP VIEW changes AS SELECT * FROM refunds JOIN bodies USING (id) JOIN endings USING (id);
CREATE TEMP TRIGGER change INSTEAD OF INSERT ON changes BEGIN
    INSERT INTO refunds (id, no_refund, fields, state, sent_at)
    VALUES (new.id, new.no_refund, new.fields, new.state, new.sent_at)
    ON CONFLICT (id) DO UPDATE
    SET fields = excluded.fields, state = excluded.state, sent_at = excluded.sent_at;
    INSERT OR REPLACE INTO bodies SELECT new.id, new.body, new.evidence, new.history WHERE new.record IS NULL;
    INSERT OR REPLACE INTO endings SELECT new.id, new.record, new.history WHERE new.record IS NOT NULL;
    DELETE FROM bodies WHERE id = new.id AND new.record IS NOT NULL;
END;
"""
CHANGE: Final = """
INSERT INTO changes (id, no_refund, fields, state, sent_at, body, evidence, record, history)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'),
    json_extract(value, '$[6]'), json_extract(value, '$[7]'), json_extract(value, '$[8]')
FROM json_each(?)
"""
"""The parameter is a JSON array of rows. One statement for any number of rows needs little memory."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def microseconds(moment: Moment) -> int:
    """Return the wall clock's microseconds since 1970."""
    return (moment.wall - _EPOCH) // _MICROSECOND


def evidence_of(sent_at: Moment, refused: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the column ``evidence`` for :func:`moment_of`."""
    evidence: dict[str, Any] = {"boot": sent_at.boot, "timeline": sent_at.timeline}
    if sent_at.gateway is not None:
        evidence["gateway"] = sent_at.gateway.isoformat()
    if refused is not None:
        evidence["refused"] = refused
    return evidence


def moment_of(sent_at: int, evidence: Mapping[str, Any]) -> Moment:
    """Return the moment ``sent_at`` on all clocks. A resolved refund has only the wall clock's time."""
    gateway = evidence.get("gateway")
    return Moment(
        _EPOCH + sent_at * _MICROSECOND,
        evidence.get("boot", 0.0),
        evidence.get("timeline", ""),
        None if gateway is None else datetime.fromisoformat(gateway),
    )
