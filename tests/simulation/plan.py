"""The plan of a run, determined by a seed: sizes, faults and events. A plan can be shrunk."""

from __future__ import annotations

import random
from typing import Final

import attrs

GRACE: Final = 900.0
"""Seconds: ``RetryPolicy.not_found_grace`` of all nodes."""

MARGIN: Final = 20.0
"""Seconds: a request is on the gateway's books at most ``GRACE - MARGIN`` seconds after it left a node, or never."""

NETWORK: Final = (
    "refused",
    "connect_hangs",
    "request_lost",
    "answer_lost",
    "request_late",
    "answer_late",
    "write_fails",
    "reset",
    "other_answer",
    "garbage",
    "cancelled_below",
    "base_exception_below",
    "stopped",
    "killed",
)
"""Faults of the network in one exchange."""

GATEWAY: Final = (
    "status_before",
    "status_after",
    "code_before",
    "code_after",
    "no_signature",
    "bad_signature",
    "in_progress",
    "late_books",
    "may_pass",
)
"""Faults of the gateway in one exchange."""

TWICE_DELIVERED: Final = "request_twice"
"""Only if the gateway deduplicates: otherwise no client could prevent the second refund."""

NOTICES: Final = (
    "never",
    "late",
    "lost",
    "twice",
    "forged",
    "short",
    "answer_lost",
    "slow",
    "hangs",
    "raises",
    "cancelled_itself",
    "base_exception",
    "killed",
    "disk",
)
"""Faults of notifications and of their handlers."""

ENDS: Final = (
    "kill",
    "reboot",
    "interrupt",
    "interrupt_twice",
    "cancel_task",
    "suspend",
    "stop",
    "wall_step",
    "outage",
    "disk",
)
"""Events at a node, its machine, the gateway or the journal."""

DATABASE: Final = ("database_restart", "failover", "failover", "database_step", "wall_slew")
"""More events with a database, where each node has a machine of its own."""


@attrs.frozen
class Event:
    """An event at a node or in the world, at one moment."""

    at: float
    kind: str
    node: int
    amount: float

    def __str__(self) -> str:
        return f"{self.at:10.3f} s  {self.kind} node {self.node} ({self.amount:.3f})"


@attrs.frozen(kw_only=True)
class Plan:
    """One run."""

    seed: str
    refunds: int
    nodes: int
    journal: str
    """``none``, ``memory``, ``sqlite`` or ``postgres``."""
    program: str
    """The program of the nodes: ``service``, ``batch`` or ``both``."""
    callers: int
    """The number of concurrent callers of each refund in a service."""
    window: int
    """See :class:`.world.World`."""
    trouble: float
    """Probability of a fault in an exchange."""
    faults: tuple[str, ...]
    events: tuple[Event, ...]
    deduplicates: str
    """The gateway's reaction to a known ``no_refund``: ``no`` (makes it again), ``code`` or ``replay``."""
    rejects: float
    """Probability that the gateway rejects a refund permanently."""
    reused: float = 0.0
    """Probability that the gateway already has another refund (other ``dt_refund``) with a ``no_refund``."""
    dated: bool = True
    """Whether the gateway's answers have a ``Date`` header."""
    blind: bool = False
    """Whether the query service knows no refund, as behind a wrong URL."""
    deadline: float = 30.0
    spread: float = 60.0
    """Seconds over which callers request the refunds."""
    max_connections: int = 8
    query_first: bool = False
    slow_threads: float = 1e-4
    """Maximum duration of a thread job in seconds."""
    interleaved_threads: float = 0.0
    """Probability that event loops run during a signature in a thread."""
    cancelled_threads: float = 0.0
    """Probability that a task is cancelled while it waits for a thread."""
    real_rsa: bool = False
    notifies: bool = False
    """Whether the gateway sends notifications, and nodes call ``on_refund``."""
    inbox: bool = False
    """Whether the endpoints acknowledge before they call ``on_refund`` (inbox)."""
    notices: tuple[str, ...] = ()
    machines: int = 1


