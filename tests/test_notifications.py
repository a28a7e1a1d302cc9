"""The notification endpoint: verification, acknowledgement, handler calls, and the ASGI application."""

from __future__ import annotations

import email.parser
import itertools
import logging
import threading
from decimal import Decimal
from functools import partial

import anyio
import attrs
import httpx
import multidict
import pytest
import starlette.datastructures
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    NotificationEndpoint,
    RefundSession,
    RefundStatus,
    RetryPolicy,
    VerifyingKey,
    rsa_worker,
    wire,
)
from lianlian_async.journal import Ending, MemoryJournal, SqliteJournal, State
from lianlian_async.notifications import inbox as inboxes
from lianlian_async.signing import signature_source
from tests.support import journals, keypairs
from tests.support.notices import (
    HEADERS,
    Handler,
    asked,
    begin,
    deliver,
    fails,
    inbox,
    is_acknowledged,
    notification,
    trusting,
    until,
)
from tests.support.parties import OID_PARTNER, as_json, boot_clock, made, refund_request, sandbox, sealed
from tests.support.strategies import texts

pytestmark = pytest.mark.anyio

virtual = pytest.mark.virtual_time


@pytest.fixture
def endpoint(handler):
    """An endpoint without a journal."""
    return NotificationEndpoint(trusting(), handler)


# ── what is believed ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [RefundStatus.SUCCESS, RefundStatus.FAILED])
async def test_a_final_state_is_acted_on_and_acknowledged(endpoint, handler, status):
    """The handler is called with the notified refund, then the notification is acknowledged."""
    body = notification(sta_refund=status, settle_date=None)
    assert is_acknowledged(await endpoint.handle(body, HEADERS))
    [refund] = handler.done
    assert (refund.no_refund, refund.sta_refund, refund.money_refund) == ("R-1", status, Decimal("10.00"))
    assert refund.raw == wire.decode(body)
    assert endpoint.counts == {"acted": 1}


async def test_the_acknowledgement_is_the_documented_one(endpoint):
    """HTTP 200 with ret_code 0000 as JSON in UTF-8."""
    ack = await endpoint.handle(notification(ret_code="0000", ret_msg="交易成功"), {})
    assert (ack.status, ack.body) == (200, b'{"ret_code":"0000","ret_msg":"ok"}')
    assert ack.headers == {"content-type": "application/json;charset=utf-8"}


@pytest.mark.parametrize("status", ["0", "1", "7"])
async def test_a_state_that_can_change_is_acknowledged_and_not_acted_on(endpoint, handler, status):
    """While the state is not final, the handler is not called."""
    assert is_acknowledged(await endpoint.handle(notification(sta_refund=status), HEADERS))
    assert not handler.begun
    assert endpoint.counts == {"not final": 1}


@pytest.mark.parametrize(
    ("body", "verdict", "status"),
    [
        (b"", "malformed", 400),
        (b"\xff{}", "malformed", 400),
        (b"[]", "malformed", 400),
        (b"{}", "unverified", 403),
        (b'{"a":"1","a":"1"}', "malformed", 400),
        (b"[" * 60_000, "malformed", 400),
        (notification(sta_refund=None), "incomplete", 503),
        (notification(sta_refund=""), "incomplete", 503),
        (notification(money_refund=None), "incomplete", 503),
        (notification(money_refund="ten"), "malformed", 400),
        (notification(money_refund="10.001"), "malformed", 400),
        (notification(dt_refund="yesterday"), "malformed", 400),
        (notification(no_refund=""), "incomplete", 503),
        (notification(no_refund=None, oid_refundno=""), "malformed", 400),
        (notification(ret_code="9999"), "malformed", 400),
        (notification(oid_partner="201103171000000001"), "foreign", 403),
        (notification(oid_partner=None), "foreign", 403),
        (notification(key=keypairs.pair("stranger").private), "unverified", 403),
        (notification(key=keypairs.pair("merchant").private), "unverified", 403),
        (as_json({**wire.decode(notification()), "sign": ""}), "unverified", 403),
        (as_json({**wire.decode(notification()), "sign": "not base64"}), "unverified", 403),
        (as_json({**wire.decode(notification()), "money_refund": "11.00"}), "unverified", 403),
        (as_json({**wire.decode(notification()), "extra": "field"}), "unverified", 403),
        (notification() + b" " * (64 * 1024), "too big", 413),
    ],
)
async def test_untrusted_notification_is_refused(endpoint, handler, caplog, body, verdict, status):
    """Malformed, unsigned, forged and foreign bodies are counted and logged, but not acknowledged or acted on."""
    ack = await endpoint.handle(body, HEADERS)
    assert not is_acknowledged(ack)
    assert (ack.status, wire.decode(ack.body)) == (status, {"ret_code": "9999", "ret_msg": verdict})
    assert not handler.begun
    assert endpoint.counts == {verdict: 1}
    [record] = caplog.records
    assert (record.name, record.levelno) == ("lianlian_async", logging.WARNING)


@pytest.mark.parametrize(
    "changes",
    [{"dt_refund": None}, {"dt_refund": ""}, {"settle_date": "soon"}, {"rate": "?"}, {"unheard_of": "field"}],
)
async def test_optional_fields_may_be_missing_or_unusual(endpoint, handler, changes):
    """An unreadable rate or settlement date does not stop the handler call."""
    assert is_acknowledged(await endpoint.handle(notification(**changes), HEADERS))
    assert handler.numbers == ["R-1"]


async def test_a_body_of_the_maximum_size_is_read(endpoint):
    """A body of 64 KiB, white space included, is accepted."""
    assert is_acknowledged(await endpoint.handle(notification().ljust(64 * 1024), HEADERS))


async def test_both_keys_are_trusted_while_lianlian_rotates(handler):
    """A notification signed with either of the gateway's keys is believed."""
    keys = [keypairs.pair("gateway").public, keypairs.pair("stranger").public]
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=keys), handler)
    for number, name in enumerate(["gateway", "stranger"]):
        assert is_acknowledged(await endpoint.handle(notification(number, keypairs.pair(name).private), HEADERS))
    assert handler.numbers == ["R-0", "R-1"]


# ── any bytes at all ─────────────────────────────────────────────────────────────────────────────

GENUINE = notification(ret_code="0000", ret_msg="交易成功", rate="", extra="\\ 退款")


def signed_content(body):
    """Return the fields that the signature of a body covers."""
    return signature_source(wire.decode(body))


async def answer_is_honest(body):
    """A fresh endpoint acknowledges ``body`` only if its signed content is that of ``GENUINE``."""
    handler = Handler()
    ack = await NotificationEndpoint(trusting(), handler).handle(body, HEADERS)
    assert is_acknowledged(ack) == bool(handler.done)
    if handler.done:
        assert signed_content(body) == signed_content(GENUINE)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
async def test_no_changed_byte_is_acknowledged(flip):
    """A notification with one changed byte is refused, unless its signed content is the same."""
    for place in range(len(GENUINE)):
        await answer_is_honest(GENUINE[:place] + bytes([GENUINE[place] ^ flip]) + GENUINE[place + 1 :])


