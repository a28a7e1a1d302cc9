"""The sandbox's books are right after any sequence of applications, failures and time."""

from decimal import Decimal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lianlian_async.models import RefundStatus
from lianlian_async.sandbox import Order, Repeated
from lianlian_async.sandbox.answers import Rejection
from lianlian_async.sandbox.ledger import Ledger


def ledger(*, repeated=Repeated.REJECT, settle_after=2.0, default_order=None):
    return Ledger(repeated=repeated, settle_after=settle_after, default_order=default_order)


def paid(books, no_order, money_order, *, oid_paybill=None):
    """Add a paid order to a ledger and return it."""
    oid_paybill = oid_paybill or books.new_number()
    return books.add_order(Order(no_order=no_order, money_order=money_order, oid_paybill=oid_paybill))


def application(**changes):
    """Return the fields of an apply request with ``changes`` (None removes a field)."""
    fields = {
        "no_refund": "R-1",
        "dt_refund": "20130515094018",
        "money_refund": "60.00",
        "no_order": "O-1",
        "notify_url": "https://shop.example/refund",
        **changes,
    }
    return {name: str(value) for name, value in fields.items() if value is not None}


def question(**changes):
    """Return the fields of a query with ``changes``."""
    return {"dt_refund": "20130515094018", "no_refund": "R-1", **changes}


def refused(call, *args):
    """Return the code of the rejection that a call raises."""
    with pytest.raises(Rejection) as rejection:
        call(*args)
    return rejection.value.answer["ret_code"]


# ── orders ───────────────────────────────────────────────────────────────────────────────────────


def test_an_order_is_refunded_in_parts_until_nothing_is_left():
    """Partial refunds are accepted up to the order's amount, then 5007."""
    books = ledger()
    order = paid(books, "O-1", Decimal("100.00"))
    books.apply(application(), 0.0)
    assert refused(books.apply, application(no_refund="R-2", money_refund=Decimal("40.01")), 0.0) == "5007"
    books.apply(application(no_refund="R-2", money_refund=Decimal("40.00")), 0.0)
    assert order.rest(0.0) == 0


def test_refund_above_the_order_is_rejected():
    """5003 for an amount above the whole order."""
    books = ledger()
    paid(books, "O-1", Decimal("59.99"))
    assert refused(books.apply, application(), 0.0) == "5003"


def test_an_order_that_nobody_added_does_not_exist():
    """5002 for an unknown order or payment number."""
    books = ledger()
    assert refused(books.apply, application(), 0.0) == "5002"
    assert refused(books.apply, application(no_order=None, oid_paybill="P-1"), 0.0) == "5002"


def test_default_order_is_created_once():
    """An order that nobody added has the default amount once, not once per refund."""
    books = ledger(default_order=Decimal("100.00"))
    books.apply(application(oid_paybill="P-1"), 0.0)
    assert refused(books.apply, application(no_refund="R-2"), 0.0) == "5007"
    assert refused(books.apply, application(no_refund="R-2", no_order=None, oid_paybill="P-1"), 0.0) == "5007"


def test_an_order_is_found_by_either_of_its_numbers():
    """The order number, the payment number, and both of them together mean the same order."""
    books = ledger()
    order = paid(books, "O-1", Decimal("180.00"), oid_paybill="P-1")
    books.apply(application(), 0.0)
    books.apply(application(no_refund="R-2", no_order=None, oid_paybill="P-1"), 0.0)
    books.apply(application(no_refund="R-3", oid_paybill="P-1"), 0.0)
    assert order.rest(0.0) == 0


@pytest.mark.parametrize(("no_order", "oid_paybill"), [("O-1", "P-2"), ("O-1", "P-9"), ("O-9", "P-1")])
def test_numbers_of_different_orders_do_not_match(no_order, oid_paybill):
    """9092 if order number and payment number belong to different orders."""
    books = ledger()
    paid(books, "O-1", Decimal("100.00"), oid_paybill="P-1")
    paid(books, "O-2", Decimal("100.00"), oid_paybill="P-2")
    assert refused(books.apply, application(no_order=no_order, oid_paybill=oid_paybill), 0.0) == "9092"


