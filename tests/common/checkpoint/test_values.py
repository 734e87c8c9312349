"""Values that cannot be right in a packed checkpoint: refused by name, whatever is made of it."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.packed import DENSE, dense_layouts, packed_name
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.unpack_layouts import LAYOUTS
from common.checkpoint.unpacking import unpack
from common.checkpoint.values import are_norms, check_values
from common.errors import CheckpointError
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.quantize import pack_matrix
from tests.common.checkpoint.test_packed_damage import reseal
from tests.helpers import published
from tests.helpers.models import edited_tensors, pack_model
from tests.helpers.published import published_model

DOWN_5, LM_HEAD = "backbone.layers.3.mixer.experts.5.down_proj.weight", "lm_head.weight"
KEY = ExpertKey(1, 5)
NORMS, CODEBOOK = "has norms that are negative or not finite", "has a codebook that is not finite or not asc"
BAD = {
    "infinite norm": ("norms", math.inf, NORMS),
    "norm that is no number": ("norms", math.nan, NORMS),
    "negative norm": ("norms", -0.5, NORMS),
    "infinite centroid": ("codebook", math.inf, CODEBOOK),
    "centroid that is no number": ("codebook", math.nan, CODEBOOK),
    "centroid out of order": ("codebook", 0.0, CODEBOOK),
}


def quiet(done: int, total: int) -> None:
    """A progress callback."""


@pytest.fixture(scope="module")
def under_published_codebook(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every layout can carry: five bits under the published codebook, dense matrices too."""
    directory = tmp_path_factory.mktemp("values")
    source = open_checkpoint(published_model(pristine, 5).write(directory / "published", published.q5))
    return pack(source, directory / "packed", make_plan(source), quiet).directory


@pytest.fixture
def packed(under_published_codebook: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(under_published_codebook, tmp_path / "packed"))


def damage(packed: Path, name: str, change: Callable[[PackedMatrix], object]) -> None:
    """Change a matrix on the disk, under checksums that agree."""
    checkpoint = PackedCheckpoint.open(packed)
    if name == DOWN_5:
        record = checkpoint.record(KEY)
        change(checkpoint.layout[KEY.layer].down.view(record))
        path, offset = checkpoint.records_file(KEY.layer)
        with path.open("r+b") as file:
            file.seek(offset + KEY.expert * checkpoint.layout.stride)
            file.write(record.numpy().tobytes())
    else:
        layout, _ = dense_layouts(checkpoint.config, checkpoint.plan.dense)[name]
        with edited_tensors(packed / DENSE) as tensors:
            change(layout.view(tensors[packed_name(name)]))
    reseal(packed)


def put(part: str, value: float) -> Callable[[PackedMatrix], object]:
    return lambda matrix: getattr(matrix, part).view(-1)[3].fill_(value)


def assert_refused(packed: Path, name: str, complaint: str, make: Callable[[Path], object]) -> None:
    """Making something of it is refused, and leaves nothing."""
    made = packed.parent / "made"
    made.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=f"^{packed}: {name} {complaint}"):
        make(made / "result")
    assert list(made.iterdir()) == []


@pytest.mark.parametrize(("part", "value", "complaint"), BAD.values(), ids=BAD)
def test_no_copy_is_made_of_damage(packed: Path, part: str, value: float, complaint: str) -> None:
    """Packing at the bits that the source has once carried it over, under a fresh checksum."""
    damage(packed, DOWN_5, put(part, value))
    source = open_checkpoint(packed)
    assert_refused(packed, DOWN_5, complaint, lambda made: pack(source, made, make_plan(source), quiet))


@pytest.mark.parametrize("name", [DOWN_5, LM_HEAD])
def test_refused_by_name_whatever_is_made_of_it(packed: Path, name: str) -> None:
    damage(packed, name, put("norms", math.inf))
    source = open_checkpoint(packed)
    for plan in (make_plan(source), make_plan(source, 4, 4)):
        assert_refused(packed, name, NORMS, lambda made, plan=plan: pack(source, made, plan, quiet))
    for layout in LAYOUTS:
        assert_refused(packed, name, NORMS, lambda made, to=layout: unpack(source, made, to, quiet))


def test_refused_when_a_worker_maps_it(packed: Path) -> None:
    damage(packed, LM_HEAD, put("norms", math.nan))
    with pytest.raises(CheckpointError, match=f"^{packed}: {LM_HEAD} {NORMS}"):
        PackedCheckpoint.open(packed).mapped_dense_matrix(LM_HEAD)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_raw_weights_that_are_not_finite(pristine: Path, tmp_path: Path, value: float) -> None:
    packed = pack_model(pristine, tmp_path / "packed", 16, 16).directory
    damage(packed, DOWN_5, lambda matrix: matrix.planes[0].view(torch.bfloat16)[7, 9].fill_(value))
    source, complaint = open_checkpoint(packed), "has weights that are not finite"
    assert_refused(packed, DOWN_5, complaint, lambda made: pack(source, made, make_plan(source), quiet))
    assert_refused(packed, DOWN_5, complaint, lambda made: unpack(source, made, "bf16", quiet))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
def test_sound_matrices_pass(bits: int) -> None:
    weight = torch.randn(9, 200, generator=torch.Generator().manual_seed(bits))
    weight[3] = 0
    check_values(pack_matrix(weight, bits, None if bits == 16 else packing_codebook(bits), fit_norms=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("value", "right"),
    [
        (0.0, True), (-0.0, True), (6e-8, True), (65504.0, True), (-6e-8, False), (-1.0, False),
        (math.inf, False), (-math.inf, False), (math.nan, False), (-math.nan, False),
    ],
)  # fmt: skip
def test_norms_are_finite_and_not_negative(dtype: torch.dtype, value: float, right: bool) -> None:
    """Beside the smallest and the largest that there are, and alone."""
    among = torch.tensor([0.0, 1.0, value, 65504.0], dtype=dtype)
    assert are_norms(among) == are_norms(among[2:3]) == right