@given(place=st.integers(0, len(GENUINE)), cut=st.integers(0, 2), put=st.binary(max_size=2))
@example(place=len(GENUINE), cut=0, put=b" ")
async def test_no_edited_notification_is_acknowledged(place, cut, put):
    """A notification with bytes replaced is acknowledged only if its signed content is the same."""
    await answer_is_honest(GENUINE[:place] + put + GENUINE[place + cut :])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(body=st.binary() | json_values.map(lambda value: repr(value).encode(errors="replace")))
async def test_unsigned_bodies_are_never_acknowledged(body):
    """Arbitrary bytes and arbitrary JSON get a response, but never an acknowledgement."""
    assert not is_acknowledged(await NotificationEndpoint(trusting(), fails).handle(body, {}))


names = st.sampled_from([*asked(), "money_refund", "sta_refund", "ret_code", "settle_date", "rate", "other"]) | texts
values = st.sampled_from([*asked().values(), "10.00", "2", "3", "0000"]) | texts


@given(fields=st.dictionaries(names, values), headers=st.dictionaries(texts, texts))
async def test_any_signed_object_gets_a_response(fields, headers):
    """Any signed flat object gets a response; the handler is called only for final refunds of this merchant."""
    handler = Handler()
    ack = await NotificationEndpoint(trusting(), handler).handle(as_json(sealed(fields)), headers)
    if is_acknowledged(ack):
        assert fields["oid_partner"] == OID_PARTNER
        assert len(handler.done) == (fields["sta_refund"] in ("2", "3"))
    else:
        assert not handler.begun


# ── once ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_duplicate_is_acknowledged_and_not_acted_on(endpoint, handler):
    """A repeated notification, even with another ret_msg, is acted on once and acknowledged each time."""
    for body in [notification(), notification(), notification(ret_msg="other words", money_refund="10.0")]:
        assert is_acknowledged(await endpoint.handle(body, HEADERS))
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"acted": 1, "duplicate": 2}


@virtual
async def test_duplicates_at_the_same_time_are_acted_on_once(handler):
    """Duplicates that arrive while the handler runs wait, and are acknowledged after the handler has returned."""
    handler.then = [lambda: anyio.sleep(3)]
    endpoint = NotificationEndpoint(trusting(), handler, clock=boot_clock)

    async def deliver():
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
        assert handler.done
        assert anyio.current_time() < 5

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(deliver)
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"acted": 1, "duplicate": 4}


@virtual
async def test_a_duplicate_waits_no_longer_than_handler_seconds(handler):
    """If the handler is still running after that time, a duplicate gets 503, so LianLian delivers it again."""
    handler.then = [lambda: anyio.sleep(10)]
    async with MemoryJournal() as journal:
        endpoint = NotificationEndpoint(trusting(), handler, journal=journal, handler_seconds=11.0, clock=boot_clock)
        other = NotificationEndpoint(trusting(), handler, journal=journal, handler_seconds=1.0, clock=boot_clock)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(endpoint.handle, notification(), HEADERS)
            await anyio.sleep(1)
            assert (await other.handle(notification(), HEADERS)).status == 503
            assert anyio.current_time() <= 2
    assert other.counts == {"busy": 1}
    assert endpoint.counts == {"acted": 1}


@virtual
async def test_without_a_journal_a_duplicate_waits_no_longer_than_handler_seconds(handler):
    """While a handler that cannot be cancelled runs, duplicates get 503."""

    async def stubborn():
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10)

    handler.then = [stubborn]
    endpoint = NotificationEndpoint(trusting(), handler, handler_seconds=2.0, clock=boot_clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(endpoint.handle, notification(), HEADERS)
        await anyio.sleep(1)
        assert (await endpoint.handle(notification(), HEADERS)).status == 503
        assert anyio.current_time() <= 3
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert endpoint.counts == {"busy": 1, "acted": 1, "duplicate": 1}


@virtual
async def test_a_duplicate_that_waits_takes_over_from_a_handler_that_fails(handler):
    """Of several waiting duplicates, one calls the handler again."""

    async def fails_late():
        await anyio.sleep(1)
        await fails()

    handler.then = [lambda: anyio.sleep(2), fails_late]
    endpoint = NotificationEndpoint(trusting(), handler, clock=boot_clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(endpoint.handle, notification(2), HEADERS)
        await anyio.sleep(0.1)
        for _ in range(4):
            tasks.start_soon(endpoint.handle, notification(1), HEADERS)
    assert handler.numbers == ["R-1", "R-2"]
    assert len(handler.begun) == 3
    assert endpoint.counts == {"failed": 1, "acted": 2, "duplicate": 2}


async def test_an_endpoint_that_is_opened_again_remembers(endpoint, handler):
    """After the endpoint is closed and opened again, it does not repeat earlier handler calls."""
    for _ in range(2):
        async with endpoint:
            assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]


async def test_a_handler_that_failed_is_called_again_by_the_next_delivery(endpoint, handler, caplog):
    """Without an acknowledgement LianLian delivers again; the log has the handler's traceback."""
    handler.then = [fails]
    ack = await endpoint.handle(notification(), HEADERS)
    assert (ack.status, handler.done) == (500, [])
    assert "the shop's database is down" in caplog.text
    assert "R-1" in caplog.text
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert (len(handler.begun), handler.numbers) == (2, ["R-1"])
    assert endpoint.counts == {"failed": 1, "acted": 1}


async def test_the_work_of_a_handler_that_is_not_async_is_done_once():
    """It blocks the event loop, but a second delivery must not do its work again."""
    seen = []
    async with NotificationEndpoint(trusting(), seen.append) as endpoint:
        statuses = [(await endpoint.handle(notification(), HEADERS)).status for _ in range(2)]
    assert (statuses, len(seen)) == ([200, 200], 1)


@virtual
async def test_a_handler_that_is_too_slow_is_cancelled(handler, caplog):
    """After handler_seconds the handler is cancelled; the next delivery calls it again."""
    handler.then = [anyio.sleep_forever]
    endpoint = NotificationEndpoint(trusting(), handler, clock=boot_clock)
    assert (await endpoint.handle(notification(), HEADERS)).status == 500
    assert anyio.current_time() == pytest.approx(4)
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]
    assert "TimeoutError" in caplog.text


@virtual
async def test_all_waits_of_a_handler_count_against_its_time_limit(handler):
    """Many short waits together are limited to handler_seconds."""
    waits = []

    async def often():
        for _ in range(10):
            await anyio.sleep(1)
            waits.append(1)

    handler.then = [often]
    endpoint = NotificationEndpoint(trusting(), handler, handler_seconds=3.5, clock=boot_clock)
    assert (await endpoint.handle(notification(), HEADERS)).status == 500
    assert (anyio.current_time(), len(waits)) == (3.5, 3)


