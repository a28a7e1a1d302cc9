"""One exchange with the gateway as values: what goes out, what comes back, and what is known afterwards.

Every exchange ends as *not sent*, *maybe sent* or *answered*. The transport says which in a
:data:`Delivery`; the protocol reads it into a :class:`Reply`; middleware and resolution decide by the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum
from typing import TypeAlias

import attrs

from .errors import LianLianError
from .models import Refund
from .retry import Deadline, RetryPolicy

__all__ = ["Call", "Delivery", "Exchange", "Finding", "HttpResponse", "NoResponse", "Reply", "SendCount"]


class Call(StrEnum):
    """Which of the gateway's two calls."""

    APPLY = "apply"
    QUERY = "query"


@attrs.define
class SendCount:
    """What one attempt has left behind so far, for whoever has to end it early or to doubt its reply.

    A caller's layer may send several times in one attempt, one after the other or side by side: hence a count.
    """

    open_sends: int = 0
    """Sends that may have worked: all but those that were certainly not sent, and those that were refused."""

    @property
    def may_have_worked(self) -> bool:
        """Whether the gateway may have carried the request out."""
        return self.open_sends > 0


def _no_lease() -> bool:
    return True


@attrs.frozen(kw_only=True)
class Exchange:
    """One request on its way: the same signed bytes on every attempt."""

    call: Call
    url: str
    body: bytes = attrs.field(repr=False)
    """The signed JSON, sent as it is."""
    asked: Mapping[str, str]
    """The wire fields of the request, without the signature."""
    deadline: Deadline
    """The whole call's."""
    policy: RetryPolicy
    lease_holds: Callable[[], bool] = attrs.field(default=_no_lease, eq=False, repr=False)
    """Asked once more right before bytes leave: waiting, connecting or a suspension may have outlasted the lease."""
    attempt: int = 1
    """Counts the attempts of this exchange, from 1."""
    seconds: float = 0.0
    """How long this attempt may take."""
    send_count: SendCount = attrs.field(factory=SendCount, repr=False)


@attrs.frozen
class HttpResponse:
    """The server answered: status, headers (lower-case names) and the body as received."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@attrs.frozen
class NoResponse:
    """No answer: ``reason`` in words, and whether the request may have arrived all the same."""

    reason: str
    may_have_arrived: bool
    cause: BaseException | None = None


Delivery: TypeAlias = HttpResponse | NoResponse


class Finding(Enum):
    """What one exchange has taught us about the refund."""

    NOT_SENT = "certainly never reached the gateway"
    FOUND = "the gateway's own signed record of this refund"
    REJECTED = "the gateway refused this request, for good"
    EXISTS = "the gateway says it has, or is working on, this refund already"
    CONFLICT = "the gateway's own signed record of another refund under this number"
    NOT_FOUND = "the gateway has no such record at this moment"
    UNCERTAIN = "nothing can be concluded"


@attrs.frozen(kw_only=True)
class Reply:
    """What is known after an exchange: a ``refund`` if :attr:`Finding.FOUND`, else the ``error`` that says why not.

    Raises ``ValueError`` for anything else: a reply may come from a caller's middleware, and money hangs on it.
    """

    finding: Finding
    refund: Refund | None = None
    error: LianLianError | None = None
    verified: bool = False
    """Whether the answer bore a valid signature of the gateway's."""
    retry_after: float | None = None
    """Seconds, as the server asked for."""
    attempts: int = 1
    """How many attempts it took."""

    def __attrs_post_init__(self) -> None:
        if (self.finding is Finding.FOUND) is (self.refund is None) or (self.refund is None and self.error is None):
            raise ValueError("a Reply is FOUND with a refund, or anything else with an error")
