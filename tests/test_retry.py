"""Pauses, budgets and deadlines: pure values; the tests choose time and randomness."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lianlian_async.errors import ConfigurationError
from lianlian_async.retry import LONGEST_ATTEMPT, Deadline, RetryBudget, RetryPolicy, TokenBucket

seconds = st.floats(0.001, 1e6)
chances = st.floats(0, 1, exclude_max=True)
policies = st.builds(
    lambda initial, longer, multiplier: RetryPolicy(initial=initial, maximum=initial + longer, multiplier=multiplier),
    seconds,
    st.floats(0, 1e6),
    st.floats(1, 1000),
)


# ── pauses ───────────────────────────────────────────────────────────────────────────────────────


@given(policies, st.integers(0, 10_000), chances)
def test_a_pause_is_within_its_bounds(policy, retries, random):
    """After any number of retries, a pause is between 0 and the maximum."""
    assert 0 <= policy.pause(retries, random) <= policy.maximum


@given(policies, st.integers(0, 100), chances)
def test_the_ceiling_grows_and_never_falls(policy, retries, random):
    """With the same random number, a later pause is not shorter than an earlier one."""
    assert policy.pause(retries + 1, random) >= policy.pause(retries, random)


def test_pauses_are_a_share_of_the_ceiling():
    """By default the ceilings are 0.5, 1, 2, 4 and then 8 seconds."""
    policy = RetryPolicy()
    assert [policy.pause(retries, 0.5) for retries in range(7)] == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert policy.pause(3, 0.0) == 0.0
    assert policy.pause(3, 0.25) == 1.0


@given(policies, st.integers(0, 100), chances, st.floats(0, 1e9))
def test_retry_after_is_honoured_up_to_a_minute(policy, retries, random, retry_after):
    """A pause is at least as long as Retry-After, or a minute."""
    pause = policy.pause(retries, random, retry_after)
    assert min(retry_after, 60.0) <= pause <= max(policy.maximum, 60.0)


def test_unusable_retry_after_is_ignored():
    """A Retry-After that is negative, NaN or missing changes nothing."""
    policy = RetryPolicy()
    for retry_after in (None, 0.0, -5.0, math.nan):
        assert policy.pause(1, 0.5, retry_after) == policy.pause(1, 0.5)
    assert policy.pause(1, 0.5, math.inf) == 60.0


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"attempts": 0}, "attempts: must be an integer of at least 1, is 0"),
        ({"attempts": 1.5}, "attempts"),
        ({"attempts": True}, "attempts"),
        ({"attempts": 2.0}, "attempts"),
        ({"initial": 0}, "initial: must be a number of seconds greater than 0"),
        ({"initial": -1}, "initial"),
        ({"initial": math.nan}, "initial"),
        ({"initial": "0.5"}, "initial: .*, is '0.5'"),
        ({"initial": 10**400, "maximum": 10**401}, "initial: .*, is 1000"),
        ({"initial": math.inf, "maximum": math.inf}, "initial"),
        ({"budget": 5}, "budget: must be of type RetryBudget, not int"),
        ({"maximum": None}, "maximum"),
        ({"maximum": 0.4}, "maximum: must be a number of seconds of at least 0.5"),
        ({"maximum": math.inf}, "maximum"),
        ({"maximum": math.nan}, "maximum"),
        ({"multiplier": 0.5}, "multiplier: must be from 1 to 1000, is 0.5"),
        ({"multiplier": 1000.5}, "multiplier"),
        ({"multiplier": 1e10}, "multiplier"),
        ({"multiplier": math.nan}, "multiplier"),
        ({"not_found_grace": -1}, "not_found_grace: must be a number of seconds of at least 0"),
        ({"not_found_grace": math.nan}, "not_found_grace"),
        ({"not_found_grace": math.inf}, "not_found_grace: .* at most 1000000000, is inf"),
        ({"not_found_grace": 1e12}, "not_found_grace"),
    ],
)
def test_unusable_policy_is_refused(settings, rule):
    """A policy with an unusable value is refused when it is made; the message names the setting."""
    with pytest.raises(ConfigurationError, match=f"RetryPolicy: {rule}"):
        RetryPolicy(**settings)


def test_the_edges_of_the_rules_are_allowed():
    """One attempt, an even pause and no grace are accepted."""
    policy = RetryPolicy(attempts=1, initial=2, maximum=2, multiplier=1, not_found_grace=0, budget=RetryBudget())
    assert policy.pause(5, 0.5) == 1.0
    assert RetryPolicy(multiplier=1000).pause(10_000, 0.5) == 4.0
    assert RetryPolicy(initial=1, maximum=1e9).pause(10_000, 0.5) == 5e8  # the exponent is at most 64
    assert taken(TokenBucket(RetryBudget(capacity=1, per_second=0)), 0.0) == 1


def test_the_defaults_are_the_documented_ones():
    """Four sends, 15 minutes of grace, bursts of 500 retries and 50 a second."""
    policy = RetryPolicy()
    assert (policy.attempts, policy.not_found_grace) == (4, 900.0)
    assert (policy.budget.capacity, policy.budget.per_second) == (500.0, 50.0)


def test_policies_are_values():
    """Equal settings are equal policies, and a policy cannot be changed."""
    assert RetryPolicy(attempts=2) == RetryPolicy(attempts=2) != RetryPolicy()
    assert hash(RetryPolicy(attempts=2)) == hash(RetryPolicy(attempts=2))
    with pytest.raises(AttributeError):
        RetryPolicy().attempts = 5


# ── budgets ──────────────────────────────────────────────────────────────────────────────────────


def taken(retries_left, now, tries=10_000):
    """How many retries in a row the retries_left gives at one moment."""
    return next(count for count in range(tries) if not retries_left.take(now))


def test_a_full_budget_allows_one_burst():
    """A new budget allows exactly its capacity, whatever the clock shows."""
    for now in (-5.0, 0.0, 1e9):
        assert taken(TokenBucket(RetryBudget(capacity=7, per_second=1)), now) == 7


def test_a_budget_refills_with_time():
    """It refills per second, never above its capacity."""
    retries_left = TokenBucket(RetryBudget(capacity=10, per_second=2))
    assert taken(retries_left, 100.0) == 10
    assert taken(retries_left, 100.0) == 0
    assert taken(retries_left, 103.0) == 6
    assert taken(retries_left, 103.25) == 0
    assert taken(retries_left, 103.5) == 1
    assert taken(retries_left, 1e9) == 10


def test_a_budget_that_does_not_refill_ends():
    """With nothing per second, only the capacity can be spent."""
    retries_left = TokenBucket(RetryBudget(capacity=3, per_second=0))
    assert taken(retries_left, 0.0) == 3
    assert taken(retries_left, 1e9) == 0


def test_sessions_do_not_share_a_budget():
    """Each session spends its own bucket, although both have the same budget."""
    budget = RetryBudget(capacity=1, per_second=0)
    first, second = TokenBucket(budget), TokenBucket(budget)
    assert first.take(0.0)
    assert second.take(0.0)
    assert not first.take(0.0)


@given(
    st.integers(1, 20),
    st.floats(0, 20),
    st.lists(st.floats(0, 5), max_size=200),
)
def test_budget_is_never_exceeded(capacity, per_second, pauses):
    """Over any time, retries are at most the capacity and the refill."""
    retries_left = TokenBucket(RetryBudget(capacity=capacity, per_second=per_second))
    now, given_out = 0.0, 0
    for pause in pauses:
        now += pause
        given_out += retries_left.take(now)
    assert given_out <= capacity + per_second * now + 1e-6
    assert given_out >= min(len(pauses), capacity)


@pytest.mark.parametrize(
    "settings",
    [
        *({"capacity": 0}, {"capacity": math.nan}, {"capacity": True}, {"capacity": 10**400}),
        *({"per_second": -1}, {"per_second": "5"}, {"per_second": 10**400}),
    ],
)
def test_unusable_budget_is_refused(settings):
    """A budget without a single retry, or with a negative refill, is refused."""
    with pytest.raises(ConfigurationError, match=r"^RetryBudget: capacity must be at least 1, per_second at least 0$"):
        RetryBudget(**settings)


# ── deadlines ────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(0, 1e9), st.floats(-1e6, 1e6))
def test_attempt_leaves_time_for_a_query(now, left):
    """An attempt gets at most half of the time left and at most 10 s, and nothing if too little is left."""
    deadline = Deadline(now + left)
    share = deadline.attempt(now)
    assert 0.0 <= share <= LONGEST_ATTEMPT == 10.0
    assert share == 0.0 or share <= deadline.left(now) / 2
    assert share == 0.0 or share >= 0.01


@pytest.mark.parametrize(
    ("left", "share"), [(30.0, 10.0), (20.0, 10.0), (10.0, 5.0), (0.02, 0.01), (0.019, 0.0), (0.0, 0.0), (-1.0, 0.0)]
)
def test_the_share_of_an_attempt(left, share):
    """Half of the time left, at most 10 s; nothing below a hundredth of a second."""
    assert Deadline(left).attempt(0.0) == share


@given(st.floats(1, 1e6), st.integers(1, 200))
def test_attempts_that_each_use_their_share_never_reach_the_deadline(left, attempts):
    """Attempts that use all their time, one after the other, end before the deadline."""
    deadline, now = Deadline(left), 0.0
    for _ in range(attempts):
        now += deadline.attempt(now)
    assert now < left


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_paused_deadline(at, waited):
    """A pause leaves the same time, during the pause and after it."""
    deadline = Deadline(float(at))
    deadline.pause(0.0)
    assert deadline.left(float(waited)) == at
    for _ in range(2):  # the second call does nothing
        deadline.resume(float(waited))
        assert deadline.left(float(waited)) == at
