-- An SqliteJournal of release 0.1.0. Do not change this file: users have such journals.
PRAGMA application_id = 1280070214;
PRAGMA user_version = 10;
BEGIN TRANSACTION;
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT, history TEXT NOT NULL);
INSERT INTO "bodies" VALUES(1,'{"no_refund":"R-unknown"}','{"boot":100.0,"timeline":"boot 1","refused":{"ret_code":"1002","ret_msg":"x","verified":"no"}}','1795680000 1 begun ');
CREATE TABLE endings (id INTEGER PRIMARY KEY, record TEXT NOT NULL, history TEXT NOT NULL);
INSERT INTO "endings" VALUES(2,'{"ret_code":"0000","sta_refund":"0"}','1795680000 1 begun ');
INSERT INTO "endings" VALUES(3,'{"ret_code":"0000","sta_refund":"2"}','1795680000 1 begun ');
INSERT INTO "endings" VALUES(4,'{"ret_code":"5003","ret_msg":"退款金额错误","verified":"no"}','1795680000 1 begun ');
CREATE TABLE journal (
    id TEXT NOT NULL, oid_partner TEXT, apply_url TEXT, is_acting INTEGER NOT NULL, inode TEXT,
    restored_at INTEGER, evidence TEXT
);
INSERT INTO "journal" VALUES('1a2aa01cf537c2478412c321a1f660a3','201103171000000000','https://example.com/apply',1,NULL,NULL,NULL);
CREATE TABLE refunds (
    id INTEGER PRIMARY KEY,
    no_refund TEXT NOT NULL UNIQUE,
    fields TEXT NOT NULL,
    state TEXT NOT NULL,
    sent_at INTEGER
);
INSERT INTO "refunds" VALUES(1,'R-unknown','{"no_refund":"R-unknown","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','unresolved',1795680000000000);
INSERT INTO "refunds" VALUES(2,'R-accepted','{"no_refund":"R-accepted","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','accepted',1795680060000000);
INSERT INTO "refunds" VALUES(3,'R-made','{"no_refund":"R-made","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','final',1795680060000000);
INSERT INTO "refunds" VALUES(4,'R-rejected','{"no_refund":"R-rejected","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','rejected',1795680060000000);
CREATE INDEX not_done ON refunds (id, state) WHERE state <> 'done';
COMMIT;
