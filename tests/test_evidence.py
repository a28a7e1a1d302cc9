"""Which evidence proves a refund: reused numbers, rejections, and a query service without records."""

from __future__ import annotations

import pickle
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import anyio
import httpx
import pytest

from lianlian_async import (
    Endpoints,
    JournalError,
    NotificationEndpoint,
    RefundConflict,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRejected,
    RefundSession,
    RetryPolicy,
    wire,
)
from lianlian_async.clock import Moment
from lianlian_async.flight import choose_canary
from lianlian_async.journal import Entry, MemoryJournal, SqliteJournal, State
from lianlian_async.recovery import Resumed
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support.notices import HEADERS, Handler, is_acknowledged, notification
from tests.support.parties import EPOCH, as_json, boot_clock, made, refund_request, sandbox, sealed, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

DUPLICATE = ("1002", "9983", "4002")
IN_PROGRESS = ("1003", "2005", "2008")


class Gateway(httpx.AsyncBaseTransport):
    """Answers each apply call with ``code``, and each query with ``record`` (None: no such record)."""

    def __init__(self, code, record=None, *, then=None):
        self.codes = [code]
        self.then = then or code
        self.record = record
        self.applied = 0
        self.queries = 0

    async def handle_async_request(self, request):
        fields = wire.decode(await request.aread())
        if "money_refund" in fields:
            self.applied += 1
            code = self.codes.pop() if self.codes else self.then
            if code == "0000":
                return httpx.Response(200, content=as_json(made(fields)))
            return httpx.Response(200, content=as_json(sealed({"ret_code": code, "ret_msg": "?"})))
        self.queries += 1
        if self.record is None:
            return httpx.Response(200, content=as_json({"ret_code": "8901", "ret_msg": "没有记录"}))
        return httpx.Response(200, content=as_json(made(fields, **self.record)))


@pytest.fixture(params=["no journal", "memory", "sqlite"])
def new_journal(request, tmp_path):
    """Creates the journals of successive processes; None: one session without a journal."""
    if request.param == "no journal":
        return None
    shared = MemoryJournal()
    return (lambda: shared) if request.param == "memory" else (lambda: SqliteJournal(tmp_path / "journal.sqlite"))


async def attempts(gateway, new_journal, *pauses, request=None, **options):
    """Return the outcomes of several calls for one refund, with these pauses in seconds, each in a new process.

    Without a journal a later process is handed the ``RefundOutcomeUnknown`` of the one before.
    """
    merchant, results = sandbox().merchant(), []
    for pause in (*pauses, None):
        session = RefundSession(merchant, transport=gateway, clock=boot_clock, **options)
        if new_journal is None:
            async with session:
                earlier = pickle.loads(pickle.dumps(results[-1].error)) if results else None
                earlier = earlier if isinstance(earlier, RefundOutcomeUnknown) else None
                results.append(await session.outcome_of(request or refund_request(), earlier=earlier))
        else:
            async with new_journal() as journal, session:
                results.append(await session.outcome_of(request or refund_request(), journal=journal))
        if pause is not None:
            await anyio.sleep(pause)
    return results


# ── a number that was used before ────────────────────────────────────────────────────────────────


async def test_a_gateway_that_replays_its_first_answer_made_no_second_refund():
    """The answer for the same number and amount on another day is signed, but proves another refund."""
    gateway = sandbox(repeated=Repeated.REPLAY)
    reused = refund_request(dt_refund=EPOCH + timedelta(days=1))
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request())
    async with gateway.session(clock=boot_clock) as session:
        with pytest.raises(RefundConflict) as caught:
            await session.apply_refund(reused)
    assert (caught.value.field, caught.value.theirs) == ("dt_refund", wire.format_timestamp(EPOCH))
    assert caught.value.record["no_refund"] == "R-1"
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize(
    ("told", "field"), [({"dt_refund": "20260106160000"}, "dt_refund"), ({"money_refund": "9.00"}, None)]
)
async def test_query_refund_compares_the_fields_of_the_query(told, field, caplog):
    """A query contains a time and no amount. A conflict is logged as a warning, so that an alert fires."""
    query = RefundQuery(no_refund="R-1", dt_refund=EPOCH)
    async with RefundSession(sandbox().merchant(), transport=Gateway("0000", told), clock=boot_clock) as session:
        if field is None:
            assert (await session.query_refund(query)).money_refund == Decimal("9.00")
            return
        with pytest.raises(RefundConflict) as caught:
            await session.query_refund(query)
    assert (caught.value.field, caught.value.no_refund) == (field, "R-1")
    assert [(each.levelname, each.message) for each in caplog.records] == [("WARNING", str(caught.value))]


