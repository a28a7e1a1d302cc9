"""Notifications: raw bytes in, an acknowledgement out, and one handler call for each final refund."""

from .endpoint import NotificationEndpoint
from .responses import Ack, Verdict

__all__ = ["Ack", "NotificationEndpoint", "Verdict"]
