"""Judge early whether the gateway's answers verify: with a wrong key, a whole batch would be made and left unknown."""

from __future__ import annotations

from math import inf
from typing import Final

import anyio
import attrs

from .errors import SignatureInvalid
from .exchange import Exchange, Reply

__all__ = ["Admission", "SignatureWatch"]

_UNPROVED: Final = 4
"""Refunds of a batch that are under way until one answer has verified."""
_FAILURES: Final = 4
"""Refunds in a row whose answers do not verify: they stop a batch."""


class SignatureWatch:
    """What the answers of one session have shown about the gateway's keys.

    Several answers about one refund count once: a single odd refund, asked about again and again, stops no other.
    """

    def __init__(self) -> None:
        self.has_verified = False
        """Whether one answer has."""
        self.changed = anyio.Event()
        """Replaced when it is set."""
        self._failed: dict[str, SignatureInvalid] = {}
        """The refunds whose answers did not verify, since the last answer that did."""

    def saw(self, exchange: Exchange, reply: Reply) -> None:
        """Take in an answer. A refusal without signature says nothing about the keys."""
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
        """Return why nothing more should be sent; None if nothing speaks against it."""
        if len(self._failed) < _FAILURES:
            return None
        *_, last = self._failed.values()
        return SignatureInvalid(
            f"the answers about {_FAILURES} refunds in a row have no valid signature (the last one: {last}); these "
            "refunds may have been made. Check the gateway's public key (gateway_public_keys, "
            "LIANLIAN_GATEWAY_PUBLIC_KEYS) and the endpoints, then run it again with the same journal"
        )


@attrs.define
class Admission:
    """Lets few refunds of one batch or worker be under way until one answer has verified, and ``limit`` then."""

    watch: SignatureWatch
    limit: float = inf
    """How many may be under way afterwards."""
    _under_way: int = attrs.field(default=0, init=False)

    async def enter(self) -> None:
        """Wait until another refund may begin."""
        while self._under_way >= (self.limit if self.watch.has_verified else min(self.limit, _UNPROVED)):
            if self.watch.changed.is_set():
                self.watch.changed = anyio.Event()
            await self.watch.changed.wait()
        self._under_way += 1

    def leave(self) -> None:
        """A refund has ended."""
        self._under_way -= 1
        self.watch.changed.set()
