"""Numbers, durations and moments as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

UNKNOWN = "–"
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def short(value: float | None, digits: int = 4) -> str:
    """`value` with at most `digits` significant digits: 1.31B, 27.4K, 0.5, 3e-4."""
    if value is None or math.isnan(value):
        return UNKNOWN
    # Rounded first, so that 999,999 reads 1M and not 1000K.
    value = float(f"{value:.{digits}g}")
    size = abs(value)
    if 1e15 <= size < math.inf or 0 < size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, suffix in _SUFFIXES:
        if unit <= size < math.inf:
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def fixed(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """`value` with thousands separators and a fixed number of decimals."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:,.{decimals}f}{unit}"


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """A fraction as a percentage with one decimal; a true minus sign where it is signed."""
    if fraction is None:
        return UNKNOWN
    text = f"{100 * fraction:{'+' if signed else ''}.1f} %"
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """The two largest units of a duration: 3 d 4 h, 12 min 5 s, 0.412 s."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.3g} s"
    for unit, name, below, below_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        # Rounded to the smaller unit first, so that 59.9 minutes do not read 59 min 60 s.
        rounded = round(seconds / below) * below
        if rounded >= unit:
            rest = int(rounded % unit // below)
            return f"{rounded // unit:,} {name}" + (f" {rest} {below_name}" if rest else "")
    return UNKNOWN


def moment(unix_seconds: float | None) -> str:
    """A point in time, UTC."""
    if unix_seconds is None:
        return UNKNOWN
    try:
        return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return UNKNOWN
