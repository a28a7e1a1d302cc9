"""One exchange with the gateway as values: the request, the response, and the conclusion about the refund.

Every exchange ends as *not sent*, *maybe sent* or *answered*. The transport returns this result as a :data:`Delivery`;
the protocol converts it to a :class:`Reply`, by which middleware and resolution decide what to do next.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from enum import Enum, StrEnum
from typing import Final, NamedTuple, TypeAlias

import attrs

from .errors import LastExchange, LianLianError, printable
from .logs import NOBODY, Listeners
from .models import RefundRecord
from .retry import Deadline, RetryBudget, RetryPolicy, TokenBucket


class Call(StrEnum):
    """The two calls of the gateway."""

    APPLY = "apply"
    QUERY = "query"


@attrs.define(eq=False)
class SendCount:
    """Counts the sends of one attempt that may have made the refund, and keeps a summary of the last exchange.

    A user's middleware may send several times in one attempt, also concurrently. An apply request is not sent while
    another send of its attempt may have arrived.
    """

    open_sends: int = 0
    """The number of sends that may have arrived and were not rejected."""
    last_exchange: LastExchange | None = None

    def take_back(self) -> None:
        """Take back one send: it did not arrive, or was rejected."""
        self.open_sends -= 1


async def _always() -> bool:
    return True


@attrs.frozen(kw_only=True)
class Exchange:
    """One request to the gateway: every retry sends the same signed bytes."""

    call: Call
    url: str
    body: bytes = attrs.field(repr=False)
    """The signed JSON."""
    asked: Mapping[str, str]
    """The wire fields of the request, without the signature."""
    deadline: Deadline
    """The deadline of the whole call."""
    policy: RetryPolicy
    retries_left: TokenBucket = attrs.field(factory=lambda: TokenBucket(RetryBudget()), eq=False, repr=False)
    """What is left of the session's retry budget."""
    lease_holds: Callable[[], bool] = attrs.field(default=lambda: True, eq=False, repr=False)
    """Returns whether this call still has the refund's lease. It is called right before bytes are sent, because the
    lease may have ended during a wait, a connect or a suspension of the machine."""
    is_open: Callable[[], Awaitable[bool]] = attrs.field(default=_always, eq=False, repr=False)
    """Returns whether the journal still has no outcome of the refund. It is awaited before each send."""
    attempt: int = 1
    """The number of this attempt in the call, from 1. Queries count separately, and each canary starts again at 1."""
    seconds: float = 0.0
    """Timeout of this attempt."""
    send_count: SendCount = attrs.field(eq=False, repr=False)
    """Counts the sends of this attempt. It has no default: an exchange that a middleware creates must keep it."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """Additional request headers."""
    listeners: Listeners = attrs.field(default=NOBODY, eq=False, repr=False)


class HttpResponse(NamedTuple):
    """The server's answer: status, headers (with lower-case names) and the body as received."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sends: int = 1
    """How often the request was sent: more than once if a layer of the caller's client repeats requests."""


class NoResponse(NamedTuple):
    """No answer: the reason, and whether the gateway may have received the request."""

    reason: str
    may_have_arrived: bool
    cause: BaseException | None = None


Delivery: TypeAlias = HttpResponse | NoResponse

_QUOTED: Final = (
    *("date", "via", "request-id", "x-request-id", "x-trace-id", "x-correlation-id", "eagleeye-traceid", "eagleid"),
    *("eo-log-uuid", "x-nws-log-uuid", "cf-ray", "x-amz-cf-id", "x-amzn-requestid", "x-amzn-trace-id"),
)
"""Headers by which a server, proxy or CDN can find the request. LianLian documents none of its own."""


def last_exchange(delivery: Delivery | None, at: datetime, seconds: float) -> LastExchange:
    """Return the summary of an exchange for support tickets; ``delivery`` is None if the attempt was cancelled."""
    status, headers = (delivery.status, delivery.headers) if isinstance(delivery, HttpResponse) else (None, {})
    return LastExchange(at, seconds, status, {name: printable(headers[name]) for name in _QUOTED if name in headers})


class Finding(Enum):
    """The conclusion about the refund from one exchange."""

    NOT_SENT = "the request certainly never reached the gateway"
    FOUND = "the gateway returned its signed record of this refund"
    REJECTED = "the gateway rejected this request"
    EXISTS = "the gateway reports that a refund with this number may exist or is in progress"
    CONFLICT = "the gateway returned its signed record of another refund with this number"
    NOT_FOUND = "the gateway has no such record at this moment"
    UNCERTAIN = "nothing can be concluded"


@attrs.frozen(kw_only=True)
class Reply:
    """The result of an exchange: a ``refund`` if :attr:`Finding.FOUND`, else the ``error`` that explains the finding.

    A wrong combination raises ``ValueError``, because a user's middleware may create a reply.
    """

    finding: Finding
    refund: RefundRecord | None = None
    error: LianLianError | None = None
    verified: bool = False
    """Whether the answer had a valid signature of the gateway."""
    retry_after: float | None = None
    """The seconds of the server's Retry-After header."""
    attempts: int = 1
    """The number of attempts that led to this reply."""

    def __attrs_post_init__(self) -> None:
        if (self.finding is Finding.FOUND) is (self.refund is None) or (self.refund is None and self.error is None):
            raise ValueError("Reply: set refund if the finding is FOUND; else set error, and no refund")
        if not isinstance(self.finding, Finding) or not (self.error is None or isinstance(self.error, LianLianError)):
            raise ValueError("Reply: finding must be a Finding, error a LianLianError")
        if self.retry_after is not None and not isinstance(self.retry_after, int | float):
            raise ValueError("Reply: retry_after must be a number of seconds")
