"""Signatures are made in a thread, several in one round, also when callers are cancelled."""

import asyncio
import threading
import time
from contextlib import suppress

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lianlian_async import rsa_worker
from lianlian_async.rsa_worker import LONGEST_ROUND, RsaWorker
from lianlian_async.signing import SigningKey
from tests.support import keypairs

pytestmark = pytest.mark.anyio


class Watched(SigningKey):
    """A real key that records in which thread it signs, and that can be blocked there."""

    __slots__ = ("go_on", "threads")

    @classmethod
    def of(cls, pair):
        key = cls.load(pair.private_pem)
        key.threads, key.go_on = [], threading.Event()
        return key

    def sign(self, source):
        self.threads.append(threading.get_ident())
        assert self.go_on.wait(30)
        return super().sign(source)


@pytest.fixture
def key():
    return Watched.of(keypairs.pair("merchant"))


@pytest.fixture
async def rsa(merchant, key):
    return await opened(merchant, key)


async def opened(merchant, key):
    """Return an RsaWorker for ``key``; from now on ``key`` blocks until the test releases it."""
    key.go_on.set()
    thread = await RsaWorker.open(attrs.evolve(merchant, private_key=key))
    key.go_on.clear()
    key.threads.clear()
    return thread


async def waits_in_thread(rsa, busy):
    """Keep the thread from its next round until ``busy`` is set."""
    await anyio.to_thread.run_sync(busy.wait, limiter=rsa._limiter)


def message(number):
    return {"no_refund": f"R-{number}"}


async def test_each_caller_gets_its_own_signature(rsa, key, merchant_keys):
    """Twenty callers at the same time get twenty valid signatures, none made on the event loop."""
    key.go_on.set()
    bodies = {}

    async def ask(number):
        bodies[number] = await rsa.seal(message(number))

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(ask, number)
    assert bodies == {number: rsa.protocol.seal(message(number)) for number in range(20)}
    assert threading.get_ident() not in key.threads[:20]


class Instant(SigningKey):
    """A key that signs instantly with invalid signatures."""

    __slots__ = ()

    def sign(self, source):
        return "c2lnbmF0dXJl"


class Slow(Watched):
    """A real key that takes longer than LONGEST_ROUND."""

    __slots__ = ()

    def sign(self, source):
        until = time.perf_counter() + 2 * LONGEST_ROUND
        while time.perf_counter() < until:
            signature = super().sign(source)
        return signature


@pytest.mark.parametrize(("kind", "expected"), [(Instant, 1), (Slow, 6)], ids=["instant", "slow"])
async def test_waiting_jobs_share_a_round_if_that_is_quick(merchant, monkeypatch, kind, expected):
    """A round signs for all callers that wait, or for one if a signature takes long."""
    key = kind.of(keypairs.pair("merchant")) if kind is Slow else kind.load(keypairs.pair("merchant").private_pem)
    if kind is Slow:
        key.go_on.set()
    rsa = await RsaWorker.open(attrs.evolve(merchant, private_key=key))
    rounds = 0
    run_sync = anyio.to_thread.run_sync
    all_wait = anyio.Event()

    async def counted(function, **options):
        nonlocal rounds
        rounds += 1
        await all_wait.wait()
        return await run_sync(function, **options)

    monkeypatch.setattr(anyio.to_thread, "run_sync", counted)
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(rsa.seal, message(number))
        await anyio.wait_all_tasks_blocked()
        all_wait.set()
    assert rounds == expected


async def test_a_signature_is_delivered_before_its_round_ends(rsa, key, monkeypatch):
    """A caller continues while the thread still signs for the others of the same round."""
    monkeypatch.setattr(rsa_worker, "DELIVER_AFTER", 0.0)
    monkeypatch.setattr(rsa_worker, "LONGEST_ROUND", 60.0)
    gate = key.go_on = Gate()
    busy, bodies = threading.Event(), {}

    async def ask(number):
        bodies[number] = await rsa.seal(message(number))

    async with anyio.create_task_group() as group:
        group.start_soon(waits_in_thread, rsa, busy)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            group.start_soon(ask, number)
        await anyio.wait_all_tasks_blocked()
        busy.set()
        gate.release(2)
        for _ in range(3):  # the third signature has begun
            assert await anyio.to_thread.run_sync(gate.started.acquire, True, 30)
        await anyio.wait_all_tasks_blocked()
        assert set(bodies) == {1}  # the leader waits for its round
        gate.release(4)
    assert bodies == {number: rsa.protocol.seal(message(number)) for number in range(3)}


