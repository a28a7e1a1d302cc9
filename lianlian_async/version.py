"""The release; sent as User-Agent with every request."""

__version__ = "0.1.0"
