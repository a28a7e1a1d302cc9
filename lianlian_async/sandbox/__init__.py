"""A refund gateway to try everything against: stateful, strict, really signed, and as unreliable as you ask for.

``SandboxGateway`` is an ASGI application: serve it with any ASGI server, or hand it to
``httpx.ASGITransport`` and never open a socket. No money is anywhere near it.
"""

from __future__ import annotations

from .faults import Fault, When
from .gateway import SandboxGateway
from .ledger import Order, Record, Repeated
from .notifier import Delivery, Mischief, Notifier

__all__ = ["Delivery", "Fault", "Mischief", "Notifier", "Order", "Record", "Repeated", "SandboxGateway", "When"]
