"""Search for a secret in everything that an error tracker copies: exception chains and local variables of frames."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

TESTS = str(Path(__file__).parents[1])


def leaks(error: BaseException, secret: str | bytes, *, of: str = "") -> list[str]:
    """Return the places of ``secret``; frames of the tests, and of files whose path lacks ``of``, are skipped."""
    found = []
    for one in _chain(error, set()):
        if _holds(one.args, secret, 2) or _holds(vars(one), secret, 2):
            found.append(f"{type(one).__name__}: {one}")
        for place, name, value in _locals(one.__traceback__, of):
            if _holds(value, secret, 2):
                found.append(f"{place}: {name}")
    return found


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    yield from _chain(error.__cause__, seen)
    yield from _chain(error.__context__, seen)
    for inner in getattr(error, "exceptions", ()):
        yield from _chain(inner, seen)


def _locals(traceback: TracebackType | None, of: str) -> Iterator[tuple[str, str, object]]:
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if of in code.co_filename and not code.co_filename.startswith(TESTS):
            for name, value in traceback.tb_frame.f_locals.items():
                yield f"{code.co_filename}:{code.co_name}", name, value
        traceback = traceback.tb_next


def _holds(value: object, secret: str | bytes, depth: int) -> bool:
    """Return whether ``secret`` is in the repr of ``value`` or of its contents, down to ``depth`` levels."""
    text, raw = (secret, secret.encode()) if isinstance(secret, str) else (repr(secret)[2:-1], secret)
    if raw in value if isinstance(value, bytes) else text in repr(value):
        return True
    if not depth:
        return False
    inside = [getattr(value, name, None) for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    inside += vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else []
    if isinstance(value, dict):
        inside += [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inside += value
    return any(_holds(one, secret, depth - 1) for one in inside)
