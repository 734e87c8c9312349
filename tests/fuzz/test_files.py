"""The fuzz of checkpoints in short, and what it has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.errors import CheckpointError, ConfigError, ServingError
from expert_store.inspect import describe
from tests.fuzz import files
from tests.fuzz.tally import Tally
from tests.helpers.models import edited_json


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[files.Victim]:
    return files.make_victims(tmp_path_factory.mktemp("victims"))


@pytest.fixture
def packed(victims: list[files.Victim]) -> Any:
    """Whole again afterwards."""
    yield victims[0].directory
    for name, data in victims[0].files.items():
        (victims[0].directory / name).write_bytes(data)


def test_damaged_files(victims: list[files.Victim], caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally("files", 1)
    files.run(tally, range(150), victims)
    assert tally.faults == []
    assert {"CheckpointError", "ConfigError", "read"} <= tally.outcomes.keys()


@pytest.mark.parametrize("name", ["config.json", "packed.json"])
def test_json_that_is_nested_too_deep(packed: Path, name: str) -> None:
    (packed / name).write_text("[" * 100_000)
    with pytest.raises(ServingError, match="nested too deep"):
        open_checkpoint(packed)


@pytest.mark.parametrize("pattern", [[["mamba"]], [{}], 7])
def test_a_pattern_that_is_no_list_of_words(packed: Path, pattern: Any) -> None:
    with edited_json(packed / "config.json") as config:
        del config["layers_block_type"]
        config["layer_types" if isinstance(pattern, list) else "hybrid_override_pattern"] = pattern
    with pytest.raises(ConfigError, match="pattern"):
        open_checkpoint(packed)


def test_more_experts_than_can_be_named(packed: Path) -> None:
    """Naming all of them took for ever."""
    with edited_json(packed / "config.json") as config:
        config["n_routed_experts"] = 1 << 40
    with pytest.raises(ConfigError, match="can be named"):
        open_checkpoint(packed)


@pytest.mark.parametrize("source", [{}, {"name": 3}])
def test_a_manifest_without_a_name(packed: Path, source: Any) -> None:
    manifest = json.loads((packed / "packed.json").read_text())
    (packed / "packed.json").write_text(json.dumps(manifest | {"source": source}))
    with pytest.raises(CheckpointError, match="source is"):
        describe(packed)


def test_a_manifest_with_a_name_that_no_file_has(packed: Path) -> None:
    manifest = json.loads((packed / "packed.json").read_text())
    manifest["files"]["\ud800"] = manifest["files"]["config.json"]
    (packed / "packed.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is damaged"):
        describe(packed)


@pytest.mark.parametrize("architectures", [True, 7, [3], [["NemotronHForCausalLM"]]])
def test_architectures_that_are_no_list_of_names(packed: Path, architectures: Any) -> None:
    with edited_json(packed / "config.json") as config:
        config["architectures"] = architectures
        del config["model_type"]
    with pytest.raises(ConfigError, match="architecture"):
        open_checkpoint(packed)


def test_a_checksum_that_is_no_text(packed: Path) -> None:
    """A lone surrogate cannot be encoded, nor hashed."""
    manifest = json.loads((packed / "packed.json").read_text())
    next(iter(manifest["files"].values()))["sha256"] = "\ud800"
    (packed / "packed.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(packed)
