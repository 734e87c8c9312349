"""Leases end when heartbeats stop, by the table's clock."""

import pytest

from common.errors import NotFound
from expert_store.leases import LeaseTable


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_lives_as_long_as_it_is_renewed() -> None:
    clock, ended = Clock(), []
    table = LeaseTable(3.0, ended.append, clock)
    lease = table.attach("worker", 1)
    for _ in range(5):
        clock.now += 2.5
        assert table.expire() == []
        table.renew(lease.lease_id)
    clock.now += 3.5
    assert [late.lease_id for late in table.expire()] == [lease.lease_id]
    assert ended == [lease.lease_id]
    with pytest.raises(NotFound, match="attach again"):
        table.renew(lease.lease_id)


def test_detaching_ends_a_lease_once() -> None:
    ended: list[int] = []
    table = LeaseTable(3.0, ended.append)
    lease = table.attach("worker", 1)
    table.detach(lease.lease_id)
    table.detach(lease.lease_id)
    assert ended == [lease.lease_id]
    assert lease.lease_id not in table
    assert list(table) == []


def test_ids_do_not_repeat_between_stores() -> None:
    ids = {LeaseTable(1.0, print).attach("worker", 1).lease_id for _ in range(100)}
    assert len(ids) == 100
