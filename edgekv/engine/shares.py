"""How many of something each app has, within a limit for all of them together."""

from collections import Counter

from edgekv.errors import CapacityError


class Shares:
    """What apps have of something limited. Guarded by its owner's lock.

    An app that has more than are left for all gets no more: alone it can have half, and whoever
    comes next still finds room, however many came before. A limit of its own, which a user gave it,
    counts instead.
    """

    def __init__(
        self, num_max: int, *, error: type[CapacityError], what: str, limit: str, remedy: str
    ) -> None:
        """`what` they have, by the name of which `limit`, and how somebody gets room again."""
        self._num_max = num_max
        self._error = error
        self._what = what
        self._limit = limit
        self._remedy = remedy
        self._total = 0
        self._by_app: Counter[str] = Counter()

    def take(self, app: str, own_max: int | None = None) -> None:
        """Count one more of an app's.

        Raises:
            CapacityError: One of the type given; the app has, or all have, what they may.
        """
        self._refuse_all()
        count, left = self._by_app[app], self._num_max - self._total
        if own_max is not None and count >= own_max:
            self._refuse(app, f"as many as its {self._limit} allows")
        if own_max is None and count > left:
            self._refuse(app, f"and {left} are left for all apps, of {self._num_max}")
        self._total += 1
        self._by_app[app] += 1

    def give_back(self, app: str) -> None:
        """Count one less."""
        assert self._by_app[app] > 0
        self._total -= 1
        self._by_app[app] -= 1
        if not self._by_app[app]:
            del self._by_app[app]

    def _refuse_all(self) -> None:
        if self._total >= self._num_max:
            raise self._error(
                f"{self._total} {self._what}", hint=f"{self._remedy}, or raise {self._limit}"
            )

    def _refuse(self, app: str, why: str) -> None:
        count = self._by_app[app]
        hint = f"{self._remedy}, or give the app more: app({app!r}, {self._limit}=...)"
        if app.startswith("\0"):  # no user's
            app, hint = app[1:], self._remedy
        raise self._error(f"app {app!r}: {count} {self._what}, {why}", hint=hint)
