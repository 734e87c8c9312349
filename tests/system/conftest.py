"""What the system tests share: one packed model, and pairs of real processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.models import make_hf_model, pack_model
from tests.system.processes import Pair, pair_of_processes

LAYERS, EXPERTS = 4, 10  # forty experts: a tenth of them is four


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model of four layers of ten experts, two of which a token takes."""
    directory = tmp_path_factory.mktemp("model")
    source = make_hf_model(
        directory / "hf", seed=1, hybrid_override_pattern="MEME*EME-", n_routed_experts=EXPERTS
    )
    pack_model(source, directory / "packed")
    return directory / "packed"


@pytest.fixture(scope="session")
def record_bytes(packed_model: Path) -> int:
    from common.checkpoint.packed import PackedCheckpoint

    return PackedCheckpoint.open(packed_model).layout.stride


@pytest.fixture
def pair(tmp_path: Path, packed_model: Path) -> Iterator[Pair]:
    """A pair of its own for one test. Whatever was killed in between, nothing may be left in the end."""
    with pair_of_processes(tmp_path / "run", packed_model) as pair:
        yield pair
    assert pair.leftovers() == []
