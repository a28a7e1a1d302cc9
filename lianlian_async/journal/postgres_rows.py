"""Tables and statements of a PostgreSQL journal, and the conversion between rows and entries.

``refunds`` has a row for each refund. ``eras`` has a row for each era (see ``postgres_moments``). ``version`` has one
row: the schema's version, the journal's id, its owner, and whether ``Journal.begin_acting`` was called.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, LiteralString

from .base import Ending, Entry, Owner, State
from .postgres_moments import Reading

FIND_TABLES: Final = """
SELECT current_setting('server_encoding') AS encoding, nspname, tablename
FROM (VALUES (%s::name)) AS wanted (name) LEFT JOIN pg_namespace ON nspname = name
    LEFT JOIN pg_tables ON schemaname = nspname AND tablename = 'version'
"""
"""``nspname`` is NULL without the schema, ``tablename`` without the tables."""
FIND_UNSAFE: Final = "SELECT name FROM pg_settings WHERE name IN ('fsync', 'full_page_writes') AND setting = 'off'"
READ_VERSION: Final = "SELECT * FROM {schema}.version WHERE EXISTS (SELECT FROM {schema}.eras)"
CREATE_SCHEMA: Final = "CREATE SCHEMA {schema}"  # IF NOT EXISTS needs the right to create schemas, even if it exists
# An index in another collation may not find a refund after an upgrade of the operating system's locale data, or after a
# failover to a machine with other locale data: the refund would look new.
CREATE: Final = """
CREATE TABLE {schema}.refunds (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    no_refund text COLLATE "C" NOT NULL UNIQUE,
    fields json NOT NULL,
    body text NOT NULL,
    state text NOT NULL,
    record json,
    sent_at json,
    refused json,
    holder text,
    leased_until json,
    history text NOT NULL
);
CREATE INDEX pending ON {schema}.refunds (id) WHERE state IN ('unresolved', 'accepted', 'final');
CREATE TABLE {schema}.eras (
    id bigint PRIMARY KEY,
    began timestamptz NOT NULL DEFAULT clock_timestamp(),
    postmaster_start_time timestamptz NOT NULL DEFAULT pg_postmaster_start_time(),
    inserted_by xid NOT NULL DEFAULT pg_current_xact_id()::xid,
    datid oid NOT NULL
);
INSERT INTO {schema}.eras (id, datid) SELECT 1, oid FROM pg_database WHERE datname = current_database();
CREATE TABLE {schema}.version AS
SELECT 8 AS version, gen_random_uuid()::text AS id, NULL::text AS oid_partner, NULL::text AS apply_url,
    false AS is_acting;
"""
UPGRADES: Final[dict[int, LiteralString]] = {}
"""Statements that upgrade the tables from each released version of the schema to the next one."""
UPGRADED: Final = "UPDATE {schema}.version SET version = %s"
BIND: Final = "UPDATE {schema}.version SET oid_partner = %s, apply_url = %s WHERE oid_partner IS NULL"
# The table lock waits for each transaction that may have read the old value; later transactions read the new value.
BEGIN_ACTING: Final[tuple[LiteralString, ...]] = (
    "LOCK TABLE {schema}.refunds IN EXCLUSIVE MODE",
    "UPDATE {schema}.version SET is_acting = true",
)

BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""At this isolation level, a transaction that has waited for another one sees the rows that the other one committed."""
COMMIT: Final = "COMMIT"
ROLLBACK: Final = "ROLLBACK"
# Run first in every transaction that writes refunds: behind a pooler, each transaction may use a different connection,
# so session settings do not last. Commits must be durable, and a worker that dies in a transaction must not lock its
# rows for long. Times are JSON, with a fixed UTC offset: psycopg reads a timestamptz only in the DateStyle ISO, and
# returns it in the session's time zone; Python's difference of two such times ignores daylight saving time.
READ_CLOCK: Final = """
SELECT
    set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
        THEN 'on' ELSE current_setting('synchronous_commit') END, true),
    set_config('statement_timeout', %s, true),
    set_config('idle_in_transaction_session_timeout', %s, true),
    to_json(clock_timestamp()) AS database, id AS era, to_json(began) AS began,
    postmaster_start_time = pg_postmaster_start_time() AND inserted_by = xmin
        AND datid = (SELECT oid FROM pg_database WHERE datname = current_database()) AS is_same_incarnation
FROM {schema}.eras ORDER BY id DESC LIMIT 1
"""
NEW_ERA: Final = """
INSERT INTO {schema}.eras (id, datid) SELECT %s, oid FROM pg_database WHERE datname = current_database()
ON CONFLICT DO NOTHING
"""
WAIT_BRIEFLY: Final = "SELECT set_config('lock_timeout', '100ms', true)"
"""Limits the wait for another worker that is inserting the same refund. 100 ms is longer than most transactions
of a live worker."""

