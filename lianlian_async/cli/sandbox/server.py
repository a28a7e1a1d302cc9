"""The sandbox on a real socket: a uvicorn server in a thread of its own, and the environment that leads to it."""

from __future__ import annotations

import logging
import socket
import threading
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import uvicorn

from lianlian_async.errors import ConfigurationError
from lianlian_async.sandbox import Notifier, SandboxGateway

__all__ = ["environment", "serving"]


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log tells of a bug: what the sandbox breaks on purpose or at its end is none."""
    return record.exc_info is not None and not isinstance(record.exc_info[1], ConnectionResetError | CancelledError)


@contextmanager
def serving(gateway: SandboxGateway | Notifier, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve ``gateway`` while the block runs, and notify of its refunds; its base URL. Port 0 takes a free one.

    Raises ``ConfigurationError`` if the address cannot be had. Requests that still wait are cut off at the end.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"{host} port {port}: {error.strerror}") from None
    with listener:  # it takes connections from here on, even before the server runs
        name = f"[{host}]" if ":" in host else host
        lifespan: Literal["on", "off"] = "on" if isinstance(gateway, Notifier) else "off"
        config = uvicorn.Config(
            gateway,
            lifespan=lifespan,
            ws="none",
            log_config=None,
            timeout_graceful_shutdown=1,
            date_header=False,  # the gateway sends its own
        )
        logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="lianlian-sandbox")
        thread.start()
        try:
            yield f"http://{name}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def environment(gateway: SandboxGateway, base_url: str, **overrides: Any) -> dict[str, str]:
    """The variables that ``Merchant.from_env`` needs to call ``gateway`` at ``base_url``; keys in one line each.

    ``overrides`` are further or other arguments of ``Merchant``.
    """
    merchant = gateway.merchant(base_url, **overrides)
    return {
        "LIANLIAN_OID_PARTNER": merchant.oid_partner,
        "LIANLIAN_PRIVATE_KEY": "".join(gateway.merchant_key.to_pem().splitlines()[1:-1]),
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": gateway.gateway_key.public_key().to_base64(),
        "LIANLIAN_APPLY_URL": merchant.endpoints.apply,
        "LIANLIAN_QUERY_URL": merchant.endpoints.query,
        "LIANLIAN_NOTIFY_URL": str(merchant.notify_url),
    }
