-- A PostgresJournal of release 0.1.0, in schema "released". Do not change this file: users have such journals.
CREATE SCHEMA IF NOT EXISTS released;
CREATE TABLE released.refunds (
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
CREATE INDEX pending ON released.refunds (id) WHERE state IN ('unresolved', 'accepted', 'final');
CREATE TABLE released.eras (
    id bigint PRIMARY KEY,
    began timestamptz NOT NULL DEFAULT clock_timestamp(),
    postmaster_start_time timestamptz NOT NULL DEFAULT pg_postmaster_start_time(),
    inserted_by xid NOT NULL DEFAULT pg_current_xact_id()::xid,
    datid oid NOT NULL
);
INSERT INTO released.eras VALUES (1, '2026-11-26T08:00:00+00:00', '2026-11-26T07:00:00+00:00', '730', 5);
CREATE TABLE released.version (version integer, id text, oid_partner text, apply_url text, is_acting boolean);
INSERT INTO released.version VALUES (8, 'b12e4765-894f-453b-bd47-1a660430f5e4', '201103171000000000', 'https://example.com/apply', true);
INSERT INTO released.refunds (no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history)
SELECT no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history FROM json_populate_record(NULL::released.refunds, '{"no_refund": "R-unknown", "fields": {"no_refund": "R-unknown", "dt_refund": "20261126160000", "money_refund": "10.00", "no_order": "O-1"}, "body": "{\"no_refund\":\"R-unknown\"}", "state": "unresolved", "record": null, "sent_at": {"at": "2026-11-26T08:00:00+00:00", "era": 1, "ahead": 0.0, "boot": 100.0, "timeline": "boot 1", "gateway": null}, "refused": {"ret_code": "1002", "ret_msg": "x", "verified": "no"}, "holder": null, "leased_until": null, "history": "1795680000 1 begun "}');
INSERT INTO released.refunds (no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history)
SELECT no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history FROM json_populate_record(NULL::released.refunds, '{"no_refund": "R-accepted", "fields": {"no_refund": "R-accepted", "dt_refund": "20261126160000", "money_refund": "10.00", "no_order": "O-1"}, "body": "", "state": "accepted", "record": {"ret_code": "0000", "sta_refund": "0"}, "sent_at": {"at": "2026-11-26T08:00:00+00:00", "era": 1, "ahead": 59.75508519899813, "boot": 100.0, "timeline": "boot 1", "gateway": null}, "refused": null, "holder": null, "leased_until": null, "history": "1795680000 1 begun "}');
INSERT INTO released.refunds (no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history)
SELECT no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history FROM json_populate_record(NULL::released.refunds, '{"no_refund": "R-made", "fields": {"no_refund": "R-made", "dt_refund": "20261126160000", "money_refund": "10.00", "no_order": "O-1"}, "body": "", "state": "final", "record": {"ret_code": "0000", "sta_refund": "2"}, "sent_at": {"at": "2026-11-26T08:00:00+00:00", "era": 1, "ahead": 59.74419553899861, "boot": 100.0, "timeline": "boot 1", "gateway": null}, "refused": null, "holder": null, "leased_until": null, "history": "1795680000 1 begun "}');
INSERT INTO released.refunds (no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history)
SELECT no_refund, fields, body, state, record, sent_at, refused, holder, leased_until, history FROM json_populate_record(NULL::released.refunds, '{"no_refund": "R-rejected", "fields": {"no_refund": "R-rejected", "dt_refund": "20261126160000", "money_refund": "10.00", "no_order": "O-1"}, "body": "", "state": "rejected", "record": {"ret_code": "5003", "ret_msg": "退款金额错误", "verified": "no"}, "sent_at": {"at": "2026-11-26T08:00:00+00:00", "era": 1, "ahead": 59.735693460999755, "boot": 100.0, "timeline": "boot 1", "gateway": null}, "refused": null, "holder": null, "leased_until": null, "history": "1795680000 1 begun "}');