async def test_message_that_cannot_be_signed(rsa, key):
    """Only its own caller gets the error; the others of the same round get their signatures."""
    bodies, errors = {}, {}

    async def ask(name, fields):
        try:
            bodies[name] = await rsa.seal(fields)
        except UnicodeEncodeError as error:
            errors[name] = error

    async with anyio.create_task_group() as group:
        group.start_soon(ask, "first", message(1))
        await anyio.wait_all_tasks_blocked()
        group.start_soon(ask, "good", message(2))
        group.start_soon(ask, "bad", {"no_refund": "\ud800"})
        group.start_soon(ask, "good too", message(3))
        await anyio.wait_all_tasks_blocked()
        key.go_on.set()
    assert set(bodies) == {"first", "good", "good too"}
    assert set(errors) == {"bad"}


async def test_caller_cancelled_in_the_queue(rsa, key):
    """A caller that is cancelled before the thread is free leaves no job behind."""
    async with anyio.create_task_group() as group:
        group.start_soon(rsa.seal, message(1))
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.01):
            await rsa.seal(message(2))
        key.go_on.set()
    assert len(key.threads) == 1
    await rsa.wait_until_idle()


async def test_leader_cancelled_before_the_round(merchant, key):
    """A leader that is cancelled before the thread is free takes no other job with it."""
    key.go_on.set()
    protocol = (await RsaWorker.open(attrs.evolve(merchant, private_key=key))).protocol
    rsa = RsaWorker(protocol, anyio.CapacityLimiter(1), verify_inline=False)
    free, scopes, bodies = threading.Event(), {}, {}

    async def ask(number):
        with anyio.CancelScope() as scopes[number]:
            bodies[number] = await rsa.seal(message(number))

    async with anyio.create_task_group() as group:
        group.start_soon(rsa.check, free.wait)
        await anyio.wait_all_tasks_blocked()
        for number in range(6):
            group.start_soon(ask, number)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            scopes[number].cancel()
        await anyio.wait_all_tasks_blocked()
        free.set()
    assert bodies == {number: protocol.seal(message(number)) for number in (3, 4, 5)}


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_leader_cancelled_during_the_round(rsa, key):
    """If Task.cancel ends a leader while the thread works, the others still get their own signatures."""
    bodies = {}

    async def ask(number):
        bodies[number] = await rsa.seal(message(number))

    async with asyncio.TaskGroup() as group:
        leader = group.create_task(ask(0))
        await anyio.wait_all_tasks_blocked()
        for number in (1, 2, 3):
            group.create_task(ask(number))
        await anyio.wait_all_tasks_blocked()
        leader.cancel()
        await anyio.wait_all_tasks_blocked()
        key.go_on.set()
    assert bodies == {number: rsa.protocol.seal(message(number)) for number in (1, 2, 3)}


