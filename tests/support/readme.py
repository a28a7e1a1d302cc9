"""Extract and run the examples in the README and in docstrings."""

import re
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import django
import uvicorn
from django.conf import settings

from lianlian_async import contrib, logs, middleware
from lianlian_async.contrib import aiohttp, opentelemetry, procrastinate, web
from tests.support import ROOT

README = (ROOT / "README.md").read_text("utf-8")
TRANSLATION = (ROOT / "README.zh-CN.md").read_text("utf-8")

_EXAMPLE = re.compile(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)


_BLOCK = re.compile(r"::\n((?:\n|    .*\n)+)")


def _of_docstring(module: ModuleType) -> list[str]:
    """Return the code blocks behind ``::`` in the docstring of a module."""
    return [textwrap.dedent(block) for block in _BLOCK.findall(module.__doc__ or "")]


EXAMPLES = dict(_EXAMPLE.findall(README))
RECIPES = dict(
    zip(
        ("aiohttp", "starlette", "django", "synchronous", "logs", "opentelemetry", "queue", "middleware"),
        (
            *_of_docstring(aiohttp),
            *_of_docstring(web),
            *_of_docstring(contrib),
            *_of_docstring(logs),
            *_of_docstring(opentelemetry),
            *_of_docstring(procrastinate),
            *_of_docstring(middleware),
        ),
        strict=True,
    )
)
"""Recipes in docstrings to which the README links."""


def run_example(name: str, **names: Any) -> dict[str, Any]:
    """Execute an example, which may use ``names``, and return the names that it defined."""
    namespace: dict[str, Any] = {"__name__": "readme", **names}
    exec(compile((EXAMPLES | RECIPES)[name], f"example {name}", "exec"), namespace)
    return namespace


def set_up_django() -> None:
    """Set up Django with its default settings, unless another test of this process has done so."""
    if not settings.configured:
        settings.configure(LOGGING_CONFIG=None)
        django.setup()


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an ASGI application with uvicorn, lifespan included, and yield its base URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
