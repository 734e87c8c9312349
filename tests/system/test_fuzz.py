"""The fuzz in short, at the doors of processes; `scripts/fuzz` has a hundred times as many cases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.fuzz import frames, http, rpc
from tests.fuzz.processes import check_alive, front_and_pair
from tests.fuzz.tally import Tally
from tests.system.processes import Pair


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pair, str]]:
    with front_and_pair(tmp_path_factory.mktemp("run")) as processes:
        yield processes
        assert check_alive(processes[0]) == []


def test_frames(processes: tuple[Pair, str]) -> None:
    tally = Tally("frames", 1)
    frames.run(tally, range(500), processes[0].store_address)
    assert tally.faults == []
    assert {"Staged", "Done", "MALFORMED", "NO_LEASE"} <= tally.outcomes.keys()


def test_rpc(processes: tuple[Pair, str]) -> None:
    tally, pair = Tally("rpc", 1), processes[0]
    asyncio.run(rpc.run(tally, range(300), pair.worker_address, pair.store_address))
    assert tally.faults == []
    assert {"Generate OK", "Generate INVALID_ARGUMENT", "Attach INVALID_ARGUMENT"} <= tally.outcomes.keys()


def test_http(processes: tuple[Pair, str]) -> None:
    tally = Tally("http", 1)
    asyncio.run(http.run(tally, range(80), processes[1]))
    assert tally.faults == []
    assert {"200", "400"} <= tally.outcomes.keys()


def test_what_the_gateways_schema_allows(processes: tuple[Pair, str]) -> None:
    tally = Tally("schema", 1)
    http.by_schema(tally, 4, processes[1])
    assert tally.faults == []
    assert tally.outcomes.total() > 10