async def test_a_handler_that_never_waits_meets_any_time_limit(handler):
    """A handler without an await succeeds even under the smallest time limit."""
    endpoint = NotificationEndpoint(trusting(), handler, handler_seconds=1e-9)
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))


async def test_a_delivery_that_is_cancelled_leaves_the_refund_to_the_next(endpoint, handler):
    """If the server cancels a request at its shutdown, the next delivery calls the handler."""
    handler.then = [anyio.sleep_forever]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(endpoint.handle, notification(), HEADERS)
        while not handler.begun:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]


@pytest.mark.parametrize("changes", [{"sta_refund": "3"}, {"money_refund": "11.00"}])
async def test_another_final_state_or_amount_is_contradictory(endpoint, handler, caplog, changes):
    """A contradiction of an earlier notification is neither acted on nor acknowledged; it is logged as an error."""
    await endpoint.handle(notification(), HEADERS)
    ack = await endpoint.handle(notification(**changes), HEADERS)
    assert (ack.status, wire.decode(ack.body)["ret_code"]) == (409, "9999")
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"acted": 1, "contradictory": 1}
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert next(iter(changes)) in record.getMessage()


async def test_no_secret_and_no_signature_is_logged(endpoint, handler, caplog):
    """The log has the refund's number and the reason, but no secret and no signature."""
    handler.then = [fails]
    bodies = [notification(), notification(), notification(sta_refund="3"), notification(oid_partner="2011")]
    for body in bodies:
        await endpoint.handle(body, HEADERS)
    assert len(caplog.records) == 3
    for body in bodies:
        assert wire.decode(body)["sign"][:16] not in caplog.text


async def test_without_a_journal_the_latest_refunds_are_remembered(handler, monkeypatch):
    """Memory is bounded: the least recently notified refund is removed first, except while its handler runs."""
    monkeypatch.setattr(inboxes, "MOST_RECENT", 2)
    endpoint = NotificationEndpoint(trusting(), handler)

    async def deliver(*numbers):
        for number in numbers:
            assert is_acknowledged(await endpoint.handle(notification(number), HEADERS))

    async def others_meanwhile():
        await deliver(2, 3, 4)

    await deliver(1, 2, 1, 3, 1)
    assert handler.numbers == ["R-1", "R-2", "R-3"]
    await deliver(2)
    assert handler.numbers == ["R-1", "R-2", "R-3", "R-2"]
    handler.done.clear()
    handler.then = [others_meanwhile]
    await deliver(5, 5)
    assert handler.numbers == ["R-3", "R-4", "R-5"]


async def test_no_refund_is_forgotten_while_the_handler_runs(handler, monkeypatch):
    """With room for one refund, three concurrent handler calls still happen once each."""
    monkeypatch.setattr(inboxes, "MOST_RECENT", 1)
    endpoint = NotificationEndpoint(trusting(), handler)
    go = anyio.Event()
    handler.then = [go.wait] * 3
    async with anyio.create_task_group() as tasks:
        for number in (1, 2, 3):
            tasks.start_soon(endpoint.handle, notification(number), HEADERS)
        while len(handler.begun) < 3:
            await anyio.lowlevel.checkpoint()
        go.set()
    assert endpoint.counts == {"acted": 3}


# ── with the journal of the refunds ──────────────────────────────────────────────────────────────


async def test_the_journal_learns_the_final_state(journal, handler):
    """A notification resolves an unknown refund in the journal; the handler gets the journal's dt_refund."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    request = await begin(journal)
    body = notification(dt_refund=None)
    assert is_acknowledged(await endpoint.handle(body, HEADERS))
    entry = await journal.find("R-1")
    assert (entry.state, entry.ending.record) == (State.DONE, wire.decode(body))
    assert handler.done[0].query() == request.query()


async def test_the_journal_of_the_session_is_the_default(journal, handler):
    """Without it, a forgotten argument would call the handler again after a restart."""
    session = sandbox().session(journal=journal)
    await begin(journal)
    for _ in range(2):
        await deliver(NotificationEndpoint(session.merchant, handler, session=session), 1)
    assert handler.numbers == ["R-1"]
    assert (await journal.find("R-1")).state is State.DONE


async def test_a_notification_without_dt_refund_does_not_prove_a_refund_that_was_not_sent(journal, handler):
    """It may belong to an older refund with the same number; the journal does not change."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    await begin(journal)
    await journal.release(await journal.find("R-1"), None)
    before = await journal.find("R-1")
    assert (await endpoint.handle(notification(dt_refund=None), HEADERS)).status == 503
    assert await journal.find("R-1") == before
    assert not handler.begun
    assert endpoint.counts == {"incomplete": 1}
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]


async def test_the_journal_learns_that_a_refund_was_accepted(journal, handler):
    """A state that is not final is recorded, and so is the final state after it."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    await begin(journal)
    assert is_acknowledged(await endpoint.handle(notification(sta_refund="1"), HEADERS))
    assert (await journal.find("R-1")).state is State.ACCEPTED
    assert is_acknowledged(await endpoint.handle(notification(sta_refund="3"), HEADERS))
    assert (await journal.find("R-1")).state is State.DONE
    assert handler.numbers == ["R-1"]


async def test_a_late_notification_of_an_earlier_state_changes_nothing(journal, handler):
    """Notifications in the wrong order are all acknowledged, and the recorded state stays final."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    await begin(journal)
    for status in ("2", "1", "0"):
        assert is_acknowledged(await endpoint.handle(notification(sta_refund=status), HEADERS))
    entry = await journal.find("R-1")
    assert (entry.state, entry.ending.record["sta_refund"]) == (State.DONE, "2")
    assert handler.numbers == ["R-1"]


async def test_a_refund_that_the_journal_does_not_know_is_acted_on(journal, handler):
    """The merchant may have sent it from another system; it is not added to the journal."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]
    assert await journal.find("R-1") is None


@pytest.mark.parametrize(
    ("recorded", "changes"),
    [
        (None, {"money_refund": "11.00"}),
        (None, {"dt_refund": "20260105160001"}),
        (Ending(state=State.DONE, record={"sta_refund": "3"}), {}),
        (Ending(state=State.DONE, record={"sta_refund": "2"}), {"sta_refund": "3"}),
        (Ending(state=State.REJECTED, record={"ret_code": "5003", "ret_msg": "", "verified": "yes"}), {}),
        (
            Ending(state=State.REJECTED, record={"ret_code": "5003", "ret_msg": "", "verified": "yes"}),
            {"sta_refund": "1"},
        ),
    ],
)
async def test_a_notification_that_contradicts_the_journal_is_never_acted_on(journal, handler, recorded, changes):
    """Another amount or time than requested, another final state than recorded, or a state after a rejection."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    await begin(journal)
    if recorded is not None:
        await journal.finish(await journal.find("R-1"), recorded)
    before = await journal.find("R-1")
    assert (await endpoint.handle(notification(**changes), HEADERS)).status == 409
    after = await journal.find("R-1")
    assert after == before if recorded else after.state is State.CONFLICT
    assert not handler.begun
    assert endpoint.counts == {"contradictory": 1}


