"""Extract and run the examples in the README and in docstrings."""

import re
import socket
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from lianlian_async.contrib import aiohttp
from tests.support import ROOT

README = (ROOT / "README.md").read_text("utf-8")
TRANSLATION = (ROOT / "README.zh-CN.md").read_text("utf-8")

_EXAMPLE = re.compile(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)


def _of_docstring(text: str | None) -> str:
    """Return the code block behind ``::`` at the end of a docstring."""
    return textwrap.dedent((text or "").partition("::\n")[2])


EXAMPLES = dict(_EXAMPLE.findall(README))
RECIPES = {"aiohttp": _of_docstring(aiohttp.__doc__)}
"""Recipes in docstrings to which the README links."""


def run_example(name: str) -> dict[str, Any]:
    """Execute an example, and return the names that it defined."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile((EXAMPLES | RECIPES)[name], f"example {name}", "exec"), namespace)
    return namespace


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
