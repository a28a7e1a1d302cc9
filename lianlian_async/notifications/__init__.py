"""Receive LianLian's notifications: verify, acknowledge, and call the handler at least once for each final refund."""

from .endpoint import NotificationEndpoint
from .responses import Ack, Verdict

__all__ = ["Ack", "NotificationEndpoint", "Verdict"]