async def test_a_second_worker_acts_on_nothing_twice(journal, handler):
    """Endpoints that share a journal call the handler once in total, whichever endpoint gets the duplicates."""
    workers = [NotificationEndpoint(trusting(), handler, journal=journal) for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for number in range(4):
            for worker in workers:
                tasks.start_soon(worker.handle, notification(number), HEADERS)
    assert sorted(handler.numbers) == ["R-0", "R-1", "R-2", "R-3"]
    counts = sum((worker.counts for worker in workers), start=workers[0].counts.__class__())
    assert counts == {"acted": 4, "duplicate": 8}


async def test_a_worker_that_died_loses_its_lease(handler):
    """A refund that a dead worker had leased is BUSY until the lease ends; then the next delivery is acted on."""
    now = [journals.now()]
    async with MemoryJournal() as journal:
        endpoint = NotificationEndpoint(trusting(), fails, journal=journal, clock=lambda: now[0])
        await endpoint.handle(notification(), HEADERS)
        inbox = await journal.inbox()
        [left] = [entry async for entry in inbox.pending()]
        intent = journals.intent(left.no_refund, fields=left.fields, lease=8)
        await inbox.begin(intent, now[0])
        endpoint = NotificationEndpoint(
            trusting(), handler, journal=journal, handler_seconds=0.01, clock=lambda: now[0]
        )
        assert (await endpoint.handle(notification(), HEADERS)).status == 503
        now[0] = now[0].after(8)
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert handler.numbers == ["R-1"]


async def test_without_a_working_journal_nothing_is_acknowledged(handler, caplog, tmp_path):
    """If the journal is closed or fails, the response is 500, and LianLian delivers again."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    assert (await endpoint.handle(notification(), HEADERS)).status == 500
    assert "not open" in caplog.text
    async with journal:
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
        (tmp_path / "journal.sqlite-inbox").unlink()
        assert (await endpoint.handle(notification(2), HEADERS)).status == 500
    assert "was removed" in caplog.text
    assert handler.numbers == ["R-1"]
    assert endpoint.counts == {"failed": 2, "acted": 1}


async def test_the_endpoint_opens_a_journal_that_is_not_open(handler, tmp_path):
    """The endpoint also closes that journal; a journal that its user opened stays open."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    for number in (1, 2):
        async with endpoint:
            assert journal.is_open
            assert is_acknowledged(await endpoint.handle(notification(number), HEADERS))
            with pytest.raises(RuntimeError, match="already open"):
                await endpoint.__aenter__()
        assert not journal.is_open
    async with journal:
        async with endpoint:
            pass
        assert journal.is_open
        assert is_acknowledged(await endpoint.handle(notification(3), HEADERS))
    assert handler.numbers == ["R-1", "R-2", "R-3"]


async def test_a_journal_may_be_opened_again_without_the_endpoint(handler, tmp_path):
    """For example, each test starts an application whose lifespan opens the journal, but not the inline endpoint."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    for number in (1, 2):
        async with journal:
            await deliver(endpoint, number)
    assert handler.numbers == ["R-1", "R-2"]


async def test_a_notification_before_the_inbox_is_open_does_not_stop_the_endpoint(handler, tmp_path):
    """For example, it arrives while the endpoint closes, before the application starts again."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal, inbox=True)
    async with journal:
        assert (await endpoint.handle(notification(), HEADERS)).status == 500
    async with endpoint:
        await deliver(endpoint, 1)
        await until(lambda: handler.numbers)


@pytest.mark.parametrize("enters", [True, False], ids=["async with", "first delivery"])
async def test_an_endpoint_refuses_the_journal_of_another_merchant(journal, handler, caplog, enters):
    """A notification for another merchant must not resolve a refund of the journal's owner."""
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal)
    await journal.bind("201304121000001004", endpoint.merchant.endpoints.apply)
    await begin(journal)
    before = await journal.find("R-1")
    if enters:
        with pytest.raises(ConfigurationError, match="belongs to merchant 201304121000001004"):
            await endpoint.__aenter__()
    else:
        assert (await endpoint.handle(notification(), HEADERS)).status == 500
        assert "belongs to merchant 201304121000001004" in caplog.text
    assert await journal.find("R-1") == before
    assert not handler.begun


async def test_an_endpoint_refuses_the_inbox_of_a_rehearsal(handler, tmp_path):
    """If only the journal's file was deleted, the refunds of the rehearsal would count as handled in production."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    async with NotificationEndpoint(trusting(), handler, journal=journal) as endpoint:
        await deliver(endpoint, 1)
    (tmp_path / "journal.sqlite").unlink()
    production = trusting(endpoints=Endpoints())
    with pytest.raises(ConfigurationError, match=r"journal\.sqlite-inbox belongs to merchant"):
        await NotificationEndpoint(production, handler, journal=journal).__aenter__()
    assert not journal.is_open


async def test_an_inbox_is_worked_off_before_the_endpoint_closes_its_journal(handler, tmp_path):
    """A running handler finishes, and its return is recorded before the journal is closed."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    release = anyio.Event()
    handler.then.append(release.wait)
    async with inbox(journal, handler) as endpoint:
        await deliver(endpoint, 1)
        await until(lambda: handler.begun)
        release.set()
    assert (handler.numbers, journal.is_open) == (["R-1"], False)
    async with journal:
        assert (await (await journal.inbox()).counts())[State.DONE] == 1


async def test_a_start_that_fails_closes_the_journal_again(handler, tmp_path):
    """If a key cannot be read, the journal is unlocked, and the endpoint can be started again."""
    key = tmp_path / "gateway.pem"
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=key), handler, journal=journal)
    with pytest.raises(ConfigurationError):
        await endpoint.__aenter__()
    assert not journal.is_open
    key.write_text(keypairs.pair("gateway").public_pem)
    async with endpoint:
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))


@pytest.mark.parametrize("is_inbox", [False, True])
async def test_an_endpoint_whose_journal_is_not_open_says_how_to_open_it(handler, caplog, tmp_path, is_inbox):
    """Under a server that runs no lifespan, the response is 500, and the log says how to open the journal."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal, inbox=is_inbox)
    assert (await endpoint.handle(notification(), HEADERS)).status == 500
    for words in ("journal.sqlite> is not open", "in `async with`", "--lifespan on"):
        assert words in caplog.text
    assert not handler.begun


# ── what frameworks hand over ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [notification().decode(), wire.decode(notification()), None])
async def test_a_body_that_is_not_bytes_is_a_clear_error(endpoint, handler, body):
    """A wrong type is a bug in the program, so it raises TypeError."""
    with pytest.raises(TypeError, match=f"body: must be the raw bytes of the request body, not {type(body).__name__}"):
        await endpoint.handle(body, HEADERS)
    assert not endpoint.counts
    assert is_acknowledged(await endpoint.handle(bytearray(notification()), HEADERS))


@pytest.mark.parametrize(
    "kind",
    [
        dict,
        lambda pairs: pairs,
        httpx.Headers,
        multidict.CIMultiDict,
        lambda pairs: starlette.datastructures.Headers(raw=[(k.encode(), v.encode()) for k, v in pairs]),
        lambda pairs: email.parser.Parser().parsestr("".join(f"{k}: {v}\n" for k, v in pairs)),
    ],
    ids=["dict", "pairs", "httpx", "aiohttp", "starlette", "http.server"],
)
async def test_headers_may_be_of_any_framework(handler, kind):
    """Headers may be a mapping or pairs, with names in upper or lower case."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=PROXIES)
    headers = kind([("content-type", "text/json"), ("x-ForwardeD-for", "203.0.113.7")])
    assert is_acknowledged(await endpoint.handle(notification(), headers, client="10.1.2.3"))


