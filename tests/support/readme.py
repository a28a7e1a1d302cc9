"""The README's examples, as they stand there."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from tests.support import ROOT

_README = ROOT / "README.md"
_EXAMPLE = re.compile(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)

EXAMPLES = dict(_EXAMPLE.findall(_README.read_text("utf-8")))


def run_example(name: str) -> dict[str, Any]:
    """Execute an example; what it defined."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(EXAMPLES[name], f"README.md: {name}", "exec"), namespace)
    return namespace


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The base URL of an ASGI application that uvicorn serves, lifespan and all, while the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
