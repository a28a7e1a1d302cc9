"""Breadth-first search over all states of a model, with the shortest trace to a forbidden state."""

from __future__ import annotations

import time
from collections import deque

import attrs

from . import parts
from .model import Bounds, Model, World, first


@attrs.frozen(kw_only=True)
class Result:
    """The result of one search."""

    states: int
    transitions: int
    seconds: float
    twice: tuple[str, ...] | None
    """The shortest trace to a refund that is made twice; None if there is none."""
    denied: tuple[str, ...] | None
    """The shortest trace in which a caller gets "not made" for a refund that was made; None if there is none."""


def explore(bounds: Bounds, *, until_twice: bool = False) -> Result:
    """Visit every state within ``bounds``; ``until_twice``: stop at the first refund that is made twice."""
    parts.heard.cache_clear()  # an injected fault may have changed the results
    model, began = Model(bounds), time.perf_counter()
    start = first(bounds)
    came_from: dict[World, tuple[World, str] | None] = {start: None}
    queue, transitions = deque([start]), 0
    found: dict[str, World] = {}
    while queue and not (until_twice and "twice" in found):
        world = queue.popleft()
        for name, after in model.steps(world):
            transitions += 1
            if after in came_from:
                continue
            came_from[after] = world, name
            if after.is_twice:
                found.setdefault("twice", after)
            elif after.is_denied:
                found.setdefault("denied", after)
            elif not is_over(after):
                queue.append(after)

    def trace(world: World | None) -> tuple[str, ...] | None:
        if world is None:
            return None
        steps = []
        while (origin := came_from[world]) is not None:
            earlier, name = origin
            steps.append(f"{earlier.now:3d}  {name}")
            world = earlier
        return tuple(reversed(steps))

    seconds = time.perf_counter() - began
    return Result(
        states=len(came_from),
        transitions=transitions,
        seconds=seconds,
        twice=trace(found.get("twice")),
        denied=trace(found.get("denied")),
    )


def is_over(world: World) -> bool:
    """Whether no later step can make a refund or tell a caller "not made"."""
    sent = world.made + sum(request.made_at is None for request in world.requests)
    left = sum(worker.left for worker in world.workers)
    if not sent:
        return not left
    return sent + left < 2 and not any(
        worker.is_rejected or worker.phase == "refused" or (worker.phase == "ready" and worker.sent_at is None)
        for worker in world.workers
    )