@pytest.mark.parametrize("headers", [None, "x-forwarded-for: 203.0.113.7", 7, [(b"x-forwarded-for", b"203.0.113.7")]])
async def test_headers_of_another_kind_are_a_clear_error(handler, headers):
    """With an allow-list, headers of a wrong type raise TypeError."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=PROXIES)
    with pytest.raises(TypeError, match=r"headers: must be a mapping of str to str, or \(name, value\) pairs of str"):
        await endpoint.handle(notification(), headers, client="10.1.2.3")


# ── confirming ───────────────────────────────────────────────────────────────────────────────────


@virtual
async def test_the_gateway_is_asked_before_the_handler_runs(handler):
    """With confirm, the handler is called only if the gateway reports the same state; else LianLian delivers again."""
    gateway = sandbox(settle_after=60)
    async with gateway.session(clock=boot_clock) as session:
        endpoint = NotificationEndpoint(session.merchant, handler, session=session, confirm=True, clock=boot_clock)
        assert (await endpoint.handle(notification(oid_refundno=None), HEADERS)).status == 500  # no such refund
        await session.apply_refund(refund_request())
        assert (await endpoint.handle(notification(oid_refundno=None), HEADERS)).status == 500  # not final
        await anyio.sleep(60)
        assert (await endpoint.handle(notification(2, oid_refundno=None), HEADERS)).status == 500  # another one
        assert not handler.begun
        assert is_acknowledged(await endpoint.handle(notification(oid_refundno=None), HEADERS))
        assert is_acknowledged(await endpoint.handle(notification(oid_refundno=None), HEADERS))
    assert handler.numbers == ["R-1"]
    assert gateway.requests["query"] == 4
    assert endpoint.counts == {"failed": 3, "acted": 1, "duplicate": 1}


@virtual
async def test_a_confirmed_record_must_have_the_notified_amount(handler, caplog):
    """With confirm, the handler is not called for an amount that the gateway's record does not have."""
    gateway = sandbox(settle_after=0)
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request(money_refund=Decimal("5.00")))
        endpoint = NotificationEndpoint(session.merchant, handler, session=session, confirm=True, clock=boot_clock)
        assert (await endpoint.handle(notification(oid_refundno=None), HEADERS)).status == 500
    assert not handler.begun
    assert "another money_refund: ours 10.00, recorded 5.00" in caplog.text


@virtual
async def test_the_journal_supplies_a_missing_dt_refund_for_the_query(handler):
    """The domestic product omits dt_refund, which a query requires: it is read from the journal."""
    gateway = sandbox(settle_after=0)
    async with MemoryJournal() as journal, gateway.session(clock=boot_clock, journal=journal) as session:
        await session.apply_refund(refund_request())
        for known in (MemoryJournal(), journal):
            endpoint = NotificationEndpoint(
                session.merchant, handler, session=session, journal=known, confirm=True, clock=boot_clock
            )
            await endpoint.handle(notification(dt_refund=None, oid_refundno=None), HEADERS)
            assert handler.numbers == (["R-1"] if known is journal else [])


# ── what a notification leaves out ───────────────────────────────────────────────────────────────

LEFT_OUT = [("sta_refund",), ("money_refund",), ("no_refund",), ("sta_refund", "money_refund")]


@virtual
@pytest.mark.parametrize("names", LEFT_OUT, ids="+".join)
async def test_missing_fields_of_a_notification_are_queried(handler, names):
    """On LianLian's page every field except the refund's number is optional: a query supplies the missing fields."""
    gateway = sandbox(settle_after=0)
    async with gateway.session(clock=boot_clock) as session:
        made_refund = await session.apply_refund(refund_request())
        endpoint = NotificationEndpoint(session.merchant, handler, session=session, clock=boot_clock)
        body = notification(oid_refundno=made_refund.oid_refundno, **dict.fromkeys(names))
        for _ in range(2):
            assert is_acknowledged(await endpoint.handle(body, HEADERS))
    [refund] = handler.done
    assert (refund.no_refund, refund.sta_refund, refund.money_refund) == ("R-1", "2", Decimal("10.00"))
    assert endpoint.counts == {"acted": 1, "duplicate": 1}


@virtual
async def test_the_journal_supplies_dt_refund_for_missing_fields(handler, caplog):
    """Without a dt_refund no query is possible: the notification is not acknowledged, and the log names the field."""
    gateway = sandbox(settle_after=0)
    body = notification(sta_refund=None, dt_refund=None, oid_refundno=None)
    async with MemoryJournal() as journal, gateway.session(clock=boot_clock, journal=journal) as session:
        await session.apply_refund(refund_request())
        for known, verdict in ((MemoryJournal(), "incomplete"), (journal, "acted")):
            endpoint = NotificationEndpoint(session.merchant, handler, session=session, journal=known, clock=boot_clock)
            await endpoint.handle(body, HEADERS)
            assert endpoint.counts == {verdict: 1}
        await endpoint.handle(notification(2, sta_refund=None, dt_refund=None), HEADERS)  # the journal has no such one
        assert endpoint.counts == {"acted": 1, "incomplete": 1}
    assert handler.numbers == ["R-1"]
    assert "no sta_refund; the query failed: dt_refund: is required" in caplog.text


@virtual
async def test_an_incomplete_notification_is_not_acknowledged_before_the_refund_is_final(handler):
    """The notification may report a final state that the gateway's query service does not know yet."""
    gateway = sandbox(settle_after=60)
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request())
        endpoint = NotificationEndpoint(session.merchant, handler, session=session, clock=boot_clock)
        body = notification(sta_refund=None, oid_refundno=None)
        assert (await endpoint.handle(body, HEADERS)).status == 503
        await anyio.sleep(60)
        assert is_acknowledged(await endpoint.handle(body, HEADERS))
    assert handler.numbers == ["R-1"]


async def answered(handler, body, record):
    """Return the response to a notification if the gateway answers each query with ``record``."""

    async def answer(_):
        return httpx.Response(200, content=as_json(record), headers={"Content-Type": "application/json"})

    transport = httpx.MockTransport(answer)
    async with RefundSession(trusting(), transport=transport, retry=RetryPolicy(attempts=1)) as session:
        endpoint = NotificationEndpoint(session.merchant, handler, session=session)
        ack = await endpoint.handle(body, HEADERS)
    assert not handler.begun
    return ack.status, dict(endpoint.counts)


