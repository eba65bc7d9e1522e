"""Numbers as a reader takes them in: counts, sizes, operations, durations. Imports nothing."""

COUNTS = (("B", 1e9), ("M", 1e6), ("k", 1e3))
SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
OPERATIONS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
DURATIONS = (("years", 365.25 * 86400.0), ("d", 86400.0), ("h", 3600.0), ("min", 60.0))


def count(number: float) -> str:
    """1234567 as 1.23 M."""
    return _scaled(number, COUNTS) or f"{number:.0f}"


def precise(number: int) -> str:
    """3384207360 as 3.384 B."""
    return _scaled(number, COUNTS, digits=4) or str(number)


def size(number: float) -> str:
    """13500000000 bytes as 13.5 GB."""
    return _scaled(number, SIZES) or f"{number:.0f} B"


def operations(number: float) -> str:
    """1.2e15 as 1.2 PFLOP; none as a dash."""
    return (_scaled(number, OPERATIONS) or f"{number / 1e6:.3g} MFLOP") if number else "–"


def duration(seconds: float) -> str:
    """5400 seconds as 1.5 h: how long something takes, to three digits."""
    return _scaled(seconds, DURATIONS) or f"{seconds:.2g} s"


def clock(seconds: float) -> str:
    """8.21 seconds as 8.2 s, 303 as 5:03, 3847 as 1:04:07: a time that was measured, or that is left."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scaled(number: float, units: tuple[tuple[str, float], ...], digits: int = 3) -> str | None:
    """In the largest unit that it fills once it is rounded; none where it fills no unit."""
    rounded = float(f"{number:.{digits}g}")
    for unit, scale in units:
        if rounded >= scale:
            value = rounded / scale
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.{digits}g} {unit}"
    return None
