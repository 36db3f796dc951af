"""Is the best trial better, or was it lucky? It and the config's own setting are run again on seeds of their own."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences and Student's interval for it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Confirmation:
    """The best setting against the config's own, seed by seed.

    Args:
        seeds: that neither setting was chosen by.
        best: objective of the best setting by seed; None where its run failed.
        own: objective of the config's own setting.
        problems: why runs failed.
    """

    seeds: tuple[int, ...]
    best: tuple[float | None, ...]
    own: tuple[float | None, ...]
    problems: tuple[str, ...] = ()

    @property
    def differences(self) -> list[float]:
        """Best minus own, of the seeds on which both were scored."""
        pairs = zip(self.best, self.own, strict=True)
        return [one - two for one, two in pairs if one is not None and two is not None]

    @property
    def interval(self) -> Interval | None:
        """Of the mean difference; None with fewer than two pairs."""
        return paired_interval(self.differences)

    @property
    def holds(self) -> bool:
        """Whether the whole interval is above 0: a single seed proves nothing."""
        interval = self.interval
        return interval is not None and interval.low > 0

    def to_json(self) -> dict[str, Any]:
        """As `search.json` keeps it."""
        interval = self.interval
        return {
            "seeds": self.seeds,
            "best": self.best,
            "own": self.own,
            "problems": self.problems,
            "difference": None if interval is None else [interval.mean, interval.low, interval.high],
            "holds": self.holds,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Confirmation:
        """What `to_json` made."""
        return cls(*(tuple(found[key]) for key in ("seeds", "best", "own", "problems")))


def paired_interval(differences: list[float], level: float = LEVEL) -> Interval | None:
    """Student's t interval of a mean of n differences, with n - 1 degrees of freedom; None for n < 2."""
    if len(differences) < 2:
        return None
    from scipy.stats import t

    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(differences) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Spearman's rho of two scores of the same trials; None for fewer than three or where one is constant."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
