"""Cut the power at every point of a batch: ``python -m tests.programs.power_loss --refunds 100 --states 5000``.

A process runs a batch with an SQLite journal; ``strace`` records its writes, truncations, renames, syncs and requests
in their order. At the power loss, what was synced is on disk; each later write is on disk, lost or torn (some of its
512-byte sectors), independently of the others. The names in a folder are on disk up to some change after its last sync
(file systems keep this order). For each such state a journal is opened on the files that are left. It must be intact,
know every refund that may have been sent, and every outcome that the batch had reported, and belong to its owner.
The order is also checked directly: before the first byte of a request, its refund is in a synced write, and the names
of the journal's files and folders are synced. Needs ``strace`` (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final
from unittest import mock

import anyio
import attrs

from lianlian_async import JournalError, Merchant, RefundSession, refund_many
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.cli.stores import make_folder
from lianlian_async.journal import SqliteJournal, State, sqlite_schema
from lianlian_async.sandbox import Fault, Repeated
from tests.programs.kill import IMPATIENT, requests, stormy_gateway
from tests.support import ROOT, program

CHECKPOINT_PAGES: Final = 20
"""So small that a few refunds fill the WAL, and it is written again from its beginning."""
POLICY: Final = attrs.evolve(IMPATIENT, not_found_grace=0.5)
"""The sandbox is never late here, and a refund that it did not make is sent again within the deadline."""
SECTOR: Final = 512
"""Bytes that a disk writes completely or not at all."""
REMADE: Final = ("-owner", "-shm")
"""Files that are made again: the name of the process, and SQLite's shared memory."""

# ── the recorded process ─────────────────────────────────────────────────────────────────────────


async def work(journal_path: Path, count: int) -> None:
    """Run the batch twice; print each refund and its recorded state once the outcome is durable."""
    make_folder(str(journal_path))
    with mock.patch.object(sqlite_schema, "CHECKPOINT_PAGES", CHECKPOINT_PAGES):
        for _ in range(2):  # the second run resolves what the first left unknown, in the same files
            async with (
                SqliteJournal(journal_path) as journal,
                RefundSession(Merchant.from_env(), journal=journal, retry=POLICY, deadline=5.0) as session,
            ):
                await journal.begin_acting()
                _tell("journal", journal.id)
                async for outcome in refund_many(session, requests(count), concurrency=4):
                    entry = await journal.find(outcome.request.no_refund)
                    _tell(outcome.request.no_refund, "missing" if entry is None else entry.state)


def _tell(*words: str) -> None:
    os.write(1, f"{json.dumps(words)}\n".encode())


# ── the recording ────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Write:
    """Bytes written to a file."""

    file: int
    at: int
    data: bytes = attrs.field(repr=False)


@attrs.frozen
class Resize:
    """A truncation or an extension of a file."""

    file: int
    size: int


@attrs.frozen
class Sync:
    """A sync of a file, or of a folder and its names."""

    file: int
    path: str


@attrs.frozen
class Name:
    """A name that was made in a folder, or removed (``file`` is None)."""

    folder: int
    path: str
    file: int | None
    is_folder: bool = False


@attrs.define
class Request:
    """The first byte of a request on a socket; ``no_refund`` if it applies for a refund."""

    no_refund: str | None = None


@attrs.frozen
class Told:
    """A line that the process printed: the journal's id, or a refund's number and state."""

    about: str
    value: str


Step = Write | Resize | Sync | Name | Request | Told

_CALLS: Final = (
    "openat,open,creat,write,pwrite64,writev,pwritev,ftruncate,truncate,fallocate,fsync,fdatasync,unlink,unlinkat,"
    "rename,renameat,renameat2,link,linkat,mkdir,mkdirat,sendto,sendmsg"
)
_LINE: Final = re.compile(r"(\d+) +(.*)")
_CALL: Final = re.compile(r"(\w+)\((?:(\w+)<([^>]*)>)?(.*)\) += (\d+)")
_SENDING: Final = re.compile(r"(?:write|writev|sendto|sendmsg)\((\d+)<([^>]*)>")
_TEXT: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_NUMBER: Final = re.compile(rb'"no_refund": ?"([^"]+)"')


def _bytes(text: str) -> bytes:
    """Decode the hexadecimal form in which ``strace -xx`` prints strings and paths."""
    return bytes.fromhex(text.replace("\\x", ""))


