"""Fixtures, virtual time and a network guard for the tests of your program; pytest loads them automatically.

- ``lianlian_gateway``: a :class:`~lianlian_async.sandbox.SandboxGateway` in which every order has 1000.00 yuan;
  ``lianlian_merchant``: its merchant.
- ``lianlian_session``: a session that calls the gateway in this process. The test opens it with ``async with``, so it
  works with anyio's plugin (on asyncio and trio), with pytest-asyncio in strict and auto mode, and without a plugin.
- ``lianlian_virtual_time``: the test's :class:`~lianlian_async.testing.virtual_time.VirtualTime`, in which a wait of
  15 minutes takes no real time. The gateway and the session use it, too.

To change a fixture, define one of the same name in your ``conftest.py``. To give the session options, let
``lianlian_session_options`` return them, such as ``{"journal": journal}``. :func:`notify` sends a notification::

    import pytest
    from datetime import datetime, timezone
    from lianlian_async import NotificationEndpoint, RefundRequest
    from lianlian_async.testing import notify

    REQUEST = RefundRequest(no_refund="R-1", dt_refund=datetime.now(timezone.utc), money_refund="200.01",
                            no_order="O-1", notify_url="https://shop.example/lianlian/refund")

    @pytest.mark.anyio      # or pytest.mark.asyncio; no mark in an automatic mode
    async def test_the_refund_is_handled(lianlian_gateway, lianlian_session):
        handled = []

        async def on_refund(refund):
            handled.append(refund.no_refund)

        async with lianlian_session as session:
            await session.apply_refund(REQUEST)
        app = NotificationEndpoint(lianlian_session.merchant, on_refund)
        assert (await notify(app, lianlian_gateway, "R-1")).status == 200
        assert handled == ["R-1"]

Virtual time needs its own event loop: run your async function with ``lianlian_virtual_time.run``. With anyio's plugin,
you can instead define a fixture ``anyio_backend`` that returns ``lianlian_virtual_time.backend("asyncio")``::

    from lianlian_async.sandbox import Fault, When

    def test_a_lost_refund_is_sent_again_after_the_grace(lianlian_gateway, lianlian_session, lianlian_virtual_time):
        async def refund():
            async with lianlian_session as session:
                return await session.apply_refund(REQUEST, deadline=3600)

        lianlian_gateway.script(Fault.BAD_GATEWAY, call="apply", when=When.BEFORE)
        assert lianlian_virtual_time.run(refund).no_refund == "R-1"
        assert lianlian_virtual_time.now() >= 900

To test a whole service, give its session ``transport=httpx.ASGITransport(lianlian_gateway)``. In real time, use a
client that runs the lifespan, such as FastAPI's ``TestClient`` in a ``with`` block; each test may do so with the same
application. ``client.portal.call(notify, app, lianlian_gateway, "R-1")`` sends a notification in its event loop. For
virtual time, enter the lifespan in the test's own event loop (``async with app.router.lifespan_context(app)``), call
the application through ``httpx.ASGITransport``, and give the session and the endpoint
``clock=lianlian_virtual_time.moment``. This transport passes no state of the lifespan, so override FastAPI's dependency
(``get_session`` of ``contrib.fastapi``): ``app.dependency_overrides[get_session] = lambda: session``.

**The guard.** While pytest runs, a session raises ``ConfigurationError`` before it connects to a host other than
``localhost`` or a loopback address, also in child processes. Nothing is sent, and no host name is looked up. To allow
real connections, mark a test with ``pytest.mark.lianlian_allow_network``, or set ``lianlian_allow_network = true`` in
pytest's configuration. The guard checks when a connection is opened, so it allows mocked transports. It covers both
backends, and your own ``client=`` or ``transport=`` if httpcore opens its connections (httpx's own transports, with or
without a proxy). It does not cover other transports, such as httpx-aiohttp's, or the database of your journal.

**Mocks of httpx** work with the default backend. The answers must be signed, so let the sandbox make them::

    import httpx
    from lianlian_async import RefundSession

    @pytest.mark.anyio
    async def test_with_pytest_httpx(httpx_mock, lianlian_gateway, lianlian_merchant):
        httpx_mock.add_exception(httpx.ConnectError("no route to host"))
        httpx_mock.add_callback(httpx.ASGITransport(lianlian_gateway).handle_async_request)
        async with RefundSession(lianlian_merchant) as session:
            assert (await session.apply_refund(REQUEST)).money_refund == lianlian_gateway.money_moved("R-1")

    @pytest.mark.anyio
    async def test_with_respx(respx_mock, lianlian_gateway, lianlian_merchant):
        answer = httpx.ASGITransport(lianlian_gateway).handle_async_request
        respx_mock.post(host="sandbox.invalid").mock(side_effect=answer)
        async with RefundSession(lianlian_merchant) as session:
            assert (await session.apply_refund(REQUEST)).money_refund == lianlian_gateway.money_moved("R-1")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lianlian_async.exchange import HttpResponse
    from lianlian_async.sandbox import SandboxGateway

__all__ = ["notify"]


async def notify(app: Any, gateway: SandboxGateway, no_refund: str) -> HttpResponse:
    """Send the notification of the latest refund with the number ``no_refund``, and return the response.

    The gateway's clock is advanced first, until the refund is final. ``app`` is an ASGI application, such as a
    ``NotificationEndpoint``, which receives the notification at the path of the refund's ``notify_url``; or the URL of
    a server on this machine. Raises ``LookupError`` if ``gateway`` did not make the refund, ``RuntimeError`` if there
    is no response within 5 seconds.
    """
    from lianlian_async.exchange import NoResponse
    from lianlian_async.sandbox.notifier import post_once
    from lianlian_async.transport import asgi_transport

    made = [record for record in gateway.refunds if record.no_refund == no_refund]
    if not made:
        raise LookupError(f"the gateway has made no refund {no_refund}")
    record = made[-1]
    gateway.advance(max(0.0, record.settles_at - gateway.now()))
    transport, url = None, app
    if not isinstance(app, str):
        transport, url = asgi_transport(app), record.notify_url
    delivery = await post_once(url, gateway.notification(record), transport)
    if isinstance(delivery, NoResponse):
        raise RuntimeError(f"no response to the notification of {no_refund}: {delivery.reason}") from delivery.cause
    return delivery
