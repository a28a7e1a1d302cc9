"""For every web framework: HTTP responses to errors, refunds that outlive a request, a lifespan with a sweep, recipes.

In the recipes, ``journal``, ``session`` and ``endpoint`` are those of the README's FastAPI service. Starlette::

    from starlette import applications, responses, routing
    from lianlian_async import LianLianError
    from lianlian_async.contrib.web import apply_shielded, lifespan, read_request, refund_error

    async def make_refund(request):
        refund = await apply_shielded(session, read_request(await request.body()))
        return responses.JSONResponse(refund.sta_refund)

    app = applications.Starlette(
        routes=[routing.Route("/refunds", make_refund, methods=["POST"]), routing.Route("/lianlian/refund", endpoint)],
        lifespan=lifespan(journal, session, endpoint, sweep=900),
        exception_handlers={LianLianError: refund_error},
    )

Django: an async view, and the ``application`` of ``asgi.py``, because Django ignores the server's lifespan. Daphne runs
no lifespan: use another server, such as uvicorn::

    from django.core.asgi import get_asgi_application
    from django.http import JsonResponse
    from lianlian_async import LianLianError, asgi
    from lianlian_async.contrib.web import apply_shielded, lifespan, read_request, respond

    async def make_refund(request):
        try:
            refund = await apply_shielded(session, read_request(request.body))
        except LianLianError as error:
            status, headers, body = respond(error)
            return JsonResponse(body, status=status, headers=headers)
        return JsonResponse({"sta_refund": refund.sta_refund})

    django = get_asgi_application()

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, lifespan(journal, session, endpoint, sweep=900)(django))
        else:
            await (endpoint if scope["path"] == "/lianlian/refund" else django)(scope, receive, send)
"""

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final

import anyio
import anyio.lowlevel

from lianlian_async import errors, wire
from lianlian_async.background import BackgroundTask, complete, is_failure
from lianlian_async.clock import system_clock
from lianlian_async.errors import ConfigurationError, LianLianError
from lianlian_async.models import Refund, RefundRequest
from lianlian_async.notifications import NotificationEndpoint
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_function, check_seconds, check_type

__all__ = ["apply_shielded", "lifespan", "read_request", "refund_error", "respond"]

logger = logging.getLogger("lianlian_async")
_log: Final = partial(logger.warning, "the caller of a refund was cancelled; the refund's outcome: %s")

_RESPONSES: Final = (
    (errors.InvalidRequest, 422, "a field is invalid; nothing was sent"),
    (errors.RefundConflict, 409, "the recorded refund has other content or another outcome; a person has to decide"),
    (errors.RefundRejected, 422, "the request was rejected"),
    (errors.QueryRejected, 502, "LianLian rejected a query; this says nothing about the refund"),
    (errors.RefundNotFound, 404, "LianLian has no record of the refund at this moment"),
    (errors.RefundOutcomeUnknown, 202, "the refund may have been made; repeat the same request at ask_again_at"),
    (errors.RefundNotFinal, 202, "the refund was made, but it is not final yet"),
    (errors.RefundNotSent | errors.JournalError, 503, "this request sent nothing; it is safe to repeat it"),
    (errors.GatewayUnavailable, 503, "LianLian gave no usable answer to the query; repeat it later"),
    (errors.SignatureInvalid | errors.AnswerMismatch | errors.MalformedMessage, 502, "LianLian's answer is unusable"),
    (LianLianError, 500, "the service has an internal problem"),
)
_SHOWN: Final = ("no_refund", "sta_refund", "field", "ret_code", "ret_msg", "meaning")


