"""Leases: who is attached, and until when the store believes it.

A worker that stops sending heartbeats, for whatever reason, loses its lease and with it its pins. That is
safe even if it lives: a reader checks the generation of what it copied (see `common.arena`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.errors import NotFound


@dataclass
class Lease:
    """One attached worker; `expires` is on the table's clock, in seconds."""

    lease_id: int
    worker: str
    pid: int
    expires: float


class LeaseTable:
    """Owns the leases. `ended` is called with the id of each lease that expires or is given back."""

    def __init__(
        self, ttl: float, ended: Callable[[int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ttl = ttl
        self._ended, self._clock = ended, clock
        self._leases: dict[int, Lease] = {}

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def attach(self, worker: str, pid: int) -> Lease:
        # Random ids: a lease of a former store must never be taken for one of this store.
        lease = Lease(secrets.randbits(63) | 1, worker, pid, self._clock() + self.ttl)
        self._leases[lease.lease_id] = lease
        return lease

    def renew(self, lease_id: int) -> None:
        """Raises NotFound when the lease has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise NotFound(f"lease {lease_id:x} has expired; attach again")
        lease.expires = self._clock() + self.ttl

    def detach(self, lease_id: int) -> None:
        if self._leases.pop(lease_id, None):
            self._ended(lease_id)

    def expire(self) -> list[Lease]:
        """End the leases whose time is over; returns them."""
        now = self._clock()
        late = [lease for lease in self._leases.values() if lease.expires < now]
        for lease in late:
            self.detach(lease.lease_id)
        return late
