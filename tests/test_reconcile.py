"""Statements against the entries of a journal: every verdict, every layout, and every kind of damage."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lianlian_async import RefundRequest
from lianlian_async.clock import Moment
from lianlian_async.journal import Ending, Entry, MemoryJournal, State
from lianlian_async.reconcile import Reconciliation, StatementError, Verdict
from lianlian_async.sandbox import SandboxGateway
from tests.support.parties import refund_request

PARTNER = "201103171000000000"
DAY, NEXT = f"JYMX_{PARTNER}_20261101.txt", f"JYMX_{PARTNER}_20261102.txt"
HEADER = (
    "no_order|oid_partner|dt_order|busi_partner|oid_paybill|settle_date|currency_order|money_order|currenty_pay|"
    "money_pay|currency_settle|money_settle|exchange_rate|transaction_status|dt_update|transaction_fee|pay_product|"
    "pay_type|info_order"
)


def row(number="R-1", **changes):
    """A refund of 88.50 yuan in a domestic statement."""
    cells = {
        "number": number,
        "partner": PARTNER,
        "time": "20261101 10:20:30",
        "busi_partner": "101001",
        "order": "O-1",
        "settle_date": "20261101",
        "amount": "-88.5",
        "direction": "1",
        "status": "5",
        "dt_update": "20261101 10:21:00",
        "rest": "0,WEB支付网关,储蓄卡快捷支付,two, words",
    }
    return ",".join((cells | changes).values()) + "\n"


MOMENT = Moment(datetime(2026, 11, 1, tzinfo=UTC), 7.5, "this boot")
MONTH = f"JYMX_{PARTNER}_202611.txt"


def entry(number="R-1", state=State.DONE, *, time="20261101102030", money="88.50", **record):
    """What a journal holds of a refund of 88.50 yuan that was successful on the first of November."""
    fields = {"no_refund": number, "dt_refund": time, "money_refund": money, "no_order": "O-1"}
    record = {"oid_partner": PARTNER, "sta_refund": "2", "settle_date": "20261101"} | record
    return Entry(
        no_refund=number,
        fields=fields,
        body=b"",
        sent_at=None,
        ending=None if state is State.UNRESOLVED else Ending(state=state, record=record),
    )


def compare(*entries, **statements):
    """Compare entries with the statements, lines by file name; by default with one row for R-1 on the first."""
    found = Reconciliation()
    for name, lines in (statements or {DAY: [row()]}).items():
        found.add_statement(name, lines)
    for one in entries:
        found.compare(one)
    found.finish()
    return found


def all_agree(found):
    """Whether nothing is listed."""
    return not found.unreadable and not any(found.numbers.values())


def outcome(found):
    """Return the results that are not empty: numbers, and counts of refunds that agree or are outside of the period."""
    counted = {str(verdict): count for verdict, count in found.counts.items() if verdict not in found.numbers}
    return counted | {str(verdict): numbers for verdict, numbers in found.numbers.items() if numbers}


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", [State.ACCEPTED, State.FINAL, State.DONE])
@pytest.mark.parametrize("amount", ["-88.5", "-88.50", "-88.500"])
def test_a_refund_that_was_made_agrees_by_the_value_of_its_amount(state, amount):
    found = compare(entry(state=state), **{DAY: [row(amount=amount)]})
    assert outcome(found) == {"agrees": 1}
    assert found.yuan[Verdict.AGREES] == Decimal("88.50")
    assert all_agree(found)


def test_another_amount_is_a_difference():
    found = compare(entry(money="88.49"))
    assert outcome(found) == {"amount_differs": ["R-1"]}
    assert not all_agree(found)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry("R-2", state=State.UNRESOLVED)],
        [entry(state=State.REJECTED)],
        [entry(state=State.CONFLICT)],
        [entry(sta_refund="3")],
    ],
    ids=["empty", "other", "rejected", "conflict", "failed"],
)
def test_a_refund_that_the_journal_has_not_as_made_was_made_beside_it(entries):
    assert outcome(compare(*entries)) == {"not_in_journal": ["R-1"]}


@pytest.mark.parametrize("changes", [{"partner": "201103171000000001"}, {"time": "20261101 10:20:31"}])
def test_another_merchants_refund_and_one_of_another_time_are_other_refunds(changes):
    """The journal's own refund is then looked for as well: it is outside of the period as the next day is not given."""
    assert outcome(compare(entry(), **{DAY: [row(**changes)]})) == {"not_in_journal": ["R-1"], "outside_period": 1}