def test_numbers_are_taken_once():
    """A second order with the same number is a ValueError, and changes nothing."""
    books = ledger()
    paid(books, "O-1", Decimal("100.00"), oid_paybill="P-1")
    with pytest.raises(ValueError, match="no_order O-1 exists already"):
        paid(books, "O-1", Decimal("1.00"), oid_paybill="P-2")
    with pytest.raises(ValueError, match="oid_paybill P-1 exists already"):
        paid(books, "O-2", Decimal("1.00"), oid_paybill="P-1")
    assert refused(books.apply, application(no_order=None, oid_paybill="P-2"), 0.0) == "5002"
    assert refused(books.apply, application(no_order="O-2"), 0.0) == "5002"


@pytest.mark.parametrize("money", [Decimal(0), Decimal("1.005"), Decimal("NaN"), Decimal(100_000_001)])
def test_order_amount_must_be_valid(money):
    """An invalid amount is refused for an order and for the default order."""
    with pytest.raises(ValueError, match="must"):
        paid(ledger(), "O-1", money)
    with pytest.raises(ValueError, match="must"):
        ledger(default_order=money)


def test_a_refund_cannot_settle_before_it_is_made():
    """A negative settle_after is refused."""
    with pytest.raises(ValueError, match="settle_after"):
        ledger(settle_after=-1.0)


# ── states ───────────────────────────────────────────────────────────────────────────────────────


def test_a_refund_settles_as_time_passes():
    """Initialized for the first half of settle_after, processing for the second, then success."""
    record = ledger(default_order=Decimal("100.00"), settle_after=10.0).apply(application(), 5.0)
    assert [record.status(now).value for now in (5.0, 9.9, 10.0, 14.9, 15.0)] == ["0", "0", "1", "1", "2"]


def test_a_refund_may_be_settled_from_the_start():
    """With settle_after 0 the state is final at once."""
    record = ledger(default_order=Decimal("100.00"), settle_after=0.0).apply(application(), 5.0)
    assert record.status(5.0) is RefundStatus.SUCCESS


@pytest.mark.parametrize("marked_at", [None, 1.0])
def test_a_failed_refund_gives_its_money_back(marked_at):
    """The order can be refunded again after a refund has failed, not while it may still succeed."""
    books = ledger()
    order = paid(books, "O-1", Decimal("100.00"))
    if marked_at is None:
        books.fail("R-1", 0.0)
    record = books.apply(application(), 0.0)
    if marked_at is not None:
        books.fail("R-1", marked_at)
    assert (order.rest(1.9), record.moved(1.9)) == (Decimal("40.00"), Decimal("60.00"))
    assert record.status(2.0) is RefundStatus.FAILED
    assert (order.rest(2.0), record.moved(2.0)) == (Decimal("100.00"), Decimal(0))


def test_a_final_state_never_changes():
    """A refund that is already final cannot be made to fail."""
    books = ledger(default_order=Decimal("100.00"))
    record = books.apply(application(), 0.0)
    with pytest.raises(ValueError, match="R-1 is already final"):
        books.fail("R-1", 2.0)
    assert record.status(3.0) is RefundStatus.SUCCESS


# ── repeated numbers ─────────────────────────────────────────────────────────────────────────────


def test_a_repeated_number_is_rejected():
    """1002 under REJECT, even if the order's remaining amount is sufficient."""
    books = ledger(default_order=Decimal("200.00"))
    books.apply(application(), 0.0)
    assert refused(books.apply, application(), 1.0) == "1002"
    assert len(books.records) == 1


def test_a_repeated_number_is_replayed():
    """Under REPLAY the first record is the answer, even to an application with another amount."""
    books = ledger(default_order=Decimal("200.00"), repeated=Repeated.REPLAY)
    first = books.apply(application(), 0.0)
    assert books.apply(application(money_refund=Decimal("1.00")), 1.0) is first
    assert books.records == [first]


def test_a_repeated_number_is_carried_out_again():
    """Under AGAIN the money moves twice if the order allows it; a query returns the last record."""
    books = ledger(default_order=Decimal("150.00"), repeated=Repeated.AGAIN)
    books.apply(application(), 0.0)
    second = books.apply(application(), 1.0)
    assert refused(books.apply, application(), 2.0) == "5007"
    assert len(books.made("R-1")) == 2
    assert books.query(question(), 2.0) is second


# ── queries ────────────────────────────────────────────────────────────────────────────────────


