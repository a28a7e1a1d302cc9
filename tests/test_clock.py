"""Virtual time itself: it jumps over waits, and never over work."""

import asyncio
import hashlib
import socket

import anyio
import anyio.to_thread
import pytest

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def real_work() -> int:
    """Some real milliseconds of a thread's time."""
    return len(hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 50_000))


async def test_a_long_sleep_takes_no_real_time():
    """An hour's sleep ends at once, and the clock shows that it passed."""
    await anyio.sleep(3600.5)
    assert anyio.current_time() == 3600.5


async def test_sleepers_wake_in_order_at_their_times():
    """Tasks that sleep at the same time wake at their own times, in order."""
    woken = []

    async def sleep(seconds):
        await anyio.sleep(seconds)
        woken.append((seconds, anyio.current_time()))

    async with anyio.create_task_group() as tasks:
        for seconds in (3.0, 0.25, 7200.0, 1.0):
            tasks.start_soon(sleep, seconds)
    assert woken == [(0.25, 0.25), (1.0, 1.0), (3.0, 3.0), (7200.0, 7200.0)]


async def test_a_timeout_fires_at_its_time():
    """A wait without end is cancelled exactly at its deadline."""
    with anyio.move_on_after(12.5) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() == 12.5


async def test_time_stands_still_while_a_thread_works():
    """No timeout, however short, overtakes a thread."""
    with anyio.fail_after(0.001):
        for _ in range(5):
            assert await anyio.to_thread.run_sync(real_work) == 32
    assert anyio.current_time() == 0.0


async def test_time_stands_still_until_the_last_thread_ends():
    """Several threads, queued behind a limiter, all end before time moves on."""
    ended = []
    limiter = anyio.CapacityLimiter(2)

    async def job():
        await anyio.to_thread.run_sync(real_work, limiter=limiter)
        ended.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(job)
        await anyio.sleep(0.001)
        assert ended == [0.0] * 6
        await anyio.sleep(60)
    assert anyio.current_time() == 60.001


async def test_time_moves_after_a_thread_failed():
    """The exception of a thread is raised, and time moves on."""
    with pytest.raises(ZeroDivisionError):
        await anyio.to_thread.run_sync(lambda: 1 // 0)
    await anyio.sleep(5)
    assert anyio.current_time() == 5.0


async def test_an_abandoned_thread_does_not_hold_the_time():
    """Time moves on when nobody waits for the thread."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.to_thread.run_sync(real_work, abandon_on_cancel=True)
    await anyio.sleep(5)
    assert anyio.current_time() == 5.0


async def test_ready_input_is_handled_before_time_jumps():
    """Bytes on a socket are read before any timeout fires."""
    left, right = socket.socketpair()
    with left, right:
        right.setblocking(False)
        left.send(b"here")
        with anyio.fail_after(0.001):
            await anyio.wait_readable(right)
        assert right.recv(4) == b"here"
    assert anyio.current_time() == 0.0


async def test_name_lookup_takes_no_virtual_time():
    """The backends look up host names in their own threads."""
    with anyio.fail_after(0.001):
        assert await anyio.getaddrinfo("localhost", 80)
    assert anyio.current_time() == 0.0


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_time_stands_still_for_a_thread_of_asyncio():
    """``asyncio.to_thread`` uses another pool than anyio."""
    with anyio.fail_after(0.001):
        assert await asyncio.to_thread(real_work) == 32
    assert anyio.current_time() == 0.0


async def test_every_test_begins_at_zero():
    """No virtual time is left from another test."""
    assert anyio.current_time() == 0.0