@attrs.define
class Recorder:
    """Reads the lines of strace; keeps the steps on files below ``root``, on sockets and on standard output."""

    root: str
    steps: list[Step] = attrs.field(factory=list)
    _files: dict[str, int] = attrs.field(factory=dict)
    """The number of the file or folder at each path; a path that was removed and made again gets another one."""
    _begun: dict[str, str] = attrs.field(factory=dict)
    """The first part of a call that another thread interrupted, by thread."""
    _sending: dict[str, tuple[Request, bytes]] = attrs.field(factory=dict)
    """The latest request on each socket, and its bytes so far."""

    def __attrs_post_init__(self) -> None:
        self._files[self.root] = 0

    def read(self, lines: Iterable[str]) -> None:
        """Keep the steps of ``lines``. A request counts from the start of its call, anything else from the end."""
        for line in lines:
            if (found := _LINE.match(line)) is None:
                continue
            thread, call = found.groups()
            if call.startswith("<..."):
                call = self._begun.pop(thread) + call.partition("resumed>")[2]
            else:
                self._start(call)
            if call.endswith("<unfinished ...>"):
                self._begun[thread] = call.removesuffix("<unfinished ...>")
            elif (ended := _CALL.match(call)) is not None:
                self._end(*ended.groups(""))
            elif not re.search(r"^(\+\+\+|---)| = (-1|\?)", call):
                raise NotImplementedError(call)

    def _start(self, call: str) -> None:
        found = _SENDING.match(call)
        if found is None or b"socket:" not in _bytes(found[2]):
            return
        descriptor, data = found[1], b"".join(map(_bytes, _TEXT.findall(call)))
        if data.startswith(b"POST "):
            self._sending[descriptor] = request, sent = Request(), b""
            self.steps.append(request)
        if descriptor in self._sending:
            request, sent = self._sending[descriptor]
            self._sending[descriptor] = request, sent + data
            head, _, body = (sent + data).partition(b"\r\n\r\n")
            if b"/refundquery.htm" not in head and (number := _NUMBER.search(body)):
                request.no_refund = number[1].decode()

    def _end(self, call: str, descriptor: str, where: str, rest: str, result: str) -> None:
        texts = [_bytes(text) for text in _TEXT.findall(rest)]
        if call == "write" and descriptor == "1":
            # Other lines are of a child process: ctypes runs ldconfig.
            self.steps += [Told(*json.loads(line)) for line in texts[0].splitlines() if line.startswith(b"[")]
            return
        paths = [_bytes(where)] if descriptor.isdigit() else texts
        path = next((path for path in map(bytes.decode, paths) if self._is_ours(path)), None)
        if path is None:
            return
        match call:
            case "open" | "openat" | "mkdir":
                if path not in self._files and (call == "mkdir" or "O_CREAT" in rest):
                    self._files[path] = len(self.steps) + 1
                    self._name(path, self._files[path], is_folder=call == "mkdir")
            case "unlink":
                del self._files[path]
                self._name(path, None)
            case "pwrite64":
                self.steps.append(Write(self._files[path], int(rest.rpartition(", ")[2]), texts[0][: int(result)]))
            case "ftruncate":
                self.steps.append(Resize(self._files[path], int(rest.rpartition(", ")[2])))
            case "fsync" | "fdatasync":
                self.steps.append(Sync(self._files[path], path))
            case _:
                raise NotImplementedError(f"{call} on {path}")

    def _is_ours(self, path: str) -> bool:
        return path.startswith(self.root) and not path.endswith(REMADE)

    def _name(self, path: str, file: int | None, *, is_folder: bool = False) -> None:
        self.steps.append(Name(self._files[str(Path(path).parent)], path, file, is_folder))


@attrs.frozen
class Recording:
    """The steps of a process, in their order."""

    journal_path: Path
    steps: Sequence[Step]


