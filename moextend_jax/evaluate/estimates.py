"""Means over seeds with their 95 % intervals (Student's t): numbers in, an `Estimate` out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95 % interval; None of a single seed."""

    mean: float
    half: float | None

    def text(self, digits: int, *, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''},.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:,.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(values[0], None)
    from scipy.stats import t  # half a second to import

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(fmean(values), half)
