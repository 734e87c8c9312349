"""The soak in short: clients of every kind at once, and nothing lost, wrong or left over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.soak.clients import WAYS
from tests.soak.ledger import FINISHED
from tests.soak.pair import soak_pair
from tests.soak.soak import Plan, soak


@pytest.mark.timeout(900)  # any one of the clients may wait for minutes, if the machine is busy
def test_clients_of_every_kind(tmp_path: Path) -> None:
    with soak_pair(tmp_path / "run") as (worker, store, gateway):
        plan = Plan(
            worker, store, gateway, clients=16, gateway_clients=3, seconds=12, questions=12, growth=None
        )
        outcome = asyncio.run(soak(plan))
    assert outcome.faults == []
    assert outcome.ledger.endings[FINISHED] > 5  # hundreds, unless the machine is busy
    assert len(outcome.ledger.asked.keys() & WAYS.keys()) >= 5