@pytest.mark.parametrize("code", DUPLICATE)
async def test_a_duplicate_number_without_a_record_ends_as_rejected(code, new_journal):
    """Always "duplicate" and never a record: after the grace the refund is certainly not made."""
    gateway = Gateway(code)
    results = await attempts(gateway, new_journal, 600, 600)
    assert [type(outcome.error) for outcome in results] == [RefundOutcomeUnknown] * 2 + [RefundRejected]
    assert results[-1].error.ret_code == code
    assert gateway.applied == 1


@pytest.mark.parametrize("code", [*DUPLICATE, *IN_PROGRESS])
@pytest.mark.parametrize("missing", ["dt_refund", "money_refund"])
async def test_a_rejected_number_is_not_proved_by_half_a_record(code, missing, new_journal):
    """A record without time or amount may belong to another refund, at the first call and at later calls."""
    gateway = Gateway(code, {missing: None})
    results = await attempts(gateway, new_journal, 60)
    assert [type(outcome.error) for outcome in results] == [RefundOutcomeUnknown] * 2
    assert "lacks dt_refund or money_refund" in results[1].error.last_error
    assert gateway.applied == 1
    gateway.record = {}
    [outcome] = await attempts(gateway, None, request=refund_request())
    assert outcome.refund.no_refund == "R-1"


@pytest.mark.parametrize("code", DUPLICATE)
async def test_half_a_record_is_no_record_after_the_grace(code, new_journal):
    """The number belongs to another refund, so this refund ends as rejected."""
    results = await attempts(Gateway(code, {"dt_refund": None}), new_journal, 1000)
    assert type(results[1].error) is RefundRejected


@pytest.mark.parametrize("code", IN_PROGRESS)
async def test_half_a_record_of_a_refund_in_progress_stays_unknown(code, new_journal):
    """The record may be ours: nothing is sent again, and a person has to decide."""
    gateway = Gateway(code, {"dt_refund": None})
    results = await attempts(gateway, new_journal, 1000)
    assert type(results[1].error) is RefundOutcomeUnknown
    assert gateway.applied == 1


@pytest.mark.parametrize("code", IN_PROGRESS)
async def test_a_refund_in_progress_without_a_record_is_sent_again_after_the_grace(code, new_journal):
    gateway = Gateway(code, then="0000")
    results = await attempts(gateway, new_journal, 1000)
    assert results[1].refund.no_refund == "R-1"
    assert gateway.applied == 2


async def test_half_a_record_proves_a_refund_whose_attempt_may_have_succeeded(new_journal):
    """The attempt was not rejected, so the record under its number is its own."""
    gateway = Gateway("9999", {"dt_refund": None})
    [outcome] = await attempts(gateway, new_journal)
    assert outcome.refund.no_refund == "R-1"


async def test_a_rejection_after_an_uncertain_attempt_does_not_count(new_journal):
    """The refund is sent again after the grace and rejected as a duplicate: the first attempt may have succeeded."""
    gateway = Gateway("9999", then="1002")
    results = await attempts(gateway, new_journal, 1000)
    assert type(results[1].error) is RefundOutcomeUnknown
    assert results[1].error.refused is None
    gateway.record = {"dt_refund": None}
    [outcome] = await attempts(gateway, None, request=refund_request())
    assert outcome.error.refused.ret_code == "1002"  # a session without the first attempt


# ── rejections that may pass ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("code", ["5006", "9104", "1014", "1016", "1019", "9911"])
async def test_a_rejection_that_may_pass_is_not_final(code, new_journal):
    """After the balance is topped up, the same number is sent again and made."""
    gateway = Gateway(code, then="0000")
    rejected, again = await attempts(gateway, new_journal, 1)
    assert (type(rejected.error), rejected.error.may_pass) == (RefundRejected, True)
    assert again.refund.no_refund == "R-1"
    assert gateway.applied == 2


