"""Hypothesis strategies that several test modules share."""

from datetime import datetime, timedelta, timezone

from hypothesis import strategies as st

texts = st.text(st.characters(exclude_categories=["Cs"]))
"""All text that UTF-8 can encode."""

zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes))) | st.timezones()

moments = st.datetimes(
    datetime.fromisoformat("1000-01-03"), datetime.fromisoformat("9999-12-29 23:59:59.999999"), timezones=zones
)
"""Aware datetimes in any zone whose year has four digits in China too."""

invisible = {
    chr(code)
    for first, last in (
        (0xAD, 0xAD),
        (0x34F, 0x34F),
        (0x61C, 0x61C),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x200B, 0x200F),
        (0x202A, 0x202E),
        (0x2060, 0x206F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFEFF, 0xFEFF),
        (0xFFA0, 0xFFA0),
        (0xFFF0, 0xFFF8),
        (0x1BCA0, 0x1BCA3),
        (0x1D173, 0x1D17A),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
}
"""Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt."""