def draw(seed: int | str, refunds: int, journals: tuple[str, ...]) -> Plan:
    """Return the plan of ``seed``."""
    dice = random.Random(f"plan {seed}")
    journal = dice.choice(journals)
    deduplicates = dice.choice(["no", "no", "code", "replay"])
    kinds = [*NETWORK, *GATEWAY, *([TWICE_DELIVERED] if deduplicates != "no" else [])]
    share = dice.choice([0.15, 0.5])
    faults = tuple(kind for kind in kinds if dice.random() < share)
    if dice.random() < 0.5:  # the faults that make "no such record" wrong: the most dangerous ones
        faults = (*faults, "request_late", "late_books", "code_after")
    spread = dice.choice([1.0, 30.0, 300.0, 1500.0])
    nodes = 1 if journal == "none" else dice.choice([1, 2, 3])
    number = dice.choice([0, 1, 2, 4, 8])
    kinds = [kind for kind in ENDS if dice.random() < 0.6] or ["kill"]
    dated = dice.random() < (0.5 if journal == "postgres" else 0.85)
    if journal == "postgres":
        # Without Date headers, a clock step that no running worker observes is beyond the documented bounds.
        kinds += [kind for kind in DATABASE if dice.random() < 0.6 and (dated or kind != "database_step")]
        faults = (*faults, *dice.choice([(), ("killed", "request_late"), ("killed", "stopped")]))
    events = [_event(dice, kinds, nodes, spread) for _ in range(number)]
    deadline = dice.choice([3.0, 3.0, 10.0, 30.0, 300.0])
    if journal == "postgres":
        deadline = min(deadline, 60.0)  # a worker that waits for a lease polls the database each second
        events += [_event(dice, ["failover", "disk"], nodes, spread) for _ in range(dice.choice([0, 1, 2, 4]))]
    acts = random.Random(f"acting {seed}")  # a separate generator: it does not change the other random choices
    notifies = journal != "none" and acts.random() < 0.4
    return Plan(
        seed=str(seed),
        refunds=refunds,
        nodes=nodes,
        machines=nodes if journal == "postgres" else 1,
        journal=journal,
        program=dice.choice(["service", "batch", "both"]),
        callers=dice.choice([1, 1, 2, 3]),
        window=dice.choice([1, 3, 1_000_000]),
        trouble=dice.choice([0.0, 0.05, 0.2, 0.6]),
        faults=faults,
        events=tuple(sorted(events, key=lambda event: event.at)),
        deduplicates=deduplicates,
        rejects=dice.choice([0.0, 0.0, 0.1]),
        reused=dice.choice([0.0, 0.0, 0.1]) if deduplicates != "no" else 0.0,
        dated=dated,
        blind=journal != "none" and dice.random() < 0.1,
        deadline=deadline,
        spread=spread,
        max_connections=dice.choice([2, 8, 20]),
        query_first=dice.random() < 0.1,
        slow_threads=dice.choice([1e-4, 1e-4, 0.02, 0.5]),
        interleaved_threads=dice.choice([0.0, 0.0, 0.2, 0.5]),
        cancelled_threads=dice.choice([0.0, 0.0, 0.002, 0.02]),
        real_rsa=dice.random() < 0.001,
        notifies=notifies,
        inbox=notifies and acts.random() < 0.5,
        notices=tuple(kind for kind in NOTICES if notifies and acts.random() < 0.4),
    )


def _event(dice: random.Random, kinds: list[str], nodes: int, spread: float) -> Event:
    kind = dice.choice(kinds)
    at = dice.choice([spread * dice.random(), dice.random(), spread + 1200.0 * dice.random()])
    amounts = {
        "suspend": [0.5, 40.0, 890.0, 1000.0, 7200.0],
        "stop": [0.5, 40.0, 890.0, 1000.0, 7200.0],
        "wall_step": [-7200.0, -60.0, 600.0, 901.0, 86_400.0],
        "outage": [1.0, 60.0, 1200.0],
        "disk": [0.5, 5.0, 60.0],
        "failover": [0.0, 0.02, 1.0, 10.0, 100.0],
        "database_step": [-3600.0, -60.0, 600.0, 901.0, 86_400.0],
        "wall_slew": [-3600.0, 3600.0],
        "kill": [0.0, 1.0, 60.0, 1000.0],
        "reboot": [0.0, 1.0, 60.0, 1000.0],
    }
    return Event(at, kind, dice.randrange(nodes), dice.choice(amounts.get(kind, [0.0])) * (0.9 + 0.2 * dice.random()))
