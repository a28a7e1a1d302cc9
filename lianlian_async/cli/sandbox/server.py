"""Serve the sandbox with uvicorn in a thread, and make the environment variables of its merchant."""

import logging
import socket
import threading
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn

from lianlian_async.errors import ConfigurationError
from lianlian_async.sandbox import Notifier, SandboxGateway

_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not bound here
"""The address in the URL of a sandbox that listens on all addresses, by the address it listens on."""


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Return whether uvicorn logged an exception that is neither a broken connection nor a cancelled request."""
    return record.exc_info is not None and not isinstance(record.exc_info[1], ConnectionResetError | CancelledError)


@contextmanager
def serving(gateway: SandboxGateway | Notifier, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve ``gateway`` while the block runs, and yield its base URL; port 0 means any free port.

    One second after the end, requests without a response are cancelled. Raises ``ConfigurationError`` if the address
    cannot be used.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"{host} port {port}: {error.strerror}; use another host or port") from None
    with listener:  # the kernel queues connections until the server runs
        config = uvicorn.Config(
            gateway,
            lifespan="on" if isinstance(gateway, Notifier) else "off",
            ws="none",
            log_config=None,
            timeout_graceful_shutdown=1,
            date_header=False,  # the gateway sends its own
        )
        logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
        config.load()  # imports modules: in the thread, this would delay the caller's event loop
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="lianlian-sandbox")
        thread.start()
        try:
            host = _LOOPBACK.get(host, host)
            yield f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def environment(gateway: SandboxGateway, base_url: str) -> dict[str, str]:
    """Return environment variables for ``Merchant.from_env``, with each RSA key as Base64 on one line."""
    merchant = gateway.merchant(base_url)
    return {
        "LIANLIAN_OID_PARTNER": merchant.oid_partner,
        "LIANLIAN_PRIVATE_KEY": "".join(gateway.merchant_key.to_pem().splitlines()[1:-1]),
        "LIANLIAN_GATEWAY_PUBLIC_KEYS": gateway.gateway_key.public_key().to_base64(),
        "LIANLIAN_APPLY_URL": merchant.endpoints.apply,
        "LIANLIAN_QUERY_URL": merchant.endpoints.query,
        "LIANLIAN_NOTIFY_URL": str(merchant.notify_url),
    }