def respond(error: Exception, now: datetime | None = None) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return the HTTP status, headers and JSON body for a ``LianLianError`` (at ``now``); log it if the status is 5xx.

    The response tells a client about its refund, and nothing about the service. A rejection has 402 if its cause is
    temporary (balance, limit), 500 if it is the merchant's configuration, else 422; a rejected query has 500 or 502.
    For ``BatchStopped``, it is about the ``cause``; for a ``JournalError``, about ``said``, if that is set.
    """
    raised, now = error, now or system_clock().wall
    while isinstance(said := getattr(error, "said", None) or getattr(error, "cause", None), LianLianError):
        error = said
    _, status, detail = next(row for row in _RESPONSES if isinstance(error, row[0]))
    headers, body = dict[str, str](), dict[str, Any]()
    match error:
        case errors.InvalidRequest():
            body["problems"] = [{"field": problem.field, "rule": problem.rule} for problem in error.problems]
        case errors.RefundRejected() | errors.QueryRejected() if error.is_configuration:
            status = 500
        case errors.RefundRejected() if error.may_pass:
            status = 402
        case errors.RefundOutcomeUnknown():
            headers["Retry-After"] = str(max(0, math.ceil((error.ask_again_at - now).total_seconds())))
            body["ask_again_at"] = error.ask_again_at.isoformat()
        case errors.JournalError(said=Refund()):
            status, detail = 202, "the refund was made, but could not be recorded; repeat the same request later"
    about = getattr(error, "refund", said) or error
    names = _SHOWN if status != 500 else ("no_refund",)  # a code can be about the service's configuration
    body |= {name: getattr(about, name) for name in names if getattr(about, name, None) is not None}
    if status >= 500:
        logger.error("HTTP status %d: %s: %s", status, type(raised).__name__, raised)
    return status, headers, {"error": type(error).__name__, "detail": detail, **body}


async def refund_error(_request: object, error: Exception) -> Any:
    """Respond to an error: the exception handler of FastAPI and Starlette for ``LianLianError``."""
    from starlette.responses import JSONResponse

    status, headers, body = respond(error)
    return JSONResponse(body, status, headers)


def read_request(body: bytes) -> RefundRequest:
    """Return the request in ``body``, a JSON object with LianLian's fields. Raises ``InvalidRequest``."""
    try:
        return RefundRequest.from_dict(wire.decode(body))
    except errors.MalformedMessage as error:
        raise errors.InvalidRequest([errors.Problem("body", "must be a JSON object of strings", str(error))]) from error


async def apply_shielded(
    session: RefundSession, request: RefundRequest, on_outcome: Callable[[Refund | BaseException], object] = _log
) -> Refund:
    """Return ``session.apply_refund(request)``; a cancellation ends this call only after the refund has ended.

    A server may cancel a handler when its client disconnects. Then ``on_outcome``, which must not block, gets the
    refund or the error; by default it is logged. With a journal, a repeated request gets the same outcome. Without a
    journal, ``on_outcome`` should store it.
    """
    check_function("on_outcome", on_outcome)
    results = list[Any]()  # the refund and None, or the error

    async def run() -> None:
        results.append(await session.apply_refund(request))

    task = BackgroundTask(run, results.append)  # asyncio's Task.cancel ends even a shielded call, but not this task
    try:
        await complete(task.join)
        await anyio.lowlevel.checkpoint_if_cancelled()
    except anyio.get_cancelled_exc_class():
        try:
            on_outcome(results[0])
        except Exception:
            logger.exception("on_outcome failed; the refund's outcome: %s", results[0])
        raise
    if isinstance(results[0], Refund):
        return results[0]
    raise results[0]


def lifespan(
    *contexts: AbstractAsyncContextManager[Any], sweep: float | None = None
) -> Callable[[object], AbstractAsyncContextManager[Any]]:
    """Return a lifespan that opens ``contexts`` in order: a journal, its session, an endpoint.

    For aiohttp, use ``lifespan`` of ``contrib.aiohttp``. ``sweep``: also call the endpoint's ``sweep()`` at the start,
    and ``sweep`` seconds after each sweep; 900 is usual. A failed sweep is logged, and the next one still runs. The end
    of the lifespan cancels a running sweep; the next sweep repeats the interrupted handler calls. Raises
    ``ConfigurationError`` for a wrong argument.
    """
    for context in contexts:
        check_type("lifespan", context, AbstractAsyncContextManager)
    endpoints = [context for context in contexts if isinstance(context, NotificationEndpoint)]
    if sweep is not None:
        check_seconds("sweep", sweep)
        if len(endpoints) != 1:
            raise ConfigurationError(f"sweep: needs one NotificationEndpoint in the lifespan, not {len(endpoints)}")
        endpoints[0].check_sweep()

    @asynccontextmanager
    async def opened(_app: object) -> AsyncGenerator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            entered = [await stack.enter_async_context(context) for context in contexts]
            if sweep is not None:
                task = BackgroundTask(partial(_sweep, endpoints[0], sweep), _log_end)
                await stack.enter_async_context(aclosing(task))
            # Unique names: FastAPI merges the states of all lifespans, and one session must not hide another one.
            yield {f"refund_session_{id(each)}": each for each in entered if isinstance(each, RefundSession)}

    return opened


async def _sweep(endpoint: NotificationEndpoint, seconds: float) -> None:
    while True:
        try:
            resumed = await endpoint.sweep()
            logger.info("sweep: %d refunds resolved, %d still open", *resumed)
        except BaseException as error:
            if not is_failure(error):
                raise
            logger.exception("sweep: failed, and runs again in %g s", seconds)
        await anyio.sleep(seconds)


def _log_end(error: BaseException | None) -> None:
    if error is not None:  # the lifespan did not cancel the sweep
        logger.error("sweep: ended, and does not run again: restart the service", exc_info=error)
