"""Notifications: raw bytes in, an acknowledgement out, and a handler that is called once for each final refund."""

from .acks import Ack, Verdict
from .endpoint import NotificationEndpoint

__all__ = ["Ack", "NotificationEndpoint", "Verdict"]