@pytest.mark.parametrize("dt_refund", [None, "20260105160000"], ids=["incomplete", "complete"])
async def test_a_refused_refund_needs_a_complete_notification(dt_refund):
    """If every attempt was refused as duplicate, the notification must have the whole identity of the refund."""
    settings = {"transport": Gateway("1002"), "clock": boot_clock}
    async with RefundSession(sandbox().merchant(), **settings) as session, anyio.create_task_group() as tasks:
        endpoint = NotificationEndpoint(session.merchant, Handler(), session=session, clock=boot_clock)
        body = notification(dt_refund=dt_refund, oid_refundno=None)

        @tasks.start_soon
        async def notify():
            await anyio.sleep(1)
            assert is_acknowledged(await endpoint.handle(body, HEADERS))

        if dt_refund is None:
            with pytest.raises(RefundOutcomeUnknown):
                await session.apply_and_wait(refund_request())
        else:
            assert (await session.apply_and_wait(refund_request())).is_final


# ── a query service without records ──────────────────────────────────────────────────────────────


class NoQueries(httpx.AsyncBaseTransport):
    """A transport to a sandbox with a wrong query address: another query service, without records."""

    def __init__(self, gateway):
        self.inner = httpx.ASGITransport(app=gateway)
        self.elsewhere = httpx.ASGITransport(app=sandbox())

    async def handle_async_request(self, request):
        if request.url.path == "/refundquery.htm":
            return await self.elsewhere.handle_async_request(request)
        return await self.inner.handle_async_request(request)


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
async def test_a_wrong_query_address_causes_no_second_refund(journal):
    """The answer "no such record" about a refund that was made shows that the service proves nothing."""
    gateway = sandbox(repeated=Repeated.AGAIN)
    gateway.add_order("O-1", 1000)
    options = {"journal": MemoryJournal()} if journal else {}
    async with RefundSession(
        gateway.merchant(),
        transport=NoQueries(gateway),
        clock=boot_clock,
        retry=RetryPolicy(not_found_grace=60),
        **options,
    ) as session:
        await session.apply_refund(refund_request(0))
        gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
        for _ in range(3):
            with pytest.raises(RefundOutcomeUnknown) as caught:
                await session.apply_refund(refund_request(1))
            await anyio.sleep(100)
    assert "did not return refund R-0" in caught.value.last_error
    assert caught.value.reason == "the query service proves nothing, check the query URL"
    assert gateway.times_made("R-1") == 1


async def test_a_wrong_query_address_causes_no_second_refund_of_a_lost_entry():
    """A refund that is queried before its first send needs the same check of the query service as a resend."""
    gateway = sandbox(repeated=Repeated.AGAIN)
    gateway.add_order("O-1", 1000)
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request(1))
    async with MemoryJournal() as journal:
        async with gateway.session(journal=journal, clock=boot_clock) as session:
            await session.apply_refund(refund_request(0))
        options = {"journal": journal, "query_first": True, "clock": boot_clock}
        async with RefundSession(gateway.merchant(), transport=NoQueries(gateway), **options) as session:
            with pytest.raises(RefundOutcomeUnknown, match="did not return refund R-0"):
                await session.apply_refund(refund_request(1))
    assert gateway.times_made("R-1") == 1


async def test_a_query_service_that_was_repaired_is_queried_once_more():
    """Wrong at the first answer and right at the check: the first "no such record" must not count."""
    gateway = sandbox(repeated=Repeated.AGAIN)
    gateway.add_order("O-1", 1000)

    class Mended(NoQueries):
        queries = 0

        async def handle_async_request(self, request):
            if request.url.path == "/refundquery.htm":
                self.queries += 1
            if self.queries > 1:
                return await self.inner.handle_async_request(request)
            return await super().handle_async_request(request)

    async with RefundSession(
        gateway.merchant(), transport=Mended(gateway), clock=boot_clock, retry=RetryPolicy(not_found_grace=0.0)
    ) as session:
        await session.apply_refund(refund_request(0))
        gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
        assert (await session.apply_refund(refund_request(1))).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


async def test_a_wrong_query_address_proves_no_rejection():
    """A rejection after an uncertain attempt counts only if "no such record" is proved."""
    gateway = sandbox(repeated=Repeated.REJECT)
    async with RefundSession(
        gateway.merchant(), transport=NoQueries(gateway), clock=boot_clock, retry=RetryPolicy(not_found_grace=0.0)
    ) as session:
        await session.apply_refund(refund_request(0))
        gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request(1))
    assert gateway.times_made("R-1") == 1


