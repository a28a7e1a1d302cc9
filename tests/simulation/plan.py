"""What a seed decides: how many of what, which faults there are, who ends when. A plan can be made smaller."""

from __future__ import annotations

import random
from typing import Final

import attrs

GRACE: Final = 900.0
"""Seconds: ``RetryPolicy.not_found_grace`` of all nodes."""

MARGIN: Final = 20.0
"""Seconds by which the gateway keeps below the grace: what left is on its books then at the latest, or never."""

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
"""Faults of one exchange on its way."""

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
"""Faults of one exchange at the gateway."""

TWICE_DELIVERED: Final = "request_twice"
"""Only where the gateway deduplicates: no client could help otherwise."""

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
"""What notifications meet, and the handlers that they are given to."""

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
"""What happens to a node, its machine, the gateway or the journal."""

DATABASE: Final = ("database_restart", "failover", "failover", "database_step", "wall_slew")
"""What happens besides where there is a database, and each node has a machine of its own."""


@attrs.frozen
class Event:
    """Something that happens to a node or to the world at one moment."""

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
    """What nodes do: ``service``, ``batch`` or ``both``."""
    callers: int
    """How many callers each refund has at the same time in a service."""
    window: int
    """See :class:`.world.World`."""
    trouble: float
    """How many of 1 exchanges meet a fault."""
    faults: tuple[str, ...]
    events: tuple[Event, ...]
    deduplicates: str
    """What the gateway does with a number that it knows: ``no`` (makes it again), ``code`` or ``replay``."""
    rejects: float
    """How many of 1 refunds the gateway refuses for good."""
    reused: float = 0.0
    """How many of 1 numbers another refund has at the gateway: made before, with another ``dt_refund``."""
    dated: bool = True
    """Whether the gateway's answers have a ``Date``."""
    blind: bool = False
    """Whether the query service knows no refund at all: a wrong address."""
    deadline: float = 30.0
    spread: float = 60.0
    """Seconds over which refunds are asked for."""
    max_connections: int = 8
    query_first: bool = False
    slow_threads: float = 1e-4
    """Seconds that a thread job takes at most."""
    interleaved_threads: float = 0.0
    """How many of 1 signatures take time, in which the event loops go on."""
    cancelled_threads: float = 0.0
    """How many of 1 tasks that wait for a thread are cancelled meanwhile."""
    real_rsa: bool = False
    notifies: bool = False
    """Whether the gateway notifies, and nodes act on refunds."""
    inbox: bool = False
    """Whether their endpoints acknowledge first."""
    notices: tuple[str, ...] = ()
    machines: int = 1


def draw(seed: int | str, refunds: int, journals: tuple[str, ...]) -> Plan:
    """The plan that ``seed`` stands for."""
    dice = random.Random(f"plan {seed}")
    journal = dice.choice(journals)
    deduplicates = dice.choice(["no", "no", "code", "replay"])
    kinds = [*NETWORK, *GATEWAY, *([TWICE_DELIVERED] if deduplicates != "no" else [])]
    share = dice.choice([0.15, 0.5])
    faults = tuple(kind for kind in kinds if dice.random() < share)
    if dice.random() < 0.5:  # what makes "no such record" wrong, which is the hardest to live with
        faults = (*faults, "request_late", "late_books", "code_after")
    spread = dice.choice([1.0, 30.0, 300.0, 1500.0])
    nodes = 1 if journal == "none" else dice.choice([1, 2, 3])
    number = dice.choice([0, 1, 2, 4, 8])
    kinds = [kind for kind in ENDS if dice.random() < 0.6] or ["kill"]
    dated = dice.random() < (0.5 if journal == "postgres" else 0.85)
    if journal == "postgres":
        # Where the gateway sends no Date, a clock that is set while no worker proves it is beyond the bounds.
        kinds += [kind for kind in DATABASE if dice.random() < 0.6 and (dated or kind != "database_step")]
        faults = (*faults, *dice.choice([(), ("killed", "request_late"), ("killed", "stopped")]))
    events = [_event(dice, kinds, nodes, spread) for _ in range(number)]
    deadline = dice.choice([3.0, 3.0, 10.0, 30.0, 300.0])
    if journal == "postgres":
        deadline = min(deadline, 60.0)  # whoever waits for another's lease asks the database each second
        events += [_event(dice, ["failover", "disk"], nodes, spread) for _ in range(dice.choice([0, 1, 2, 4]))]
    acts = random.Random(f"acting {seed}")  # so that all else is drawn as without it
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
