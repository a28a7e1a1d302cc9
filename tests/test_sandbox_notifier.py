"""The sandbox's notifications: signed, on schedule, and with each fault."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal

import anyio
import attrs
import httpx
import pytest

from lianlian_async import ConfigurationError, NotificationEndpoint, asgi, wire
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import Fault, NotificationFault, Notifier, SandboxGateway, When
from lianlian_async.session import RefundSession
from lianlian_async.signing import signature_source
from lianlian_async.transport import asgi_transport
from tests.support.notices import Handler, until
from tests.support.parties import OID_PARTNER, as_json, boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

OK = (200, b'{"ret_code":"0000","ret_msg":"ok"}')


@attrs.define
class Shop:
    """A merchant's server that records requests and returns ``answers`` in turn, then the last one always."""

    answers: list = attrs.field(factory=lambda: [OK])
    came: list = attrs.field(factory=list)
    scopes: list = attrs.field(factory=list)

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        self.came.append((anyio.current_time(), wire.decode(await asgi.read(receive, 2**20))))
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status is None:
            await anyio.sleep_forever()
        await asgi.respond(send, status, {}, body)

    @property
    def times(self):
        return [at for at, _ in self.came]

    @property
    def states(self):
        return [fields["sta_refund"] for _, fields in self.came]


def notifier(gateway, shop, *faults, **options):
    return Notifier(gateway, transport=asgi_transport(shop), faults=dict.fromkeys(faults, 1.0), **options)


def session(gateway, app=None, **options):
    """Open a session that calls the gateway through ``app``."""
    return RefundSession(gateway.merchant(), transport=asgi_transport(app or gateway), clock=boot_clock, **options)


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────


async def test_a_final_refund_is_notified_once_it_is_acknowledged():
    """One POST of text/json to the notify_url, when the refund is final, signed as answers are."""
    gateway, shop = sandbox(settle_after=10), Shop()
    async with notifier(gateway, shop) as notifying, session(gateway) as opened:
        await opened.apply_refund(refund_request(notify_url="https://shop.example/lianlian?shop=1"))
        assert notifying.pending == 1
        await anyio.sleep(3600)
        assert notifying.pending == 0
    [(at, fields)] = shop.came
    assert at == pytest.approx(10)
    assert gateway.gateway_key.public_key().verify(signature_source(fields), fields["sign"])
    assert (fields["oid_partner"], fields["no_refund"], fields["sta_refund"]) == (OID_PARTNER, "R-1", "2")
    [scope] = shop.scopes
    assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/lianlian", b"shop=1")
    assert asgi.headers(scope)["content-type"] == "text/json;charset=utf-8"
    [delivery] = notifying.deliveries
    assert (delivery.no_refund, delivery.status, delivery.acknowledged, delivery.forged) == ("R-1", 200, True, False)
    assert (delivery.at, delivery.body) == (pytest.approx(10), as_json(fields))


async def test_a_failed_refund_is_notified_too():
    """A failed refund gets a notification, too."""
    gateway, shop = sandbox(settle_after=10), Shop()
    gateway.fail("R-1")
    async with notifier(gateway, shop), session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(20)
    assert shop.states == ["3"]


@pytest.mark.parametrize(
    "answer",
    [
        (200, b'{"ret_code":"9999"}'),
        (200, b"{}"),
        (200, b"ok"),
        (201, OK[1]),
        (500, OK[1]),
        (302, OK[1]),
        (None, b""),
    ],
)
async def test_unacknowledged_notification_is_sent_thirty_times(answer):
    """Only HTTP 200 with ret_code 0000 within 5 seconds is an acknowledgement."""
    gateway, shop = sandbox(settle_after=0), Shop([answer])
    async with notifier(gateway, shop) as notifying, session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(2 * 3600)
    assert shop.times == pytest.approx([120 * number for number in range(30)])
    assert notifying.pending == 0
    assert {delivery.status for delivery in notifying.deliveries} == {answer[0]}
    assert not any(delivery.acknowledged for delivery in notifying.deliveries)


async def test_notifications_stop_at_the_first_acknowledgement():
    """A service that was down gets the notification after its start."""
    gateway, shop = sandbox(settle_after=0), Shop([(503, b""), (None, b""), OK])
    async with notifier(gateway, shop, every=60), session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(3600)
    assert shop.times == pytest.approx([0, 60, 120])