class Gate:
    """Allows one signature for each ``release``; ``started`` is released when a signature begins."""

    def __init__(self):
        self.passes, self.started = threading.Semaphore(0), threading.Semaphore(0)
        self.release = self.passes.release

    def wait(self, seconds):
        self.started.release()
        return self.passes.acquire(timeout=seconds)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_job_in_the_round_of_a_cancelled_leader(rsa, key, monkeypatch):
    """Its caller leads the next round, finds the job taken, and still gets its own signature."""
    gate = key.go_on = Gate()
    first, second, round_ended, bodies = threading.Event(), threading.Event(), threading.Event(), {}
    sign_round = rsa._sign_round

    def noted_round():
        sign_round()
        round_ended.set()

    async def ask(number):
        bodies[number] = await rsa.seal(message(number))

    monkeypatch.setattr(rsa_worker, "LONGEST_ROUND", 60.0)
    monkeypatch.setattr(rsa, "_sign_round", noted_round)
    async with asyncio.TaskGroup() as group:
        group.create_task(waits_in_thread(rsa, first))
        await anyio.wait_all_tasks_blocked()
        leader = group.create_task(ask(0))
        await anyio.wait_all_tasks_blocked()
        group.create_task(ask(1))
        group.create_task(waits_in_thread(rsa, second))
        await anyio.wait_all_tasks_blocked()
        first.set()
        assert await anyio.to_thread.run_sync(gate.started.acquire, True, 30)
        leader.cancel()  # the other caller leads now, and waits for the thread
        await anyio.wait_all_tasks_blocked()
        gate.release()
        assert await anyio.to_thread.run_sync(gate.started.acquire, True, 30)  # its job, in the first round
        second.set()
        assert await anyio.to_thread.run_sync(round_ended.wait, 30)  # its own round found nothing
        gate.release(2)
    assert bodies == {1: rsa.protocol.seal(message(1))}


class Panic(BaseException):
    """What cryptography raises for a panic in its Rust code."""


class Panicking(Watched):
    """A real key whose backend panics at one message."""

    __slots__ = ()

    def sign(self, source):
        if source == b"no_refund=R-1":
            raise Panic
        return super().sign(source)


async def test_panic_in_one_signature(merchant):
    """Its caller gets it; the callers before and after it in the same round get their signatures."""
    key = Panicking.of(keypairs.pair("merchant"))
    rsa = await opened(merchant, key)
    key.go_on.set()
    busy, bodies, errors = threading.Event(), {}, []

    async def ask(number):
        try:
            bodies[number] = await rsa.seal(message(number))
        except Panic as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        group.start_soon(waits_in_thread, rsa, busy)
        for number in range(3):
            await anyio.wait_all_tasks_blocked()
            group.start_soon(ask, number)
        await anyio.wait_all_tasks_blocked()
        busy.set()
    assert bodies == {number: rsa.protocol.seal(message(number)) for number in (0, 2)}
    assert len(errors) == 1


async def test_caller_cancelled_during_the_round(rsa, key):
    """The thread finds its job gone, and ends the round."""
    gate = key.go_on = Gate()
    busy, scope, bodies = threading.Event(), anyio.CancelScope(), {}

    async def ask(number):
        with scope if number else anyio.CancelScope():
            bodies[number] = await rsa.seal(message(number))

    async with anyio.create_task_group() as group:
        group.start_soon(waits_in_thread, rsa, busy)
        await anyio.wait_all_tasks_blocked()
        for number in range(2):
            group.start_soon(ask, number)
            await anyio.wait_all_tasks_blocked()
        busy.set()
        assert await anyio.to_thread.run_sync(gate.started.acquire, True, 30)
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        gate.release(2)
    assert bodies == {0: rsa.protocol.seal(message(0))}


@settings(max_examples=20)
@given(cancelled=st.sets(st.integers(0, 19)), early=st.booleans(), busy=st.booleans())
async def test_cancellation_loses_no_other_signature(merchant, cancelled, early, busy):
    """Callers are cancelled in the queue, waiting for the thread, or leading a round; all others get theirs."""
    key = Watched.of(keypairs.pair("merchant"))
    rsa = await opened(merchant, key)
    rsa = RsaWorker(rsa.protocol, anyio.CapacityLimiter(1), verify_inline=False)
    scopes, bodies = {}, {}

    async def ask(number):
        with anyio.CancelScope() as scopes[number]:
            bodies[number] = await rsa.seal(message(number))

    async with anyio.create_task_group() as group:
        if busy:
            group.start_soon(rsa.check, key.go_on.wait)
            await anyio.wait_all_tasks_blocked()
        for number in range(20):
            group.start_soon(ask, number)
        await anyio.wait_all_tasks_blocked()
        if not early:
            key.go_on.set()
            await anyio.lowlevel.checkpoint()
        for number in cancelled:
            with suppress(KeyError):
                scopes[number].cancel()
        key.go_on.set()
    assert set(range(20)) - cancelled <= set(bodies)
    assert all(bodies[number] == rsa.protocol.seal(message(number)) for number in bodies)
