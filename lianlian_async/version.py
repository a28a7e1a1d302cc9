"""The release."""

__version__ = "0.1.0"
USER_AGENT = f"lianlian-async/{__version__}"