async def test_a_record_that_lacks_the_field_too_does_not_help(handler):
    """If the record lacks the field too, the notification is not acknowledged."""
    ended = await answered(handler, notification(money_refund=None), made(asked(), sta_refund="2", money_refund=None))
    assert ended == (503, {"incomplete": 1})


@pytest.mark.parametrize(
    "record",
    [
        {"sta_refund": "2", "money_refund": "11.00"},
        {"sta_refund": "2", "dt_refund": "20260101000000"},
        {"sta_refund": "3"},
    ],
)
async def test_record_that_contradicts_the_notification_is_refused(handler, record):
    """The fields in the notification must agree with the gateway's record that completes it."""
    left_out = "money_refund" if record == {"sta_refund": "3"} else "sta_refund"
    ended = await answered(handler, notification(**{left_out: None}), made(asked(), **record))
    assert ended == (409, {"contradictory": 1})


async def test_a_forged_record_is_not_taken_for_a_forged_notification(handler):
    """An invalid signature of the query's answer makes the notification INCOMPLETE, not UNVERIFIED."""
    record = made(asked(), key=keypairs.pair("stranger").private, sta_refund="2")
    assert await answered(handler, notification(sta_refund=None), record) == (503, {"incomplete": 1})


@pytest.mark.parametrize("text", ["10", "10.0", "10.000"])
async def test_amounts_are_compared_by_value(endpoint, handler, text):
    """The number of decimals in an amount makes no difference."""
    assert is_acknowledged(await endpoint.handle(notification(money_refund=text), HEADERS))
    assert [refund.money_refund for refund in handler.done] == [Decimal("10.00")]


async def test_a_notification_with_an_unsigned_field_is_not_believed_and_says_so(endpoint, handler, caplog):
    """If only an undocumented field is not signed, the log names it, and the handler is not called."""
    body = as_json({**wire.decode(notification()), "bank_name": "x"})
    assert (await endpoint.handle(body, HEADERS)).status == 403
    assert not handler.begun
    assert "valid without the undocumented fields 'bank_name'" in caplog.text


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


class SeenVerifyingKey(VerifyingKey):
    """A key that records in which thread it verifies."""

    threads: list[int]

    def verify(self, source, signature):
        self.threads.append(threading.get_ident())
        return super().verify(source, signature)


@pytest.mark.parametrize(("seconds", "inline"), [(0.0, False), (1e9, True)])
async def test_verification_runs_on_the_event_loop_only_if_it_is_fast(monkeypatch, handler, seconds, inline):
    """If verifying a signature is slow, it is done in the thread."""
    monkeypatch.setattr(rsa_worker, "INLINE_VERIFY_SECONDS", seconds)
    monkeypatch.setattr(SeenVerifyingKey, "threads", [], raising=False)
    key = SeenVerifyingKey.load(keypairs.pair("gateway").public_pem)
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=key), handler)
    async with endpoint:
        SeenVerifyingKey.threads.clear()
        assert is_acknowledged(await endpoint.handle(notification(), HEADERS))
    assert {thread == threading.get_ident() for thread in SeenVerifyingKey.threads} == {inline}


async def test_keys_are_loaded_once(handler, tmp_path):
    """Concurrent first notifications load the keys once; the key file may be deleted afterwards."""
    file = tmp_path / "gateway.pem"
    file.write_text(keypairs.pair("gateway").public_pem)
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=file), handler)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(endpoint.handle, notification(number), HEADERS)
    file.unlink()
    assert is_acknowledged(await endpoint.handle(notification(4), HEADERS))
    assert len(handler.done) == 4


async def test_unreadable_key_fails_the_start(handler, tmp_path):
    """`async with` raises the error; without `async with`, each delivery gets 500."""
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=tmp_path / "missing.pem"), handler)
    assert (await endpoint.handle(notification(), HEADERS)).status == 500
    with pytest.raises(ConfigurationError, match="gateway_public_keys"):
        async with endpoint:
            pass


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confirm": True}, "confirm=True requires session="),
        ({"inbox": True}, "inbox=True requires a journal"),
        ({"handler_seconds": 0}, "handler_seconds: must be a number of seconds greater than 0"),
        ({"handler_seconds": float("nan")}, "handler_seconds"),
        ({"handler_seconds": "4"}, "handler_seconds: must be a number of seconds greater than 0 .* is '4'"),
        ({"handler_seconds": float("inf")}, "handler_seconds: .* at most 1000000000, is inf"),
        ({"handler_seconds": 1e12}, "handler_seconds: .* is 1000000000000.0"),
        ({"merchant": OID_PARTNER}, "merchant: must be of type Merchant, not str"),
        ({"on_refund": None}, "on_refund: must be of type Callable, not NoneType"),
        ({"journal": "refunds.db"}, "journal: must be a journal, such as SqliteJournal"),
        ({"session": "s"}, "session: must be of type .*RefundSession | None, not str"),
        ({"concurrency": True}, "concurrency: must be an integer of at least 1, is True"),
        ({"body_seconds": 0}, "body_seconds: must be a number of seconds greater than 0"),
        ({"body_seconds": float("inf")}, "body_seconds: .* at most 1000000000, is inf"),
        ({"concurrency": 0}, "concurrency"),
        ({"allow_from": ["203.0.113.7/24"]}, "allow_from: .*host bits"),
        ({"trusted_proxies": ["proxy"]}, "trusted_proxies: "),
        ({"allow_from": ["unix"]}, "allow_from: "),
        ({"path": "lianlian/refund"}, "path: must begin with a slash, is 'lianlian/refund'"),
    ],
)
async def test_contradictory_settings_are_refused(handler, settings, message):
    """Unusable or contradictory arguments are refused when the endpoint is created."""
    with pytest.raises(ConfigurationError, match=message):
        NotificationEndpoint(**{"merchant": trusting(), "on_refund": handler} | settings)


async def test_the_repr_names_the_merchant(endpoint):
    """The repr contains only the merchant number."""
    assert repr(endpoint) == f"<NotificationEndpoint {OID_PARTNER}>"


# ── addresses ────────────────────────────────────────────────────────────────────────────────────

BANK = ["203.0.113.0/24", "2001:db8::/32"]
PROXIES = ["10.0.0.0/8", "::1"]