def test_a_refund_may_be_in_the_statements_once():
    found = compare(entry(), **{DAY: [row(), row("R-2")], NEXT: [row(), row("R-2", amount="-1")]})
    assert outcome(found) == {"twice_in_statement": ["R-1", "R-2"]}
    assert found.yuan[Verdict.TWICE_IN_STATEMENT] == Decimal("266.50")


def test_what_is_unknown_is_proved_by_a_statement():
    found = compare(entry(state=State.UNRESOLVED))
    assert outcome(found) == {"unknown_proved": ["R-1"]}
    assert found.records("R-1") == [
        {
            "no_refund": "R-1",
            "oid_partner": PARTNER,
            "dt_refund": "20261101102030",
            "money_refund": "88.5",
            "sta_refund": "2",
            "evidence": f"{DAY}, line 1",
        }
    ]


@pytest.mark.parametrize(
    ("names", "settle_date", "verdict"),
    [
        ([DAY, NEXT], "20261101", "missing_in_statement"),
        ([DAY, NEXT], "", "missing_in_statement"),
        ([DAY, NEXT], "2026-11-01", "missing_in_statement"),
        ([DAY, NEXT], "20261102", "outside_period"),
        ([DAY], "20261101", "outside_period"),
        ([NEXT], "20261101", "outside_period"),
        ([MONTH], "20261129", "missing_in_statement"),
        ([MONTH], "20261130", "outside_period"),
        ([MONTH, f"JYMX_{PARTNER}_20261201.txt"], "20261130", "missing_in_statement"),
    ],
)
def test_a_refund_is_missing_only_if_its_day_and_the_next_are_covered(names, settle_date, verdict):
    """Its day is the ``settle_date``, after which the files are called, or else the day of ``dt_refund``."""
    found = compare(entry(settle_date=settle_date), **{name: [] for name in names})
    assert found.counts == {verdict: 1}
    assert found.yuan[verdict] == Decimal("88.50")
    assert all_agree(found) is (verdict == "outside_period")


@pytest.mark.parametrize(
    "one",
    [entry(state=State.UNRESOLVED), entry(state=State.REJECTED), entry(sta_refund="3")],
)
def test_what_need_not_be_in_a_statement_is_not_missing(one):
    assert outcome(compare(one, **{DAY: [], NEXT: []})) == {}


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header", ["", "商户订单号,商户号,商户订单时间,商户业务编号,连连订单号,账务日期,金额,标志,状态,更新,a,b,c,d\n"]
)
@pytest.mark.parametrize("more", ["", ",bank,account,payee"])
def test_a_header_further_columns_payments_and_blank_lines_change_nothing(header, more):
    payment = row("O-1", amount="88.5", direction="0", status="0")
    lines = ["\n", header, payment, row().rstrip("\n") + more, "\n"]
    assert outcome(compare(entry(), **{DAY: filter(None, lines)})) == {"agrees": 1}


def test_number_cells_may_be_marked_as_text_for_excel():
    lines = [row('="R-1"', partner=f'="{PARTNER}"', amount='="-88.50"', time=' ="20261101 10:20:30" ')]
    assert outcome(compare(entry(), **{DAY: lines})) == {"agrees": 1}


def crossborder(**changes):
    """A header, and the row of a refund of 88.50 yuan."""
    header = HEADER.replace("no_order", "no_refund")
    cells = dict(zip(header.split("|"), row().replace(",", "|").split("|") + 19 * [""], strict=False))
    cells |= {"currency_order": "CNY", "money_order": "-88.50", "transaction_status": "5", "money_refund": "-88.50"}
    cells |= changes
    return [" | ".join(header.split("|")) + "\n", " | ".join(cells[name] for name in header.split("|")) + "\n"]


