"""One exchange with the gateway as values: the request, the response, and what is known afterwards.

Every exchange ends as *not sent*, *maybe sent* or *answered*. The transport tells which in a :data:`Delivery`; the
protocol reads it into a :class:`Reply`; middleware and resolution decide by the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, StrEnum
from typing import NamedTuple, TypeAlias

import attrs

from .errors import LianLianError
from .models import Refund
from .retry import Deadline, RetryPolicy


class Call(StrEnum):
    """The two calls of the gateway."""

    APPLY = "apply"
    QUERY = "query"


class SendCount:
    """Counts the sends of one attempt that may have worked.

    A caller's middleware may send several times in one attempt, one after the other or at the same time.
    """

    def __init__(self) -> None:
        self.open_sends = 0
        """All sends but those that certainly were not sent, and those that were refused."""

    @property
    def may_have_worked(self) -> bool:
        """Whether the gateway may have carried out the request."""
        return self.open_sends > 0


@attrs.frozen(kw_only=True)
class Exchange:
    """One request on its way: the same signed bytes on every attempt."""

    call: Call
    url: str
    body: bytes = attrs.field(repr=False)
    """The signed JSON."""
    asked: Mapping[str, str]
    """The wire fields of the request, without the signature."""
    deadline: Deadline
    """The deadline of the whole call."""
    policy: RetryPolicy
    lease_holds: Callable[[], bool] = attrs.field(default=lambda: True, eq=False, repr=False)
    """Called right before bytes leave: waiting, connecting or a suspension may have outlasted the lease."""
    attempt: int = 1
    """The number of this attempt, from 1."""
    seconds: float = 0.0
    """How long this attempt may take."""
    send_count: SendCount = attrs.field(factory=SendCount, eq=False, repr=False)


class HttpResponse(NamedTuple):
    """The server answered: status, headers (lower-case names) and the body as received."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NoResponse(NamedTuple):
    """No answer: the reason, and whether the request may have arrived."""

    reason: str
    may_have_arrived: bool
    cause: BaseException | None = None


Delivery: TypeAlias = HttpResponse | NoResponse


class Finding(Enum):
    """What one exchange tells about the refund."""

    NOT_SENT = "certainly never reached the gateway"
    FOUND = "the gateway's own signed record of this refund"
    REJECTED = "the gateway refused this request, for good"
    EXISTS = "the gateway says that it has this refund, or is working on it"
    CONFLICT = "the gateway's own signed record of another refund under this number"
    NOT_FOUND = "the gateway has no such record at this moment"
    UNCERTAIN = "nothing can be concluded"


@attrs.frozen(kw_only=True)
class Reply:
    """What is known after an exchange: a ``refund`` if :attr:`Finding.FOUND`, else the ``error`` that tells why not.

    Raises ``ValueError`` for any other combination: a reply may come from a caller's middleware.
    """

    finding: Finding
    refund: Refund | None = None
    error: LianLianError | None = None
    verified: bool = False
    """Whether the answer had a valid signature of the gateway."""
    retry_after: float | None = None
    """Seconds that the server asked to wait."""
    attempts: int = 1
    """How many attempts were made."""

    def __attrs_post_init__(self) -> None:
        if (self.finding is Finding.FOUND) is (self.refund is None) or (self.refund is None and self.error is None):
            raise ValueError("a Reply is FOUND with a refund, or anything else with an error")
