"""A fake refund gateway for tests: stateful, strict, with real signatures, and with faults on request.

``SandboxGateway`` is an ASGI application: serve it with any ASGI server, or pass it to ``httpx.ASGITransport``
without a socket. No real money is involved.
"""

from .faults import Fault, When
from .gateway import SandboxGateway
from .ledger import Order, Record, Repeated
from .notifier import Delivery, NotificationFault, Notifier

__all__ = [
    "Delivery",
    "Fault",
    "NotificationFault",
    "Notifier",
    "Order",
    "Record",
    "Repeated",
    "SandboxGateway",
    "When",
]