async def test_unreachable_service_counts_as_no_response():
    """A failed connection is no acknowledgement."""

    class Unreachable(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            raise httpx.ConnectError("refused", request=request)

    gateway = sandbox(settle_after=0)
    async with Notifier(gateway, transport=Unreachable(), times=2) as notifying, session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(300)
    assert [(delivery.status, delivery.acknowledged) for delivery in notifying.deliveries] == [(None, False)] * 2


async def test_notifier_uses_the_gateways_clock():
    """Advancing the gateway's clock brings the final state and the next delivery."""
    gateway, shop = sandbox(settle_after=100), Shop([(500, b""), OK])
    async with notifier(gateway, shop), session(gateway) as opened:
        await opened.apply_refund(refund_request())
        for seconds, deliveries in ((99, 0), (1, 1), (119, 1), (1, 2)):
            gateway.advance(seconds)
            await anyio.wait_all_tasks_blocked()
            await anyio.sleep(0.01)
            assert len(shop.came) == deliveries
    assert anyio.current_time() < 1


async def test_earlier_and_late_refunds_are_notified():
    """Every refund in the books gets a notification."""
    gateway, shop = sandbox(settle_after=0), Shop()
    async with session(gateway, deadline=5) as opened:
        await opened.apply_refund(refund_request(1))
        gateway.script(Fault.LATE, delay=60)
        gateway.script(Fault.NO_ANSWER, when=When.AFTER, call="apply", skip=1)
        async with notifier(gateway, shop):
            for number in (2, 3):
                assert (await opened.outcome_of(refund_request(number))).attempts == 1
            await anyio.sleep(61)
    assert sorted(fields["no_refund"] for _, fields in shop.came) == ["R-1", "R-2", "R-3"]


async def test_leaving_ends_the_notifications():
    """Nothing is sent after the block."""
    gateway, shop = sandbox(settle_after=10), Shop()
    async with notifier(gateway, shop), session(gateway) as opened:
        await opened.apply_refund(refund_request())
    await anyio.sleep(100)
    assert not shop.came


@pytest.mark.parametrize("share", [-0.1, 1.1])
async def test_invalid_mischief_probability_is_refused(share):
    """The constructor raises the error."""
    with pytest.raises(ConfigurationError, match="faults"):
        Notifier(sandbox(), faults={NotificationFault.EARLY: share})


async def test_invalid_interval_is_refused():
    """NaN would send every delivery at once."""
    with pytest.raises(
        ConfigurationError, match="every: must be a number of seconds of at least 0 and at most inf, is"
    ):
        Notifier(sandbox(), every=math.nan)


async def test_on_delivery_is_called_after_its_delivery_is_listed():
    """``deliveries`` contains a delivery when ``on_delivery`` gets it, while concurrent ones still wait."""
    gateway, shop, listed = sandbox(settle_after=0), Shop([(None, b""), OK]), []

    def check(delivery):
        listed.append(delivery in notifying.deliveries)

    notifying = notifier(gateway, shop, NotificationFault.CONCURRENT, on_delivery=check)
    async with notifying, session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(3600)
    assert listed == [True] * 6  # the first of three has no response, so they are sent again


async def test_an_error_of_on_delivery_is_raised():
    """Without it, a test whose check fails would pass, or would wait forever for further deliveries."""

    def check(delivery):
        raise LookupError(delivery.no_refund)

    with pytest.raises(ExceptionGroup) as caught:
        await notified(on_delivery=check)
    assert caught.group_contains(LookupError, match="R-1")


def test_notifiers_of_one_gateway_run_in_successive_event_loops():
    """For example, each test opens a notifier of a gateway at module level."""
    gateway, shop = SandboxGateway(default_order=Decimal("10.00"), settle_after=0), Shop()

    async def main(number):
        async with notifier(gateway, shop) as notifying, gateway.session() as opened:
            await opened.apply_refund(refund_request(number))
            await until(lambda: not notifying.pending)

    for number in (1, 2):
        anyio.run(main, number)


# ── faults ─────────────────────────────────────────────────────────────────────────────────────


async def notified(*faults, answers=None, **options):
    """Return the service and the deliveries after one refund with some faults."""
    gateway, shop = sandbox(settle_after=10), Shop(answers or [OK])
    async with notifier(gateway, shop, *faults, **options) as notifying, session(gateway) as opened:
        await opened.apply_refund(refund_request())
        await anyio.sleep(3600)
    return shop, notifying.deliveries


async def test_duplicated_sends_once_more():
    """The notification is sent once more despite the acknowledgement."""
    shop, _ = await notified(NotificationFault.DUPLICATED)
    assert shop.times == pytest.approx([10, 10])
    assert shop.came[0][1] == shop.came[1][1]


async def test_concurrent_sends_three_at_once():
    """All three are sent before the first response."""
    shop, deliveries = await notified(NotificationFault.CONCURRENT, answers=[(None, b"")] * 3 + [OK])
    assert shop.times == pytest.approx([10] * 3 + [130] * 3)
    assert [delivery.at for delivery in deliveries] == pytest.approx([15] * 3 + [130] * 3)


async def test_reordered_sends_the_first_state_last():
    """The notification of the first state follows that of the last one."""
    shop, _ = await notified(NotificationFault.REORDERED)
    assert shop.states == ["2", "0"]


async def test_replayed_sends_again_later():
    """The notification is sent once more after the interval."""
    shop, _ = await notified(NotificationFault.REPLAYED)
    assert shop.times == pytest.approx([10, 130])


async def test_tampered_sends_forgeries_first():
    """Each delivery is preceded by one with another amount, which the gateway did not sign."""
    key = sandbox().gateway_key.public_key()
    shop, deliveries = await notified(NotificationFault.TAMPERED, answers=[(500, b"")])
    genuine = [key.verify(signature_source(fields), fields.get("sign", "")) for _, fields in shop.came]
    assert genuine == [False, True] * 30
    assert [delivery.forged for delivery in deliveries] == [True, False] * 30


async def test_early_sends_before_the_apply_response():
    """The notification of the final state comes before the apply response."""
    gateway, shop = sandbox(settle_after=1000), Shop()
    notifying = notifier(gateway, shop, NotificationFault.EARLY)
    async with notifying, session(gateway, notifying) as opened:
        for number in range(3):
            shop.came.clear()
            refund = await opened.apply_refund(refund_request(number))
            assert shop.states == ["2"]
            assert not refund.is_final
        assert (await opened.query_refund(refund.query())).is_final


async def test_same_seed_gives_the_same_faults():
    """A seed and a sequence of refunds always give the same faults."""

    async def bodies(seed):
        gateway, shop = sandbox(settle_after=0), Shop()
        faults = dict.fromkeys(NotificationFault, 0.5)
        notifying = Notifier(gateway, transport=asgi_transport(shop), faults=faults, seed=seed)
        async with notifying, session(gateway, notifying) as opened:
            for number in range(10):
                await opened.apply_refund(refund_request(number))
            await anyio.sleep(300)
        return Counter((delivery.no_refund, delivery.forged) for delivery in notifying.deliveries)

    assert await bodies(1) == await bodies(1) != await bodies(2)


async def test_endpoint_acts_once_despite_all_faults():
    """The endpoint acts once on each final refund, acknowledges no forgery, and misses nothing."""
    handler = Handler()
    gateway = sandbox(settle_after=5)
    faults = dict.fromkeys(NotificationFault, 0.5)
    async with MemoryJournal() as journal:
        endpoint = NotificationEndpoint(gateway.merchant(), handler, journal=journal, clock=boot_clock)
        notifying = Notifier(gateway, transport=asgi_transport(endpoint), faults=faults)
        async with notifying, session(gateway, notifying, journal=journal) as opened:
            for number in range(40):
                gateway.fail(f"R-{number}") if number % 3 else None
                await opened.apply_refund(refund_request(number))
            await until(lambda: not notifying.pending, look_every=10)
        assert [entry async for entry in journal.pending()] == []
    assert sorted(handler.numbers) == sorted(f"R-{number}" for number in range(40))
    assert not any(delivery.acknowledged for delivery in notifying.deliveries if delivery.forged)
    assert all(delivery.acknowledged for delivery in notifying.deliveries if not delivery.forged)
    assert endpoint.counts["acted"] == 40
    assert not endpoint.counts["failed"]
    assert not endpoint.counts["contradictory"]


# ── as an application ────────────────────────────────────────────────────────────────────────────


async def test_server_runs_the_notifier():
    """The server's lifespan starts and stops the notifier, and the gateway's calls are served."""
    gateway, shop = sandbox(settle_after=5), Shop()
    app = notifier(gateway, shop)
    started, stop, heard = anyio.Event(), anyio.Event(), []

    async def receive():
        if heard:
            await stop.wait()
        return {}

    async def send(message):
        heard.append(message["type"])
        started.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, {"type": "lifespan"}, receive, send)
        await started.wait()
        async with session(gateway, app) as opened:
            await opened.apply_refund(refund_request())
            await anyio.sleep(10)
        stop.set()
    assert heard == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert shop.states == ["2"]