class Answered(httpx.AsyncBaseTransport):
    """A transport to a sandbox; ``answer`` creates the answers to queries about R-0 from their fields."""

    def __init__(self, gateway, answer):
        self.inner = httpx.ASGITransport(app=gateway)
        self.answer = answer
        self.asked = 0

    async def handle_async_request(self, request):
        fields = wire.decode(await request.aread())
        if request.url.path == "/refundquery.htm" and fields["no_refund"] == "R-0":
            self.asked += 1
            return httpx.Response(200, content=as_json(self.answer(fields)))
        return await self.inner.handle_async_request(request)


def too_old(_):
    return sealed({"ret_code": "3005", "ret_msg": "查询跨度不能超过3个月"})


def another_refund(fields):
    return made(fields, money_refund="9.99")


def same_refund(fields):
    return made(fields)


@pytest.mark.parametrize(
    ("days", "answer", "is_asked", "is_believed"),
    [
        (1, same_refund, True, True),
        (1, another_refund, True, False),
        (1, too_old, True, True),  # then no refund can check the query service
        (81, another_refund, False, True),
    ],
)
async def test_the_canary_checks_the_query_service(days, answer, is_asked, is_believed):
    """The answer "no such record" is believed only if the query service finds a refund that was made."""
    gateway = sandbox(repeated=Repeated.AGAIN)
    wires = Answered(gateway, answer)
    settings = {"transport": wires, "clock": boot_clock, "retry": RetryPolicy(not_found_grace=0.0)}
    async with RefundSession(gateway.merchant(), **settings) as session:
        await session.apply_refund(refund_request(0, dt_refund=wall_clock() - timedelta(days=days)))
        gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
        outcome = await session.outcome_of(refund_request(1))
    assert (outcome.refund is not None) is is_believed
    assert is_believed or "R-0" not in outcome.error.reason
    assert wires.asked == is_asked
    assert gateway.times_made("R-1") == int(is_believed)


class LaggingQueries(httpx.AsyncBaseTransport):
    """Answers "no such record" to each query of a refund that was applied for less than ``lag`` seconds ago."""

    def __init__(self, gateway, lag):
        self.inner = httpx.ASGITransport(app=gateway)
        self.lag = lag
        self.applied_at = {}

    async def handle_async_request(self, request):
        number, now = wire.decode(await request.aread())["no_refund"], anyio.current_time()
        if request.url.path != "/refundquery.htm":
            self.applied_at.setdefault(number, now)
        elif now < self.applied_at.get(number, now) + self.lag:
            return httpx.Response(200, content=as_json(sealed({"ret_code": "8901", "ret_msg": "没有记录"})))
        return await self.inner.handle_async_request(request)


async def test_the_canary_is_old_enough_for_a_query_service_that_lags(new_journal):
    """The canary was sent a grace ago; without such a refund it is the oldest one, and the outcome stays unknown."""
    gateway = sandbox()
    wires = LaggingQueries(gateway, 60)
    settings = {"transport": wires, "clock": boot_clock, "query_first": True, "deadline": 2}
    settings["retry"] = RetryPolicy(not_found_grace=120)
    async with AsyncExitStack() as opened:
        journal = new_journal and await opened.enter_async_context(new_journal())
        session = await opened.enter_async_context(RefundSession(gateway.merchant(), journal=journal, **settings))
        assert (await session.outcome_of(refund_request(0))).refund is not None  # there is no canary yet
        assert isinstance((await session.outcome_of(refund_request(1))).error, RefundOutcomeUnknown)
        await anyio.sleep(60)
        for number in range(2, 40):
            assert (await session.outcome_of(refund_request(number))).refund is not None
            await anyio.sleep(5)


CANARIES = [(90, "20261126000000"), (150, "20261126000000"), (200, "20260906000000"), (300, "20261126000000")]


