"""Stop a batch or worker early after invalid signatures: with a wrong key, nearly all outcomes would be unknown."""

from typing import Final

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from .errors import SignatureInvalid
from .exchange import Exchange, Reply

_UNPROVED: Final = 4
"""Maximum number of refunds in flight in a batch or worker until one answer has a valid signature."""
_FAILURES: Final = 4
"""A batch or worker stops after ``SignatureInvalid`` for the answers about this number of refunds in a row."""


class SignatureWatch:
    """Records whether the answers in one session have valid signatures of the gateway.

    Several answers about one refund count once, so a single refund cannot stop a batch.
    """

    def __init__(self) -> None:
        self.has_verified = False
        """Whether an answer had a valid signature."""
        self.changed = anyio.Event()
        """Set when a refund ends, and at the first answer with a valid signature. A waiter replaces a set event."""
        self._failed: dict[str, SignatureInvalid] = {}
        """By number, the latest refunds with an invalid signature, since the last answer with a valid one."""

    def saw(self, exchange: Exchange, reply: Reply) -> None:
        """Record a reply. Ignore an unsigned rejection and a failure: they prove nothing about the keys."""
        if reply.verified:
            self._failed.clear()
            if not self.has_verified:
                self.has_verified = True
                self.changed.set()
        elif isinstance(reply.error, SignatureInvalid):
            asked = exchange.asked
            self._failed[asked.get("no_refund") or asked["oid_refundno"]] = reply.error
            if len(self._failed) > _FAILURES:
                del self._failed[next(iter(self._failed))]

    def failure(self) -> SignatureInvalid | None:
        """Return the error that must stop the batch; None: the batch may go on."""
        if len(self._failed) < _FAILURES:
            return None
        *_, last = self._failed.values()
        failure = SignatureInvalid(
            f"the answers about {_FAILURES} refunds in a row have no valid signature (the last one: {last}); these "
            "refunds may have been made. Check the gateway's public key (gateway_public_keys, "
            "LIANLIAN_GATEWAY_PUBLIC_KEYS) and the endpoints, then run the batch again with the same journal"
        )
        failure.last_exchange = last.last_exchange
        return failure


class Admission:
    """Limits the refunds in flight of a batch or worker to ``limit``, at first to at most 4 (see ``_UNPROVED``)."""

    def __init__(self, watch: SignatureWatch, limit: int) -> None:
        self._watch = watch
        self._limit = limit
        self.in_flight = 0

    async def acquire(self) -> None:
        """Wait until another refund may start, and count it."""
        while self.in_flight >= (self._limit if self._watch.has_verified else min(self._limit, _UNPROVED)):
            if self._watch.changed.is_set():
                self._watch.changed = anyio.Event()
            await self._watch.changed.wait()
        await checkpoint_if_cancelled()  # when a batch is cancelled, its refunds in flight end, and this loop too
        self.in_flight += 1

    def release(self) -> None:
        """Record that a refund has ended."""
        self.in_flight -= 1
        self._watch.changed.set()