@pytest.mark.parametrize(
    ("client", "forwarded", "admitted"),
    [
        ("203.0.113.7", None, True),
        ("::ffff:203.0.113.7", None, True),
        ("2001:db8::7", None, True),
        ("198.51.100.7", None, False),
        ("", None, False),
        (None, None, False),
        ("testclient", None, False),
        # A client that is no trusted proxy cannot name another address …
        ("198.51.100.7", "203.0.113.7", False),
        ("203.0.113.7", "198.51.100.7", True),
        # … a trusted proxy can name its own client; the client may have invented the addresses before that.
        ("10.1.2.3", "203.0.113.7", True),
        ("::1", "203.0.113.7, 10.9.9.9", True),
        ("10.1.2.3", "203.0.113.7, 198.51.100.7", False),
        ("10.1.2.3", "198.51.100.7,203.0.113.7", True),
        ("10.1.2.3", None, False),
        ("10.1.2.3", "10.4.5.6", False),
        ("10.1.2.3", "nonsense", False),
        ("10.1.2.3", "203.0.113.7, ", False),
        # Some proxies write ports or brackets.
        ("10.1.2.3", "203.0.113.7:4711", True),
        ("10.1.2.3", "[2001:db8::7]:4711", True),
        ("10.1.2.3", "[2001:db8::7]", True),
        ("10.1.2.3", '"203.0.113.7"', False),
        ("10.1.2.3", "::ffff:203.0.113.7", True),
        ("10.1.2.3", "[::ffff:203.0.113.7]:4711", True),
        ("10.1.2.3", "203.0.113.7:4711, 10.9.9.9:80", True),
        ("10.1.2.3", "198.51.100.7:4711", False),
        ("10.1.2.3", "203.0.113.7, [2001:dead::7]:4711", False),
        ("10.1.2.3", "203.0.113.7:", False),
        ("10.1.2.3", "203.0.113.7:http", False),
        ("10.1.2.3", "[2001:db8::7", False),
        ("10.1.2.3", "2001:db8::7]:4711", False),
        ("10.1.2.3", "unix", False),
        ("10.1.2.3", "unknown", False),
    ],
)
async def test_the_allow_list_admits_its_networks(handler, caplog, client, forwarded, admitted):
    """The nearest address that is not a trusted proxy decides; bodies of other clients are not read."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=PROXIES)
    headers = HEADERS if forwarded is None else {**HEADERS, "X-Forwarded-For": forwarded}
    ack = await endpoint.handle(notification(), headers, client=client)
    assert (is_acknowledged(ack), ack.status) == (admitted, 200 if admitted else 403)
    assert endpoint.counts == {"acted" if admitted else "not admitted": 1}
    assert bool(caplog.records) is not admitted


@pytest.mark.parametrize(
    ("client", "forwarded", "judged"),
    [
        ("198.51.100.7", "203.0.113.7", "198.51.100.7"),
        ("10.1.2.3", "203.0.113.7, 198.51.100.7:4711", "198.51.100.7"),
        ("10.1.2.3", "", "10.1.2.3"),
        ("10.1.2.3", "10.4.5.6", "10.4.5.6"),
        ("10.1.2.3", "un\nknown" + "x" * 200, "'un?known" + "x" * 92 + "'"),
        (
            None,
            "203.0.113.7",
            'a peer without an IP address (for a proxy on a Unix socket, add "unix" to trusted_proxies)',
        ),
    ],
)
async def test_the_log_names_the_address_that_was_judged(handler, caplog, client, forwarded, judged):
    """The log has the client's address, not the proxy's address."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=PROXIES)
    headers = {**HEADERS, "X-Forwarded-For": forwarded}
    assert (await endpoint.handle(notification(), headers, client=client)).status == 403
    assert caplog.messages == [f"notification refused: {judged} is not on the allow-list"]


async def test_the_log_names_a_proxy_on_a_unix_socket_that_names_no_client(handler, caplog):
    """The proxy is trusted already, so the log does not advise to declare it."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=["unix"])
    assert (await endpoint.handle(notification(), HEADERS)).status == 403
    assert caplog.messages == ["notification refused: a trusted proxy on a Unix socket is not on the allow-list"]


@pytest.mark.parametrize("client", [None, ""])
@pytest.mark.parametrize(
    ("proxies", "forwarded", "status"),
    [
        ([], "203.0.113.7", 403),
        (PROXIES, "203.0.113.7", 403),
        (["unix"], "203.0.113.7", 200),
        (["unix", *PROXIES], "203.0.113.7, 10.1.2.3", 200),
        (["unix"], "203.0.113.7, 198.51.100.7", 403),
        (["unix"], "", 403),
    ],
)
async def test_proxy_on_a_unix_socket_is_trusted_if_it_is_declared(handler, client, proxies, forwarded, status):
    """A peer on a Unix socket has no address, so X-Forwarded-For is trusted only if ``unix`` is declared."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=proxies)
    headers = {**HEADERS, "X-Forwarded-For": forwarded}
    assert (await endpoint.handle(notification(), headers, client=client)).status == status


async def test_request_that_passed_only_trusted_proxies_is_refused(handler):
    """A request that passed only trusted proxies is not allowed."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=["10.1.0.0/16"], trusted_proxies=["10.0.0.0/8"])
    assert (await endpoint.handle(notification(), HEADERS, client="10.1.2.3")).status == 403


# ── ASGI ─────────────────────────────────────────────────────────────────────────────────────────


@attrs.define
class Server:
    """The server's side of an ASGI call: the messages that it delivers, in order, and the messages that it received."""

    says: list
    heard: list = attrs.field(factory=list)

    async def receive(self):
        return self.says.pop(0)

    async def send(self, message):
        self.heard.append(message)

    @property
    def status(self):
        return self.heard[0]["status"]


def post(**changes):
    return {"type": "http", "method": "POST", "path": "/refund", "headers": [], "client": None, **changes}


def pieces(*bodies):
    return [{"type": "http.request", "body": body, "more_body": True} for body in bodies] + [{"type": "http.request"}]


async def test_the_object_is_an_asgi_application(endpoint, handler):
    """A body in several messages is joined, and the acknowledgement has a Content-Length."""
    body = notification()
    server = Server(pieces(body[:100], b"", body[100:]))
    await endpoint(post(), server.receive, server.send)
    start, rest = server.heard
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert dict(start["headers"]) == {b"content-type": b"application/json;charset=utf-8", b"content-length": b"34"}
    assert rest == {"type": "http.response.body", "body": b'{"ret_code":"0000","ret_msg":"ok"}', "more_body": False}
    assert handler.numbers == ["R-1"]


async def test_disconnect_in_the_body_is_malformed(endpoint, handler):
    """If the client disconnects in its body, the notification is malformed."""
    server = Server([*pieces(notification()[:100])[:1], {"type": "http.disconnect"}])
    await endpoint(post(), server.receive, server.send)
    assert server.status == 400
    assert not handler.begun


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"method": "GET"}, 405),
        ({"method": "PUT"}, 405),
        ({"path": "/refund/"}, 404),
        ({"path": "/"}, 404),
        ({"path": "/shop/refund"}, 404),
        ({"path": "/shop/refund", "root_path": "/shop"}, 200),
        ({"path": "/refund", "root_path": ""}, 200),
    ],
)
async def test_only_post_to_the_exact_path_is_served(handler, changes, status):
    """The responses are 404 and 405 (with Allow); neither is counted, and neither waits for a body."""
    endpoint = NotificationEndpoint(trusting(), handler, path="/refund")
    server = Server(pieces(notification()))
    await endpoint(post(**changes), server.receive, server.send)
    assert server.status == status
    headers = dict(server.heard[0]["headers"])
    assert headers.get(b"allow") == (b"POST" if status == 405 else None)
    assert headers.get(b"connection") == (None if status == 200 else b"close")
    assert endpoint.counts.total() == (status == 200)