def test_a_cross_border_statement_is_read_by_the_names_of_its_header():
    assert outcome(compare(entry(), **{DAY: crossborder()})) == {"agrees": 1}
    other = "dt_refund|no_refund|money_refund|oid_partner|payment_status"
    lines = [f"{other}\n", f"20261101102030|R-1|-88.5|{PARTNER}|5\n", f"|||{PARTNER}|0\n"]
    assert outcome(compare(entry(), **{DAY: lines})) == {"agrees": 1}


def test_another_currency_and_another_number_of_columns_cannot_be_read():
    found = compare(**{DAY: [*crossborder(currency_order="USD"), *crossborder(info_order="a|b")[1:]]})
    assert found.unreadable == [
        (2, f"{DAY}, line 2: column 7 (currency): 'USD' is not CNY"),
        (3, f"{DAY}, line 3: the row has 20 columns, but needs 19"),
    ]


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        (HEADER, "no_refund"),
        (HEADER.replace("no_order", "no_refund").replace("currency_order|", ""), "currency_order or money_refund"),
        ("hello", "transaction_status or payment_status"),
    ],
)
def test_a_file_in_which_a_column_cannot_be_found_is_no_statement(header, missing):
    with pytest.raises(
        StatementError, match=f"^{DAY}, line 1: is neither a row of 14 columns nor a header with {missing}$"
    ):
        compare(**{DAY: [header]})


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"number": ""}, r"column 1 \(no_refund\): '' is not 1 to 32 characters"),
        ({"number": "R-1,2"}, r"column 9 \(status\): '1' is not 0 or 5"),
        ({"order": "O,1"}, r"column 9 \(status\): '1' is not 0 or 5"),
        ({"order": "O,1", "direction": "0"}, r"column 8 \(direction\): '-88.5' is not 0 or 1"),
        ({"partner": "2.01103E+17"}, r"column 2 \(oid_partner\): '2.01103E\+17' is not 1 to 18 letters or digits"),
        ({"time": "2026-11-01"}, r"column 3 \(dt_refund\): '2026-11-01' is not a time such as 20261101 10:20:30"),
        ({"amount": "88.5"}, r"column 7 \(money_refund\): '88.5' is not a negative amount such as -88.5"),
        ({"amount": "-1e3"}, r"column 7 \(money_refund\): '-1e3' is not a negative amount such as -88.5"),
        ({"status": "3"}, r"column 9 \(status\): '3' is not 0 or 5"),
        ({"rest": "0"}, "the row has 11 columns, but needs 14"),
    ],
)
def test_a_row_that_has_not_the_documented_form_is_reported_with_line_and_column(changes, reason):
    found = compare(entry(), **{DAY: [row(), row(**{"number": "R-2"} | changes)]})
    [(line, text)] = found.unreadable
    assert line == 2
    assert text.startswith(f"{DAY}, line 2: ")
    assert re.search(reason + "$", text)
    assert outcome(found) == {"agrees": 1}
    assert not all_agree(found)


@given(st.integers(0, len(row().partition(",5,")[0])), st.booleans())
def test_a_comma_too_many_or_too_few_never_makes_another_refund(place, is_added):
    """Left of the status, where the columns that are used are."""
    line = row()
    damaged = f"{line[:place]},{line[place:]}" if is_added else line[:place].replace(",", ";", 1) + line[place:]
    found = compare(entry(), **{DAY: [row(), damaged]})
    assert [number for number, _ in found.unreadable] == ([] if damaged == line else [2])
    assert found.counts.keys() == ({"twice_in_statement"} if damaged == line else {"agrees"})


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_whatever_the_lines_hold_each_is_read_skipped_or_reported(lines):
    found = compare(entry(), **{DAY: [row(), *lines]})
    assert {number for number, _ in found.unreadable} <= set(range(2, len(lines) + 2))
    assert outcome(found) == {"agrees": 1}