def test_a_refund_is_found_by_either_of_its_numbers():
    """no_refund, oid_refundno, and both of them together find the same record."""
    books = ledger(default_order=Decimal("100.00"))
    record = books.apply(application(), 0.0)
    assert record.oid_refundno.isdigit()
    assert len(record.oid_refundno) == 16
    assert books.query(question(), 1.0) is record
    assert books.query(question(oid_refundno=record.oid_refundno), 1.0) is record
    assert books.query(question(no_refund="", oid_refundno=record.oid_refundno), 1.0) is record


@pytest.mark.parametrize(
    "changes",
    [
        {"no_refund": "R-9"},
        {"no_refund": "", "oid_refundno": "9999999999999999"},
        {"oid_refundno": "9999999999999999"},
        {"dt_refund": "20130515094019"},
    ],
)
def test_query_with_a_wrong_field_finds_nothing(changes):
    """8901 if a number or the time differs from the record."""
    books = ledger(default_order=Decimal("100.00"))
    books.apply(application(), 0.0)
    assert refused(books.query, question(**changes), 1.0) == "8901"


def test_query_after_three_months_is_refused():
    """3005 if more than three months have passed since the refund was received."""
    books = ledger(default_order=Decimal("100.00"))
    record = books.apply(application(), 1000.0)
    assert books.query(question(), 1000.0 + 92 * 86_400) is record
    assert refused(books.query, question(), 1001.0 + 92 * 86_400) == "3005"


# ── whatever happens ─────────────────────────────────────────────────────────────────────────────

ORDERS = {"O-1": Decimal("1.00"), "O-2": Decimal("0.05")}
NUMBERS = st.sampled_from(["R-1", "R-2", "R-3", "R-4"])


class Books(RuleBasedStateMachine):
    """A ledger under random use, compared with a model of a client that sees only its answers."""

    @initialize(repeated=st.sampled_from(Repeated), settle_after=st.sampled_from([0.0, 2.0, 10.0]))
    def open(self, repeated, settle_after):
        self.repeated = repeated
        self.books = ledger(repeated=repeated, settle_after=settle_after)
        self.orders = {no: paid(self.books, no, money) for no, money in ORDERS.items()}
        self.now = 0.0
        self.seen = {}

    @rule(no_refund=NUMBERS, no_order=st.sampled_from(list(ORDERS)), fen=st.integers(1, 120))
    def apply(self, no_refund, no_order, fen):
        money, order = Decimal(fen) / 100, self.orders[no_order]
        rest, known, made = order.rest(self.now), self.books.made(no_refund)[:], self.books.records[:]
        applied = application(no_refund=no_refund, no_order=no_order, money_refund=money)
        if known and self.repeated is Repeated.REJECT:
            assert refused(self.books.apply, applied, self.now) == "1002"
        elif known and self.repeated is Repeated.REPLAY:
            assert self.books.apply(applied, self.now) is known[0]
        elif money > rest:
            assert refused(self.books.apply, applied, self.now) == ("5003" if money > ORDERS[no_order] else "5007")
        else:
            record = self.books.apply(applied, self.now)
            rest -= record.moved(self.now)
            made.append(record)
        assert (order.rest(self.now), self.books.records) == (rest, made)

    @rule(seconds=st.sampled_from([0.5, 1.0, 5.0, 60.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(no_refund=NUMBERS)
    def fail(self, no_refund):
        if any(record.status(self.now).is_final for record in self.books.made(no_refund)):
            with pytest.raises(ValueError, match="already final"):
                self.books.fail(no_refund, self.now)
        else:
            self.books.fail(no_refund, self.now)

    @invariant()
    def no_order_is_refunded_beyond_its_amount(self):
        for no_order, order in getattr(self, "orders", {}).items():
            moved = sum(record.moved(self.now) for record in self.books.records if record in order.refunds)
            assert 0 <= moved <= ORDERS[no_order]
            assert moved == ORDERS[no_order] - order.rest(self.now)

    @invariant()
    def a_number_is_carried_out_once_unless_again_is_asked_for(self):
        if getattr(self, "repeated", Repeated.AGAIN) is not Repeated.AGAIN:
            numbers = [record.no_refund for record in self.books.records]
            assert len(numbers) == len(set(numbers))

    @invariant()
    def states_only_move_forward(self):
        for record in self.books.records if hasattr(self, "books") else ():
            before, status = self.seen.get(record.oid_refundno, RefundStatus.INITIALIZED), record.status(self.now)
            assert status == before if before.is_final else status >= before
            self.seen[record.oid_refundno] = status


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=100, stateful_step_count=30)
