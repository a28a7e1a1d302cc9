"""LianLian Pay refunds for asyncio and trio."""

__version__ = "0.1.0"
