"""Whose turn it is: what leases have asked for and not got yet, in fair order.

Leases take turns, one read each; what one lease asked for goes in the order it asked. So with n leases that
wait, the k-th oldest key of a lease is at most the (k * n)-th to be read from now on, however much the others
ask for. This file knows neither frames nor disks: `staging` decides what can be served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from common.expert_key import ExpertKey

OnStaged = Callable[[Exception | None], None]


class Turns:
    """Owns the keys that wait, and the callbacks of those who wait for them (none for a hint)."""

    def __init__(self, most: int | None = None) -> None:
        """A lease's oldest keys are forgotten when there are over `most`."""
        self._most = most
        self._waiting: OrderedDict[int, OrderedDict[ExpertKey, list[OnStaged]]] = OrderedDict()

    def __iter__(self) -> Iterator[int]:
        """The leases that wait; the one whose turn it is comes first."""
        return iter(list(self._waiting))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def keys(self, lease: int) -> list[ExpertKey]:
        """The oldest first."""
        return list(self._waiting.get(lease, ()))

    def add(self, lease: int, key: ExpertKey, *on_staged: OnStaged) -> None:
        keys = self._waiting.setdefault(lease, OrderedDict())
        keys.setdefault(key, []).extend(on_staged)
        if self._most is not None and len(keys) > self._most:
            keys.popitem(last=False)

    def withdraw(self, lease: int, key: ExpertKey, on_staged: OnStaged) -> None:
        """Forget one who waits; no effect if it does not."""
        waiting = self._waiting.get(lease, OrderedDict()).get(key, [])
        if on_staged in waiting:
            waiting.remove(on_staged)
            if not waiting:
                self.take(lease, key)

    def take(self, lease: int, key: ExpertKey) -> list[OnStaged]:
        """Remove a key; returns who waited for it."""
        keys = self._waiting.get(lease, OrderedDict())
        waiting = keys.pop(key, [])
        if not keys:
            self._waiting.pop(lease, None)
        return waiting

    def take_all(self, lease: int) -> list[OnStaged]:
        """Remove a lease; returns who waited."""
        keys = self._waiting.pop(lease, OrderedDict())
        return [on_staged for waiting in keys.values() for on_staged in waiting]

    def end_turn(self, lease: int) -> None:
        """It was served: all others that wait come before it."""
        if lease in self._waiting:
            self._waiting.move_to_end(lease)

    def clear(self) -> None:
        self._waiting.clear()