def record(folder: Path, *, refunds: int, seed: int) -> Recording:
    """Run the batch under strace, with its journal in a new folder below ``folder``."""
    gateway = stormy_gateway(refunds, repeated=Repeated.AGAIN, seed=seed)
    gateway.faults = {Fault.RESET: 0.1, Fault.BUSY: 0.1}
    root, trace = folder / "root", folder / "trace"
    root.mkdir()
    journal_path = root / "new" / "folder" / "journal.sqlite"
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000", "-e", f"trace={_CALLS}", "-o", str(trace)]
    command = [*strace, *program("power_loss"), "--work", str(journal_path), "--refunds", str(refunds)]
    with serving(gateway) as base_url:
        variables = os.environ | environment(gateway, base_url)
        subprocess.run(command, cwd=ROOT, env=variables, check=True, stdout=subprocess.PIPE)
    recorder = Recorder(str(root))
    with trace.open() as lines:
        recorder.read(map(str.rstrip, lines))
    disk = Disk()
    for step in recorder.steps:
        disk.add(step)
    if disk.files(list) != {str(journal_path): journal_path.read_bytes()}:
        raise RuntimeError("the recording is incomplete: replayed, it does not give the files that the process left")
    return Recording(journal_path, recorder.steps)


# ── the disk ─────────────────────────────────────────────────────────────────────────────────────

Change = Write | Resize
Choice = Callable[[Sequence[Change]], Sequence[Change]]
"""Takes the changes of a file since its last sync; returns those that are on disk after the power loss."""


def _apply(content: bytearray, changes: Iterable[Change]) -> bytearray:
    for change in changes:
        if isinstance(change, Resize):
            del content[change.size :]
        size = change.size if isinstance(change, Resize) else change.at
        content.extend(bytes(max(0, size - len(content))))
        if isinstance(change, Write):
            content[change.at : change.at + len(change.data)] = change.data
    return content


@attrs.define
class Disk:
    """The synced state of all files and names, and the changes since the last syncs."""

    synced: dict[int, bytearray] = attrs.field(factory=dict)
    changes: dict[int, list[Change]] = attrs.field(factory=dict)
    names: dict[str, Name] = attrs.field(factory=dict)
    renamed: list[Name] = attrs.field(factory=list)
    _folders: set[str] = attrs.field(factory=set)

    def add(self, step: Step) -> None:
        """Carry out one step."""
        match step:
            case Write(file=file) | Resize(file=file):
                self.changes.setdefault(file, []).append(step)
            case Name(path=path):
                self.renamed.append(step)
                self._folders |= {path} if step.is_folder else set()
            case Sync(file=file):
                self.synced[file] = _apply(self.synced.get(file, bytearray()), self.changes.pop(file, ()))
                self.names |= {name.path: name for name in self.renamed if name.folder == file}
                self.renamed = [name for name in self.renamed if name.folder != file]

    def files(self, choose: Choice, renamed: int | None = None) -> dict[str, bytes]:
        """Return the files by path if the power fails now, with the first ``renamed`` changes of names (or all)."""
        names = self.names | {name.path: name for name in self.renamed[:renamed]}
        there = {path for path, name in names.items() if name.file is not None}
        return {
            path: bytes(_apply(self.synced.get(file, bytearray())[:], choose(self.changes.get(file, ()))))
            for path, name in names.items()
            if (file := name.file) is not None
            and path not in self._folders
            and {str(parent) for parent in Path(path).parents} & self._folders <= there
        }


def _torn(dice: random.Random, change: Change) -> Iterator[Change]:
    """Yield a random part of the sectors of a write."""
    if isinstance(change, Write):
        ends = range(change.at - change.at % SECTOR, change.at + len(change.data) + SECTOR, SECTOR)
        for begin, end in pairwise(max(0, end - change.at) for end in ends):
            if dice.random() < 0.5:
                yield Write(change.file, change.at + begin, change.data[begin:end])


def _choices(dice: random.Random) -> dict[str, Choice]:
    def in_order(changes: Sequence[Change]) -> Sequence[Change]:
        last = dice.randint(0, len(changes))
        return [*changes[:last], *(part for change in changes[last : last + 1] for part in _torn(dice, change))]

    def in_any_order(changes: Sequence[Change]) -> Sequence[Change]:
        fates = [(change, dice.choice(("on disk", "lost", "torn"))) for change in changes]
        return [
            part
            for change, fate in fates
            if fate != "lost"
            for part in ([change] if fate == "on disk" else _torn(dice, change))
        ]

    return {"lost": lambda _: (), "on disk": list, "in order": in_order, "in any order": in_any_order}


# ── the power loss ───────────────────────────────────────────────────────────────────────────────


