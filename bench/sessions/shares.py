"""How fairly service was shared, from what each app had got at a few moments. Pure.

Service is the engine's own account, in milliseconds. An app counts only while it is *backlogged*:
it has asked for more than it got.

* share: an app's part of the service of all, over the intervals in which all were backlogged.
* Jain's index of service by weight: (Σx)² / (n Σx²); 1 when all are equal, 1/n when one has all.
* windowed service difference (VTC, OSDI'24): in every window of a given length in which all were
  backlogged throughout, the most service by weight that any app got minus the least.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What apps had got and who was backlogged."""

    at_ms: float  # when
    service_ms: Mapping[str, float]  # by app, since the start
    backlogged: frozenset[str]  # apps that waited for service at that moment


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How fairly service was shared."""

    backlogged_ms: float  # time in which all apps were backlogged
    service_share: dict[str, float]  # by app, of that time's service
    weight_share: dict[str, float]  # by app
    jain: float | None  # of service by weight; None if nobody got any
    differences_ms: list[float]  # the service difference of each window

    @property
    def difference_ms_max(self) -> float | None:
        """None if no window was long enough."""
        return max(self.differences_ms, default=None)

    @property
    def difference_ms_mean(self) -> float | None:
        """Over windows."""
        return mean(self.differences_ms) if self.differences_ms else None


def shares_of(moments: Sequence[Moment], weights: Mapping[str, float], window_ms: float) -> Shares:
    """Shares of the apps that have weights, over the time in which all were backlogged."""
    total = dict.fromkeys(weights, 0.0)
    backlogged_ms = 0.0
    for before, after in itertools.pairwise(moments):
        if _all_backlogged((before, after), weights):
            backlogged_ms += after.at_ms - before.at_ms
            for app in weights:
                total[app] += _got(before, after, app)
    served = sum(total.values())
    return Shares(
        backlogged_ms=backlogged_ms,
        service_share={app: total[app] / served if served else 0.0 for app in weights},
        weight_share={app: weights[app] / sum(weights.values()) for app in weights},
        jain=jain([total[app] / weights[app] for app in weights]),
        differences_ms=_differences(moments, weights, window_ms),
    )


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index; None if all are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _differences(
    moments: Sequence[Moment], weights: Mapping[str, float], window_ms: float
) -> list[float]:
    """One for each moment at which a window begins."""
    differences = []
    end = 0
    for start, first in enumerate(moments):
        end = max(end, start)
        while end < len(moments) and moments[end].at_ms < first.at_ms + window_ms:
            end += 1
        if end == len(moments):
            break
        if _all_backlogged(moments[start : end + 1], weights):
            got = [_got(first, moments[end], app) / weight for app, weight in weights.items()]
            differences.append(max(got) - min(got))
    return differences


def _all_backlogged(moments: Sequence[Moment], apps: Mapping[str, float]) -> bool:
    return all(moment.backlogged.issuperset(apps) for moment in moments)


def _got(before: Moment, after: Moment, app: str) -> float:
    return after.service_ms.get(app, 0.0) - before.service_ms.get(app, 0.0)
