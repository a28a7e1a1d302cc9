"""Random sequences of calls on every journal, compared with a simple model."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lianlian_async import RefundConflict
from lianlian_async.journal import Standing, State
from tests.support import journals
from tests.support.journals import ACCEPTED, MADE, REJECTED, held, intent, now

pytestmark = pytest.mark.anyio

_numbers = st.sampled_from(["R-1", "R-2"])
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), _numbers, st.sampled_from(["1.00", "1.00", "2.00"]), st.booleans()),
        st.tuples(st.just("finish"), _numbers, st.sampled_from([MADE, ACCEPTED, REJECTED])),
        st.tuples(st.just("release"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("begin acting")),
        st.tuples(st.just("acted"), _numbers),
    ),
    max_size=25,
)


@attrs.define
class Page:
    """The model's state of one refund."""

    money: str
    body: bytes
    held_by: int | None = None
    is_over: bool = False
    """Whether the lease had ended when it began."""
    may_have_arrived: bool = False
    ending: object = None


@attrs.define
class Model:
    """The contract of ``journal.interface`` as a simple state machine."""

    forgets_holds: bool
    """Whether reopening the journal ends all leases."""
    pages: dict[str, Page] = attrs.field(factory=dict)
    calls: int = 0
    is_acting: bool = False

    def begin(self, number, money, body, is_over):
        page = self.pages.get(number)
        if page is not None and page.money != money:
            return "conflict"
        self.calls += 1
        if page is not None and page.ending is not None:
            return Standing.FINISHED
        if page is not None and page.held_by is not None and not page.is_over:
            return Standing.LEASED
        if page is None or (page.held_by is None and not page.may_have_arrived):
            self.pages[number] = Page(money, body, held_by=self.calls, is_over=is_over)
            return Standing.NEW
        page.held_by, page.is_over, page.may_have_arrived = self.calls, is_over, True
        return Standing.UNRESOLVED

    def finish(self, number, ending):
        page = self.pages.setdefault(number, Page("200.01", b""))
        is_final = ending.state is State.DONE
        if is_final and self.is_acting:
            ending = attrs.evolve(ending, state=State.FINAL)
        if page.ending is None or (page.ending.state is State.ACCEPTED and is_final):
            page.ending, page.held_by, page.body = ending, None, b""
        return page.ending

    def acted(self, number):
        page = self.pages.get(number)
        if page is not None and page.ending is not None and page.ending.state is State.FINAL:
            page.ending = attrs.evolve(page.ending, state=State.DONE)

    def release(self, number, call, may_have_arrived):
        page = self.pages[number]
        if page.held_by == call:
            page.held_by, page.may_have_arrived = None, may_have_arrived

    def reopen(self):
        for page in self.pages.values():
            if self.forgets_holds and page.held_by is not None:
                page.held_by, page.may_have_arrived = None, True


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def make_kind(request, tmp_path_factory):
    match request.param:
        case "memory":
            return journals.memory
        case "sqlite":
            return lambda: journals.sqlite(tmp_path_factory.mktemp("journal"))
        case _:
            dsn = request.getfixturevalue("postgres_dsn")
            return lambda: journals.postgres(dsn)


@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param


@settings(max_examples=60)
@given(steps=_steps)
async def test_every_journal_behaves_like_the_model(make_kind, steps):
    """After any sequence of calls, standings, bodies, endings, open refunds and counts equal those of the model."""
    kind = make_kind()
    model = Model(forgets_holds=isinstance(kind.make(), journals.SqliteJournal))
    journal = await kind.make().__aenter__()
    given_out = []
    try:
        for number, step in enumerate(steps):
            match step:
                case ("reopen",):
                    await journal.__aexit__(None, None, None)
                    journal = await kind.make().__aenter__()
                    model.reopen()
                case ("begin acting",):
                    await journal.begin_acting()
                    model.is_acting = True
                case ("acted", no_refund):
                    await journal.acted(no_refund, now())
                    model.acted(no_refund)
                case ("release", which, may_have_arrived) if which < len(given_out):
                    call, entry = given_out[-1 - which]
                    await journal.release(entry, now() if may_have_arrived else None)
                    model.release(entry.no_refund, call, may_have_arrived)
                case ("begin", no_refund, money, is_over):
                    await _begin(journal, model, given_out, no_refund, money, f"{number}".encode(), is_over)
                case ("finish", no_refund, ending):
                    assert (await journal.finish(held(no_refund), ending)).ending == model.finish(no_refund, ending)
            await _compare(journal, model)
    finally:
        await journal.__aexit__(None, None, None)


async def _begin(journal, model, given_out, no_refund, money, body, is_over):
    expected = model.begin(no_refund, money, body, is_over)
    wanted = intent(no_refund, money=money, body=body, lease=0.0 if is_over else 3600.0)
    if expected == "conflict":
        with pytest.raises(RefundConflict):
            await journal.begin(wanted, now())
        return
    standing, entry = await journal.begin(wanted, now())
    page = model.pages[no_refund]
    assert (standing, entry.body, entry.ending) == (expected, page.body, page.ending)
    if standing in (Standing.NEW, Standing.UNRESOLVED):
        assert (entry.sent_at is None) is (standing is Standing.NEW)
        given_out.append((model.calls, entry))


async def _compare(journal, model):
    states = {}
    for no_refund, page in model.pages.items():
        entry = await journal.find(no_refund)
        assert (entry.body, entry.ending) == (page.body, page.ending)
        assert (entry.holder is None) is (page.held_by is None)
        states[no_refund] = entry.state
    is_open = [number for number, state in states.items() if state in (State.UNRESOLVED, State.ACCEPTED, State.FINAL)]
    assert [entry.no_refund async for entry in journal.pending()] == is_open
    assert await journal.counts() == {state: list(states.values()).count(state) for state in State}
