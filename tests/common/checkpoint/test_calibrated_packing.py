"""Packing with a calibration: which matrices it is asked for, and what becomes of the answers."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.packing import CODEBOOKS, CONVERGED
from common.checkpoint.plan import make_plan
from common.expert_key import ExpertKey
from common.hlwq.calibrated import Moment, error_feedback, pack_calibrated
from common.hlwq.matrix import PackedMatrix


class RandomInputs:
    """Correlated inputs drawn from each matrix's own name; notes what it is asked for."""

    identity = "random"

    def __init__(self) -> None:
        self.asked: list[str | ExpertKey] = []

    def dense(self, name: str) -> Moment:
        self.asked.append(name)
        return self.moment(name, 128)

    def expert(self, key: ExpertKey, up: Tensor) -> tuple[Moment, Moment]:
        self.asked.append(key)
        assert up.shape == (72, 128)
        return self.moment(f"{key} up", 128), self.moment(f"{key} down", 72)

    def moment(self, name: str, columns: int) -> Moment:
        generator = torch.Generator().manual_seed(sum(name.encode()))
        mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1, columns)
        return Moment.of(torch.randn(60, columns, generator=generator) @ mixing.T)


def packed(
    source: Path,
    destination: Path,
    recipe: dict[str, int],
    inputs: RandomInputs,
    codebook: str = CONVERGED,
) -> PackedCheckpoint:
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, recipe=recipe)
    return pack(
        checkpoint, destination, plan, lambda done, total: None, calibration=inputs, codebook=codebook
    )


def assert_same(found: object, weight: Tensor, bits: int, moment: Moment, codebook: str) -> None:
    feedback = error_feedback(moment)
    assert isinstance(found, PackedMatrix) and feedback is not None
    expected = pack_calibrated(weight, bits, CODEBOOKS[codebook](bits), feedback)
    assert found.codebook is not None and torch.equal(found.codebook, CODEBOOKS[codebook](bits))
    assert found.bits == bits and torch.equal(found.codes(), expected.codes())
    assert found.norms is not None and torch.equal(found.norms, expected.norms)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_matrix_is_rounded_for_its_own_inputs(pristine: Path, tmp_path: Path, codebook: str) -> None:
    inputs, source = RandomInputs(), open_checkpoint(pristine)
    recipe = {
        "*.experts.*.up_proj": 3,
        "*.experts.*.down_proj": 4,
        "lm_head": 5,
        "*.layers.0.mixer.in_proj": 6,
    }
    checkpoint = packed(pristine, tmp_path / "packed", recipe, inputs, codebook)
    for key in (ExpertKey(0, 0), ExpertKey(1, 7)):
        moments, weights = inputs.expert(key, source.expert(key)[0]), source.expert(key)
        for found, weight, bits, moment in zip(checkpoint.expert(key), weights, (3, 4), moments, strict=True):
            assert isinstance(weight, Tensor)
            assert_same(found, weight, bits, moment, codebook)
    for name, bits in {"lm_head.weight": 5, "backbone.layers.0.mixer.in_proj.weight": 6}.items():
        weight = source.dense_matrix(name)
        assert isinstance(weight, Tensor)
        assert_same(checkpoint.dense_matrix(name), weight, bits, inputs.moment(name, 128), codebook)


def test_asks_for_nothing_that_is_not_quantized(
    pristine: Path, pristine_packed: Path, tmp_path: Path
) -> None:
    """Neither for what is kept in 16 bits, nor for codes that are carried over."""
    inputs = RandomInputs()
    packed(pristine, tmp_path / "raw", {"*.experts.*": 16}, inputs)
    packed(pristine_packed, tmp_path / "kept", {"lm_head": 8}, inputs)
    assert inputs.asked == ["lm_head.weight"]
    packed(pristine_packed, tmp_path / "wider", {"*.layers.1.mixer.experts.*.down_proj": 6}, inputs)
    assert set(inputs.asked[1:]) == {ExpertKey(0, expert) for expert in range(8)}
    kept = [
        PackedCheckpoint.open(path).expert(ExpertKey(0, 3))[0]
        for path in (pristine_packed, tmp_path / "wider")
    ]
    assert all(isinstance(matrix, PackedMatrix) for matrix in kept)
    assert torch.equal(*(matrix.codes() for matrix in kept if isinstance(matrix, PackedMatrix)))


def test_inputs_never_seen_leave_plain_codes(pristine: Path, pristine_packed: Path, tmp_path: Path) -> None:
    class NoInputs(RandomInputs):
        def moment(self, name: str, columns: int) -> Moment:
            return Moment(torch.zeros(columns, columns), 0)

    checkpoint = packed(pristine, tmp_path / "packed", {"*.experts.*": 5}, NoInputs())
    assert checkpoint.fingerprint == PackedCheckpoint.open(pristine_packed).fingerprint


def test_a_run_with_other_inputs_keeps_nothing_of_another(pristine: Path, tmp_path: Path) -> None:
    """What an interrupted run finished is kept by the next only if it rounds for the same inputs."""

    class Interrupted(RandomInputs):
        def expert(self, key: ExpertKey, up: Tensor) -> tuple[Moment, Moment]:
            if key == ExpertKey(1, 5):
                raise KeyboardInterrupt
            return super().expert(key, up)

    class OtherInputs(RandomInputs):
        identity = "other"

    destination = tmp_path / "packed"
    for inputs, again in ((RandomInputs(), {1}), (OtherInputs(), {0, 1})):
        with pytest.raises(KeyboardInterrupt):
            packed(pristine, destination, {"*.experts.*": 4}, Interrupted())
        packed(pristine, destination, {"*.experts.*": 4}, inputs)
        assert {key.layer for key in inputs.asked if isinstance(key, ExpertKey)} == again
        shutil.rmtree(destination)