@pytest.mark.parametrize(
    "name",
    ["statement.csv", f"JYMX_{PARTNER}_2026.txt", f"JYMX_{PARTNER}_2026110.txt", f"JYMXSUM_{PARTNER}_20261101.txt"],
)
def test_merchant_and_period_come_from_the_file_name(name):
    with pytest.raises(StatementError, match=f"^{name}: must be called JYMX_<oid_partner>_<YYYYMMDD or YYYYMM>.txt$"):
        compare(**{name: [row()]})


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (MONTH, f"{MONTH}: another statement covers the same day"),
        ("JYMX_M2_20261102.txt", f"JYMX_M2_20261102.txt: the other statements belong to merchant {PARTNER}"),
    ],
)
def test_statements_that_do_not_go_together_are_refused(other, reason):
    with pytest.raises(StatementError, match=f"^{reason}$"):
        compare(**{DAY: [row()], other: []})


@pytest.mark.parametrize("summary", ["9|7|551.23|2|-89.00|0|\n", "2|0||2|-89||"])
def test_the_check_sum_may_confirm_a_statement(summary):
    found = Reconciliation()
    found.add_statement(NEXT, [row("R-0")], "1|0||1|-88.5|0|")
    found.add_statement(DAY, [row(), row("R-2", amount="-.5".replace(".", "0."))], summary)
    found.add_statement(f"JYMX_{PARTNER}_20261103.txt", [], "8|8|551.23|0||0|")
    assert not found.unreadable


@pytest.mark.parametrize(
    "summary", ["1|0||2|-88.50|0|", "1|0||1|-88.51|0|", "1|0||1|-88.50|0", "1|0||one|-88.50|0|", ""]
)
def test_a_statement_that_its_check_sum_contradicts_is_refused(summary):
    found = Reconciliation()
    with pytest.raises(StatementError, match=r"1 refunds sum to -88.5 yuan, but JYMXSUM says '(1\|0|')"):
        found.add_statement(DAY, [row()], summary)


def test_where_a_line_cannot_be_read_the_check_sum_says_nothing_more():
    found = Reconciliation()
    found.add_statement(DAY, [row(), row(status="9")], "2|0||2|-177|0|")
    assert [line for line, _ in found.unreadable] == [2]


# ── the sandbox's books ──────────────────────────────────────────────────────────────────────────

numbers = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters=',"='), min_size=1, max_size=32
)
requests = st.builds(
    RefundRequest,
    no_refund=numbers | st.from_regex(r"退款[0-9]{1,20}", fullmatch=True),
    dt_refund=st.datetimes(datetime.fromisoformat("2026-01-01"), timezones=st.just(UTC)),
    money_refund=st.decimals("0.01", "100000000", places=2),
    no_order=numbers,
    notify_url=st.just("https://merchant.invalid/lianlian"),
)


@settings(max_examples=20)
@given(st.lists(requests, max_size=5, unique_by=lambda request: request.no_refund))
def test_whatever_the_sandbox_has_made_agrees_with_its_statement(asked):
    """Rejected refunds are in the journal only, made refunds in both."""
    gateway = SandboxGateway(default_order=Decimal("100000000.00"), settle_after=0)
    found = Reconciliation()

    async def refund():
        journal = MemoryJournal()
        async with gateway.session(journal=journal) as session:
            for request in asked:
                await session.outcome_of(request)
        found.add_statement(DAY, gateway.statement().splitlines(keepends=True))
        async for one in journal.entries():
            found.compare(one)

    anyio.run(refund)
    found.finish()
    assert found.counts == Counter({"agrees": len(gateway.refunds)})
    assert all_agree(found)
    assert found.yuan[Verdict.AGREES] == sum(record.money_refund for record in gateway.refunds)


def test_the_sandbox_states_only_what_has_succeeded():
    gateway = SandboxGateway(default_order=Decimal("10.00"), settle_after=60)

    async def refund():
        async with gateway.session() as session:
            for number in (1, 2):
                await session.apply_refund(refund_request(number))

    anyio.run(refund)
    gateway.fail("R-1")
    assert gateway.statement() == ""
    gateway.advance(60)
    [line] = gateway.statement().splitlines()
    assert line.startswith(f"R-2,{PARTNER},20260105 16:00:00,101001,O-2,")
    assert ",-10,1,5," in line
