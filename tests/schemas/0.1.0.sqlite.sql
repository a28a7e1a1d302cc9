-- An SqliteJournal of release 0.1.0. Do not change this file: users have such journals.
PRAGMA application_id = 1280070214;
PRAGMA user_version = 6;
BEGIN TRANSACTION;
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT, history TEXT NOT NULL);
INSERT INTO "bodies" VALUES(1,'{"no_refund":"R-unknown"}','{"boot":100.0,"timeline":"boot 1","refused":{"ret_code":"1002","ret_msg":"x","verified":"no"}}','1795680000 1 begun ');
CREATE TABLE endings (id INTEGER PRIMARY KEY, record TEXT NOT NULL, history TEXT NOT NULL);
INSERT INTO "endings" VALUES(2,'{"ret_code":"0000","sta_refund":"0"}','1795680000 1 begun ');
INSERT INTO "endings" VALUES(3,'{"ret_code":"0000","sta_refund":"2"}','1795680000 1 begun ');
INSERT INTO "endings" VALUES(4,'{"ret_code":"5003","ret_msg":"退款金额错误","verified":"no"}','1795680000 1 begun ');
CREATE TABLE journal (
    id TEXT NOT NULL, oid_partner TEXT, apply_url TEXT, is_acting INTEGER NOT NULL, restored_at INTEGER
);
INSERT INTO "journal" VALUES('1a2aa01cf537c2478412c321a1f660a3','201103171000000000','https://example.com/apply',1,NULL);
CREATE TABLE refunds (
    id INTEGER PRIMARY KEY,
    no_refund TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    fields TEXT NOT NULL,
    state TEXT NOT NULL,
    sent_at INTEGER
);
INSERT INTO "refunds" VALUES(1,'R-unknown','ed849d72c684b8448e6eb28516309c23c02f34e50bcfa8f9a6482d1835acaf48','{"no_refund":"R-unknown","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','unresolved',1795680000000000);
INSERT INTO "refunds" VALUES(2,'R-accepted','c96ae806898e8519440386062fdbb95402c0e0073d935bf3fdba2e2cc55a023d','{"no_refund":"R-accepted","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','accepted',1795680060000000);
INSERT INTO "refunds" VALUES(3,'R-made','b448ccc198eab7060e725b0c36d88157ef01f8d143be83165271aae5e70f5126','{"no_refund":"R-made","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','final',1795680060000000);
INSERT INTO "refunds" VALUES(4,'R-rejected','89a5cd0458aa40eccc4331bc2d73e1dcefca096fa1066f068310817626aa60ca','{"no_refund":"R-rejected","dt_refund":"20261126160000","money_refund":"10.00","no_order":"O-1"}','rejected',1795680060000000);
CREATE INDEX not_done ON refunds (id, state) WHERE state <> 'done';
COMMIT;