FIND: Final = "SELECT * FROM {schema}.refunds WHERE no_refund = ANY(%s)"
LOCK: Final = """
WITH locked AS (SELECT * FROM {schema}.refunds WHERE no_refund = ANY(%s) FOR UPDATE SKIP LOCKED)
SELECT version, is_acting, locked.* FROM {schema}.version LEFT JOIN locked ON true
"""
"""Returns at least one row, for the first two columns. If no refund's row could be locked, the others are NULL."""
INSERT: Final = """
INSERT INTO {schema}.refunds
    (no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history)
SELECT no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history
FROM json_populate_recordset(NULL::{schema}.refunds, %s) AS new
WHERE NOT EXISTS (SELECT FROM {schema}.refunds AS old WHERE old.no_refund = new.no_refund)
ORDER BY no_refund ON CONFLICT (no_refund) DO NOTHING RETURNING no_refund
"""
UPDATE: Final = """
UPDATE {schema}.refunds AS refund
SET fields = new.fields, body = new.body, state = new.state, record = new.record, sent_at = new.sent_at,
    refused = new.refused, holder = new.holder, leased_until = new.leased_until, history = new.history
FROM json_populate_recordset(NULL::{schema}.refunds, %s) AS new
WHERE refund.no_refund = new.no_refund
"""
PENDING: Final = """
SELECT * FROM {schema}.refunds WHERE state IN ('unresolved', 'accepted', 'final') AND id > %s AND id <= %s
ORDER BY id LIMIT %s
"""
ENTRIES: Final = "SELECT * FROM {schema}.refunds WHERE id > %s AND id <= %s ORDER BY id LIMIT %s"
CANARIES: Final = """
WITH RECURSIVE starts(distance, start) AS (
    SELECT max(id) - min(id), min(id) FROM {schema}.refunds
    UNION ALL SELECT distance / 2, start + distance - distance / 2 FROM starts WHERE distance > 0
)
SELECT DISTINCT ON (id) canary.* FROM starts CROSS JOIN LATERAL (
    SELECT * FROM {schema}.refunds
    WHERE id >= start AND state IN ('accepted', 'final', 'done') AND record ->> 'evidence' IS NULL ORDER BY id LIMIT 1
) AS canary ORDER BY id DESC
"""
"""The first canary from the oldest entry on, from the middle id on, from three quarters on, and so on."""
LAST: Final = "SELECT coalesce(max(id), 0) AS id FROM {schema}.refunds"
COUNT: Final = "SELECT state, count(*) FROM {schema}.refunds GROUP BY state"


def owner_of(row: Mapping[str, Any]) -> Owner | None:
    """Return the journal's owner from its row in ``version``."""
    return None if row["oid_partner"] is None else Owner(row["oid_partner"], row["apply_url"])


def entry_of(row: Mapping[str, Any], reading: Reading) -> Entry:
    """Return the entry in ``row``, with its moments converted to this worker's clocks."""
    return Entry(
        no_refund=row["no_refund"],
        fields=row["fields"],
        body=row["body"].encode(),
        sent_at=reading.moment(row["sent_at"]),
        refused=row["refused"],
        ending=None if row["record"] is None else Ending(state=State(row["state"]), record=row["record"]),
        holder=row["holder"],
        leased_until=reading.moment(row["leased_until"]),
        history=row["history"],
    )


def rows_of(entries: Iterable[Entry], recorded: Mapping[str, Mapping[str, Any]], reading: Reading) -> str:
    """Return ``entries`` as one JSON array; ``recorded``: the stored rows by ``no_refund``."""
    rows = []
    for entry in entries:
        earlier = recorded.get(entry.no_refund, {})
        rows.append(
            {
                "no_refund": entry.no_refund,
                "fields": dict(entry.fields),
                "body": entry.body.decode(),
                "state": entry.state,
                "record": entry.ending and dict(entry.ending.record),
                "sent_at": reading.stored(entry.sent_at, earlier.get("sent_at")),
                "refused": entry.refused and dict(entry.refused),
                "holder": entry.holder,
                "leased_until": reading.stored(entry.leased_until, earlier.get("leased_until")),
                "history": entry.history,
            }
        )
    return json.dumps(rows)
