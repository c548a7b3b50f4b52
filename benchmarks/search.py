"""The largest size that fits: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Callable


def largest_that_fits(fits: Callable[[int], bool], *, start: int, most: int, precision: float) -> int:
    """Return a size that fits and is less than `precision` of itself, or 1, below one that does not.

    Args:
        fits: whether a size fits. What is larger than a size that does not fit is never tried.
        start: the first size that is tried, at least 1.
        most: the largest size that is tried.
        precision: relative.

    Returns:
        0 if not even 1 fits; `most` if that fits.
    """
    low, high = 0, None
    size = min(start, most)
    while high is None:
        if not fits(size):
            high = size
        elif size == most:
            return most
        else:
            low, size = size, min(2 * size, most)
    while high - low > max(1, int(low * precision)):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
