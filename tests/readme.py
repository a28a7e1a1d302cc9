"""The README's examples, as they stand there."""

import re
from pathlib import Path
from typing import Any

_README = Path(__file__).resolve().parents[1] / "README.md"
_EXAMPLE = re.compile(r"<!-- example: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)

EXAMPLES = dict(_EXAMPLE.findall(_README.read_text("utf-8")))


def run_example(name: str) -> dict[str, Any]:
    """Execute an example; what it defined."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(compile(EXAMPLES[name], f"README.md: {name}", "exec"), namespace)
    return namespace
