"""The fault matrix in its short form: one round of some of its cases.

`scripts/faults` plays many rounds of all of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.case import Case, play
from tests.faults.deaths import KillWorker, StopWorker
from tests.faults.messages import Messages
from tests.faults.resources import ClockJumps, ReadErrors
from tests.faults.rig import Rig, rig_of
from tests.faults.shim import Shim
from tests.faults.wire import FATES


@pytest.fixture(scope="module")
def two_workers(
    tmp_path_factory: pytest.TempPathFactory, packed_model: Path, record_bytes: int
) -> Iterator[Rig]:
    with rig_of(tmp_path_factory.mktemp("run"), packed_model, record_bytes, shim=None) as rig:
        yield rig


@pytest.fixture(scope="module")
def with_shim(
    tmp_path_factory: pytest.TempPathFactory, packed_model: Path, record_bytes: int
) -> Iterator[Rig]:
    if shutil.which("gcc") is None:
        pytest.skip("faults inside of processes need gcc")
    directory = tmp_path_factory.mktemp("shim")
    with rig_of(directory / "run", packed_model, record_bytes, Shim(directory), workers=1) as rig:
        yield rig


BETWEEN = [Messages(*FATES, seconds=1.5), StopWorker(seconds=2), KillWorker()]
INSIDE = [ReadErrors(), ClockJumps()]


@pytest.mark.parametrize("case", BETWEEN, ids=lambda case: case.name)
def test_between_processes(two_workers: Rig, case: Case) -> None:
    """What happens to one worker, or on its way, the other does not notice."""
    must_not_be(case, two_workers)


@pytest.mark.parametrize("case", INSIDE, ids=lambda case: case.name)
def test_inside_of_processes(with_shim: Rig, case: Case) -> None:
    must_not_be(case, with_shim)


def must_not_be(case: Case, rig: Rig) -> None:
    observed = play(case, rig, seed=1)
    assert observed.faults == []
    assert observed.right