async def test_without_a_path_every_path_is_served(endpoint):
    """Without ``path``, the surrounding application does the routing."""
    server = Server(pieces(notification()))
    await endpoint(post(path="/any/where"), server.receive, server.send)
    assert server.status == 200


async def test_an_endless_body_is_read_no_further_than_is_needed(endpoint):
    """The response is 413 as soon as more than 64 KiB have arrived; then the connection is closed."""
    says = itertools.repeat({"type": "http.request", "body": b" " * 40_000, "more_body": True})
    server = Server([next(says) for _ in range(9)])
    await endpoint(post(), server.receive, server.send)
    assert (server.status, len(server.says)) == (413, 7)
    assert dict(server.heard[0]["headers"])[b"connection"] == b"close"


@virtual
@pytest.mark.parametrize(("seconds", "status"), [(4.9, 200), (5.1, 408)])
async def test_the_whole_body_has_a_time_limit(endpoint, handler, seconds, status, caplog):
    """A slow body does not extend the limit: 408 after 5 seconds, then the connection is closed."""

    class Trickling(Server):
        async def receive(self):
            await anyio.sleep(seconds / 3)
            return await super().receive()

    body = notification()
    server = Trickling(pieces(body[:100], body[100:]))
    await endpoint(post(), server.receive, server.send)
    assert server.status == status
    assert dict(server.heard[0]["headers"]).get(b"connection") == (None if status == 200 else b"close")
    assert anyio.current_time() == pytest.approx(min(seconds, 5.0))
    assert endpoint.counts == {"acted" if status == 200 else "too slow": 1}
    assert ("did not arrive within 5 s" in caplog.text) is (status == 408)


@virtual
async def test_the_time_limit_of_the_body_is_an_option_and_no_limit_of_the_handler():
    """The time limit of the body does not cancel a slow handler."""
    handler = Handler([partial(anyio.sleep, 3)])
    endpoint = NotificationEndpoint(trusting(), handler, body_seconds=1)
    server = Server(pieces(notification()))
    await endpoint(post(), server.receive, server.send)
    assert server.status == 200
    await endpoint(post(), anyio.sleep_forever, (server := Server([])).send)
    assert (server.status, anyio.current_time()) == (408, pytest.approx(4))


async def test_a_refusal_over_http_2_has_no_connection_header(endpoint):
    """Header fields about the connection are forbidden there (RFC 9113 §8.2.2)."""
    server = Server(pieces(b"{"))
    await endpoint(post(http_version="2"), server.receive, server.send)
    assert server.status == 400
    assert b"connection" not in dict(server.heard[0]["headers"])


async def test_body_of_a_disallowed_client_is_not_read(handler):
    """The allow-list is checked before the body is read."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK)
    server = Server(pieces(notification()))
    await endpoint(post(client=("198.51.100.7", 1)), server.receive, server.send)
    assert (server.status, len(server.says)) == (403, 2)


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (("203.0.113.7", 1234), [], 200),
        (("198.51.100.7", 1234), [], 403),
        (None, [], 403),
        (("10.0.0.1", 1), [(b"x-forwarded-for", b"203.0.113.7")], 200),
        (("10.0.0.1", 1), [(b"x-forwarded-for", b"203.0.113.7"), (b"X-Forwarded-For", b"198.51.100.7")], 403),
        (("10.0.0.1", 1), [(b"x-forwarded-for", b"198.51.100.7"), (b"x-forwarded-for", b"203.0.113.7")], 200),
    ],
)
async def test_the_allow_list_reads_the_address_from_the_server(handler, client, headers, status):
    """The client's address comes from the ASGI scope; several X-Forwarded-For headers form one list."""
    endpoint = NotificationEndpoint(trusting(), handler, allow_from=BANK, trusted_proxies=PROXIES)
    server = Server(pieces(notification()))
    await endpoint(post(client=client, headers=headers), server.receive, server.send)
    assert server.status == status


async def test_a_websocket_is_declined(endpoint):
    """A websocket is closed without an error."""
    server = Server([{"type": "websocket.connect"}])
    await endpoint({"type": "websocket", "path": "/refund"}, server.receive, server.send)
    assert server.heard == [{"type": "websocket.close"}]


LIFESPAN = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]


async def test_the_lifespan_opens_and_closes_the_endpoint(endpoint):
    """Keys are loaded before the server accepts requests; the endpoint can be started again after its end."""
    for _ in range(2):
        server = Server(LIFESPAN.copy())
        await endpoint({"type": "lifespan"}, server.receive, server.send)
        assert server.heard == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


async def test_a_failed_start_is_reported_to_the_server(handler, tmp_path):
    """A failed start is sent to the server: after a mere exception, a server would accept requests."""
    endpoint = NotificationEndpoint(trusting(gateway_public_keys=tmp_path / "missing.pem"), handler)
    server = Server(LIFESPAN.copy())
    with pytest.raises(ConfigurationError):
        await endpoint({"type": "lifespan"}, server.receive, server.send)
    [failed] = server.heard
    assert failed["type"] == "lifespan.startup.failed"
    assert "gateway_public_keys" in failed["message"]


async def test_a_failed_shutdown_is_reported_to_the_server(endpoint):
    """A shutdown that is interrupted is reported to the server as failed."""

    class Cut(Server):
        async def receive(self):
            message = await super().receive()
            if message["type"] == "lifespan.shutdown":
                raise KeyboardInterrupt
            return message

    server = Cut(LIFESPAN.copy())
    with pytest.raises(KeyboardInterrupt):
        await endpoint({"type": "lifespan"}, server.receive, server.send)
    assert [message["type"] for message in server.heard] == ["lifespan.startup.complete", "lifespan.shutdown.failed"]


async def test_endpoint_mounted_in_starlette(handler):
    """Under a Mount, ``path`` is relative to the mount point."""
    endpoint = NotificationEndpoint(trusting(), handler, path="/refund")
    app = Starlette(routes=[Mount("/lianlian", endpoint)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://shop.example") as http:
        for path, status in (("/lianlian/refund", 200), ("/lianlian/other", 404), ("/refund", 404)):
            assert (await http.post(path, content=notification(), headers=HEADERS)).status_code == status
    assert handler.numbers == ["R-1"]


async def test_a_queried_record_is_handled_like_a_notification(endpoint, handler):
    """A captured 0000 answer that someone posts to the endpoint is true, so it is accepted."""
    assert is_acknowledged(await endpoint.handle(as_json(made(asked(), sta_refund="2")), HEADERS))
    assert handler.numbers == ["R-1"]