@attrs.define
class Known:
    """Facts that the journal must not contradict: refunds that may have been sent, and printed outcomes."""

    sent: set[str] = attrs.field(factory=set)
    told: dict[str, str] = attrs.field(factory=dict)
    journal_id: str | None = None

    def add(self, step: Step) -> None:
        """Note one step."""
        match step:
            case Request(no_refund=str(number)):
                self.sent.add(number)
            case Told(about="journal"):
                self.journal_id = step.value
            case Told():
                self.told[step.about] = step.value


def sent_too_early(steps: Iterable[Step]) -> list[str]:
    """Return the requests that left before their refund, or a name of the journal, was synced."""
    disk, found = Disk(), []
    for step in steps:
        disk.add(step)
        if isinstance(step, Request) and step.no_refund:
            row = f'"no_refund":"{step.no_refund}"'.encode()
            if not any(row in content for content in disk.synced.values()):
                found.append(f"{step.no_refund}: its row is not synced")
            found += [f"{step.no_refund}: {name.path} is not synced" for name in disk.renamed if name.file is not None]
    return found


@attrs.frozen
class Report:
    """The result of all power losses."""

    steps: dict[str, int]
    """The number of recorded steps by kind."""
    states: dict[str, int]
    """The number of disks by the fate of the writes that were not synced."""
    problems: dict[str, str]
    """Problems by point and fate; must be empty."""
    seconds: float


async def lose_power(recording: Recording, *, states: int, seed: int) -> Report:
    """Open a journal on ``states`` disks: half of them right after a request or a printed outcome."""
    began, dice, steps = time.monotonic(), random.Random(seed), recording.steps
    counts: Counter[str] = Counter()
    problems = {}
    choices = _choices(dice)
    facts = [at for at, step in enumerate(steps) if isinstance(step, Request | Told)]
    plan = [(at, "lost") for at in dice.sample(facts, min(states // 2, len(facts)))]
    plan += [(dice.randrange(len(steps)), dice.choice([*choices])) for _ in range(states - len(plan))]
    disk, known, done = Disk(), Known(), 0
    for at, fate in sorted(plan):
        for step in steps[done : at + 1]:
            disk.add(step)
            known.add(step)
        done = at + 1
        counts[fate] += 1
        files = disk.files(choices[fate], 0 if fate == "lost" else dice.randint(0, len(disk.renamed)))
        with tempfile.TemporaryDirectory(dir=recording.journal_path.parent) as folder:
            path = Path(folder, recording.journal_path.name)
            if str(recording.journal_path) in files:
                os.link(recording.journal_path, path)  # a power loss keeps the inode; a copy would be refused
            for name, content in files.items():
                path.with_name(Path(name).name).write_bytes(content)
            if problem := await _problem(path, known):
                problems[f"step {at} of {len(steps)}, {fate}: {step}"] = problem
    kinds = Counter(type(step).__name__ for step in steps)
    return Report(dict(kinds), dict(counts), problems, round(time.monotonic() - began, 1))


async def _problem(path: Path, known: Known) -> str | None:
    """Return the problem of the journal after the power loss; None if there is none."""
    try:
        async with SqliteJournal(path) as journal:
            entries = {entry.no_refund: str(entry.state) async for entry in journal.entries()}
            if known.journal_id is not None and (journal.id != known.journal_id or journal.owner is None):
                return "it is another journal, or belongs to nobody"
    except JournalError as error:
        return str(error)
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            [[damage], *_] = connection.execute("PRAGMA integrity_check")
    except sqlite3.DatabaseError as error:  # the damage prevents the check
        return str(error)
    if damage != "ok":
        return str(damage)
    if absent := known.sent - entries.keys():
        return f"sent, but not on record: {sorted(absent)}"
    differs = {
        number: f"{entries.get(number)}, told {state}"
        for number, state in known.told.items()
        if entries.get(number) != state and state != State.UNRESOLVED
    }
    return f"told another outcome: {differs}" if differs else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refunds", type=int, default=100)
    parser.add_argument("--states", type=int, default=5000, help="number of power losses")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        anyio.run(work, options.work, options.refunds)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        recording = record(Path(folder), refunds=options.refunds, seed=options.seed)
        early = sent_too_early(recording.steps)
        report = anyio.run(partial(lose_power, recording, states=options.states, seed=options.seed))
    print(json.dumps({"seed": options.seed, "sent_too_early": early, **attrs.asdict(report)}, indent=2))
    return 1 if early or report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