@pytest.mark.parametrize(
    ("grace", "is_usable", "chosen"),
    [
        (90, [0, 1], 90),
        (91, [0, 1], 150),
        (91, [0, 2, 3], 300),
        (301, [0, 1], 150),
        (301, [0, 1, 2], 150),
        (0, [2], None),
        (0, [], None),
    ],
)
def test_the_canary_is_the_newest_refund_that_is_older_than_the_grace(grace, is_usable, chosen):
    """A refund whose ``dt_refund`` is more than 80 days ago is no canary."""
    now = datetime(2026, 11, 26, 4, tzinfo=UTC)
    canaries = []
    for seconds, dt_refund in map(CANARIES.__getitem__, is_usable):
        sent_at = Moment(now - timedelta(seconds=seconds), 0.0, "boot")
        fields = {"no_refund": f"R-{seconds}", "dt_refund": dt_refund}
        canaries.append(Entry(no_refund=f"R-{seconds}", fields=fields, body=b"", sent_at=sent_at))
    entry = choose_canary(canaries, now, grace)
    assert (entry and entry.no_refund) == (chosen and f"R-{chosen}")


# ── a journal that fails after an answer ─────────────────────────────────────────────────────────


class Failing(MemoryJournal):
    """A journal whose methods ``verbs`` fail."""

    verbs: frozenset[str] = frozenset()

    async def resend(self, *told):
        self._check("resend")
        await super().resend(*told)

    async def finish(self, *told):
        self._check("finish")
        return await super().finish(*told)

    async def release(self, *told):
        self._check("release")
        await super().release(*told)

    def _check(self, verb):
        if verb in self.verbs:
            raise JournalError("journal: the disk is full")


@pytest.mark.parametrize(
    ("verb", "fault", "order", "said"),
    [
        ("finish", None, 10, "Refund"),
        ("finish", None, 1, "RefundRejected"),
        ("release", Fault.NO_ANSWER, 10, "RefundOutcomeUnknown"),
        ("resend", Fault.NO_ANSWER, 10, "RefundOutcomeUnknown"),
    ],
)
async def test_a_journal_error_after_a_send_has_the_outcome(verb, fault, order, said):
    gateway, journal = sandbox(default_order=Decimal(order)), Failing()
    if fault is not None:
        gateway.script(fault, call="apply", when=When.BEFORE)
    retry = RetryPolicy(not_found_grace=0.0 if verb == "resend" else 900.0)
    journal.verbs = frozenset({verb})
    async with gateway.session(journal=journal, clock=boot_clock, retry=retry) as session:
        with pytest.raises(JournalError, match="full") as caught:
            await session.apply_refund(refund_request())
    assert type(caught.value.said).__name__ == said
    assert type(pickle.loads(pickle.dumps(caught.value)).said).__name__ == said
    assert gateway.requests["apply"] == 1


async def test_a_cancelled_call_whose_journal_fails_is_cancelled_and_logged(caplog):
    """The caller gets the cancellation; the log names the refund."""
    gateway, journal = sandbox(), Failing()
    gateway.script(Fault.NO_ANSWER, call="apply")
    journal.verbs = frozenset({"release"})
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(1) as scope:
            await session.apply_refund(refund_request())
    assert scope.cancelled_caught
    assert "refund R-1 may have been made: journal: the disk is full" in caplog.text


async def test_a_journal_error_before_a_send_has_no_outcome():
    gateway, journal = sandbox(), Failing()
    journal.begin = _full
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with pytest.raises(JournalError) as caught:
            await session.apply_refund(refund_request())
    assert caught.value.said is None
    assert not gateway.requests


async def _full(*_):
    raise JournalError("journal: the disk is full")


# ── a conflict from a notification ───────────────────────────────────────────────────────────────


async def test_a_notified_conflict_stays_recorded(new_journal):
    """Later calls raise the recorded conflict, and send and query nothing."""
    if new_journal is None:
        pytest.skip("a session's own memory keeps nothing that is resolved")
    gateway = Gateway("9999", {"money_refund": "9.00"})
    results = await attempts(gateway, new_journal, 1, 1)
    assert [type(outcome.error) for outcome in results] == [RefundConflict] * 3
    assert (gateway.applied, gateway.queries) == (1, 1)
    async with new_journal() as journal:
        assert (await journal.find("R-1")).state is State.CONFLICT
        async with RefundSession(
            sandbox().merchant(endpoints=Endpoints()), transport=gateway, clock=boot_clock, journal=MemoryJournal()
        ) as session:
            assert await session.resume() == Resumed(resolved=0, still_open=0)
