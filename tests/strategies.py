"""What Hypothesis draws in more than one module of tests."""

from datetime import datetime, timedelta, timezone

from hypothesis import strategies as st

texts = st.text(st.characters(exclude_categories=["Cs"]))
"""Everything that UTF-8 can carry."""

zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))) | st.timezones()

moments = st.datetimes(
    datetime.fromisoformat("1000-01-03"), datetime.fromisoformat("9999-12-29 23:59:59.999999"), timezones=zones
)
"""Aware datetimes in any zone whose year has four digits in China too."""
