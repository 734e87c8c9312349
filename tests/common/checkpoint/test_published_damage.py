"""Published checkpoints that cannot be right: refused with the tensor's name, at open or when it is read."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint
from common.checkpoint.damage import damaged_weights
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError
from tests.helpers import published
from tests.helpers.models import edited_tensors
from tests.helpers.published import Layout, PublishedModel, published_model

UP, DOWN = "backbone.layers.1.mixer.experts.3.up_proj", "backbone.layers.3.mixer.experts.6.down_proj"
IN_PROJ, SHARED = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.shared_experts.up_proj"
CODES, NORMS, CT, CT_SCALED = (f"{UP}.{part}" for part in ("codes", "norms", "ct", "ct_scaled"))
PACKED, PACKED_NORMS, META = (f"{UP}.weight__{part}" for part in ("packed", "norms", "meta"))
STACKED, DOWN_STACKED = (f"backbone.layers.1.mixer.experts.{part}_proj" for part in ("up", "down"))
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def five(pristine: Path) -> PublishedModel:
    return published_model(pristine, 5)


@pytest.fixture(scope="module")
def four(pristine: Path) -> PublishedModel:
    return published_model(pristine, 4)


def damaged(model: PublishedModel, directory: Path, layout: Layout, damage: Damage) -> Path:
    model.write(directory, layout, polar_config=False)
    with edited_tensors(directory / "model.safetensors") as tensors:
        damage(tensors)
    return directory


def refusal_at_open(directory: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        HuggingFaceCheckpoint.open(directory)
    return str(refusal.value)


def put(name: str, index: tuple[int, ...], value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name][index] = value

    return damage


def drop(*names: str) -> Damage:
    return lambda tensors: [tensors.pop(name) for name in names]


def change(name: str, edit: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = edit(tensors[name]).contiguous()

    return damage


def add(name: str, tensor: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: tensor.clone()})


def quantize_a_vector(tensors: Tensors) -> None:
    del tensors["backbone.norm_f.weight"]
    tensors["backbone.norm_f.codes"] = torch.zeros(1, 80, dtype=torch.uint8)
    tensors["backbone.norm_f.norms"] = torch.zeros(1, 1).half()


AT_OPEN = {
    "codes without norms": (published.q5, drop(NORMS), [CODES, "norms"]),
    "norms without codes": (published.q5, drop(CODES), [NORMS, "codes"]),
    "codebook alone": (published.q5, drop(CODES, NORMS), [CT_SCALED, "codes and norms"]),
    "norms alone": (published.double_underscore, drop("lm_head__codes"), ["lm_head__norms", "codes"]),
    "packed without meta": (published.hlwq, drop(META), [PACKED, "meta"]),
    "packed without norms": (published.hlwq, drop(PACKED_NORMS), [PACKED, "norms"]),
    "meta without packed": (published.hlwq, drop(PACKED), [PACKED_NORMS, "packed"]),
    "nothing at all": (published.q5, drop(CODES, NORMS, CT_SCALED), ["lacks", UP]),
    "plain as well": (published.q5, add(f"{UP}.weight", torch.zeros(72, 128)), [f"{UP}.weight", CODES]),
    "plain by another name": (
        published.hlwq,
        add("model.layers.0.mixer.in_proj.weight", torch.zeros(1)),
        ["model.layers.0.mixer.in_proj.weight", "twice"],
    ),
    "int8 and double underscore": (
        published.int8,
        add("lm_head__codes", torch.zeros(96, 128, dtype=torch.int8)),
        ["lm_head__codes", "lm_head.codes", "twice"],
    ),
    "int8 and HLWQ packed": (
        published.hlwq,
        add(CODES, torch.zeros(72, 128, dtype=torch.int8)),
        [CODES, PACKED, "two layouts"],
    ),
    "a layer's experts stacked as well": (
        published.int8,
        lambda tensors: tensors.update(
            {STACKED: torch.zeros(8, 72, 128), DOWN_STACKED: torch.zeros(8, 128, 72)}
        ),
        ["layers.1.mixer.experts.0.up_proj", "stacked and one by one"],
    ),
    "a vector": (published.q5, quantize_a_vector, ["backbone.norm_f.codes", "[128]"]),
    "rows are missing": (published.int8, change(CODES, lambda t: t[1:]), [CODES, "[71, 128]"]),
    "columns are missing": (published.q5, change(CODES, lambda t: t[:, 5:]), [CODES, "[72, 75]"]),
    "transposed": (published.int8, change(CODES, lambda t: t.T), [CODES, "[128, 72]"]),
    "norms of other rows": (published.q5, change(NORMS, lambda t: t[1:]), [NORMS, "[71, 1]"]),
    "blocks of 64": (
        published.int8,
        change(NORMS, lambda t: t.repeat(1, 2)),
        [NORMS, "[72, 2]", "blocks of 128"],
    ),
    "norms in float32": (published.int8, change(NORMS, Tensor.float), [NORMS, "F32", "F16"]),
    "packed codes as int8": (published.q5, change(CODES, lambda t: t.view(torch.int8)), [CODES, "I8", "U8"]),
    "codes in int32": (published.int8, change(CODES, Tensor.int), [CODES, "I32"]),
    "packed is cut short": (published.hlwq, change(PACKED, lambda t: t[1:]), [PACKED, "[5759]"]),
    "packed at 7 bits": (published.hlwq, change(PACKED, lambda t: t.new_zeros(8064)), [PACKED, "7 bits"]),
    "packed at 1 bit": (published.hlwq, change(PACKED, lambda t: t.new_zeros(1152)), [PACKED, "1 bits"]),
    "codebook of 7 bits": (published.int8, add(CT_SCALED, torch.arange(128.0)), [CT_SCALED, "7 bits"]),
    "codebook of 1 bit": (published.int8, add(CT_SCALED, torch.arange(2.0)), [CT_SCALED, "1 bits"]),
    "codebook of 31 entries": (published.int8, add(CT_SCALED, torch.arange(31.0)), [CT_SCALED, "[31]"]),
    "codebook of 6 bits": (published.q5, add(CT_SCALED, torch.arange(64.0)), [CT_SCALED, "6 bits", "5 bits"]),
    "codebook in float16": (published.int8, change(CT_SCALED, Tensor.half), [CT_SCALED, "F16"]),
    "codebooks of two lengths": (published.int8, add(CT, torch.arange(16.0)), [CT, "lengths"]),
    "meta of three": (published.hlwq, change(META, lambda t: t[:3]), [META, "[3]"]),
    "meta in float": (published.hlwq, change(META, Tensor.float), [META, "F32"]),
}


@pytest.mark.parametrize(("layout", "damage", "complaints"), AT_OPEN.values(), ids=AT_OPEN)
def test_refused_at_open(
    five: PublishedModel, tmp_path: Path, layout: Layout, damage: Damage, complaints: list[str]
) -> None:
    message = refusal_at_open(damaged(five, tmp_path / "model", layout, damage))
    for complaint in complaints:
        assert complaint in message


def test_refuses_the_bits_of_polar_config(five: PublishedModel, tmp_path: Path) -> None:
    five.write(tmp_path / "model", published.double_underscore)
    path = tmp_path / "model" / "polar_config.json"
    original = json.loads(path.read_text())
    for claim, complaint in (
        ({"bits": 7}, "7 bits by polar_config"),
        ({"bits": 1}, "1 bits by polar_config"),
        ({"bits": "5"}, "5 bits by polar_config"),
        ({"bits": 16}, "16 bits by polar_config"),
        ({"block_size": 64}, "blocks of 64"),
    ):
        layers = original["layers"] | {UP: original["layers"][UP] | claim}
        path.write_text(json.dumps(original | {"layers": layers}))
        message = refusal_at_open(tmp_path / "model")
        assert f"{UP}__codes" in message and complaint in message


def test_refuses_packed_bytes_that_contradict_polar_config(five: PublishedModel, tmp_path: Path) -> None:
    five.write(tmp_path / "model", published.hlwq)
    (tmp_path / "model" / "polar_config.json").write_text(json.dumps({"bits": 4}))
    assert "contradicts codes of 4 bits" in refusal_at_open(tmp_path / "model")


@pytest.mark.parametrize("content", ["", "[]", '{"layers": [1]}', '{"layers": {"lm_head": 5}}'])
def test_refuses_a_polar_config_that_is_none(five: PublishedModel, tmp_path: Path, content: str) -> None:
    five.write(tmp_path / "model", published.q5)
    (tmp_path / "model" / "polar_config.json").write_text(content)
    assert "polar_config.json is damaged" in refusal_at_open(tmp_path / "model")


def swap(codebook: Tensor) -> Tensor:
    codebook[[3, 4]] = codebook[[4, 3]]
    return codebook


WHEN_READ = {
    "code out of range": (published.int8, put(CODES, (7, 9), 32), CODES, "code 32"),
    "negative code": (published.int8, put(f"{DOWN}.codes", (127, 127), -1), f"{DOWN}.codes", "code 255"),
    "dense code": (published.int8_with_ct, put("lm_head.codes", (0, 0), 40), "lm_head.codes", "code 40"),
    "one code of 8 bits": (
        published.double_underscore,
        put(f"{SHARED}__codes", (0, 0), -1),
        f"{SHARED}__codes",
        "far from all others",
    ),
    "codes of 7 bits": (
        published.double_underscore,
        change(f"{SHARED}__codes", lambda t: t * 3),
        f"{SHARED}__codes",
        "7 bits by its largest code",
    ),
    "infinite norm": (published.q5, put(NORMS, (5, 0), math.inf), NORMS, "not finite"),
    "no number": (published.hlwq, put(PACKED_NORMS, (5, 0), math.nan), PACKED_NORMS, "not finite"),
    "negative norm": (published.q5, put(f"{IN_PROJ}.norms", (5, 0), -0.5), f"{IN_PROJ}.norms", "negative"),
    "descending codebook": (published.q5, change(CT_SCALED, lambda t: t.flip(0)), CT_SCALED, "ascending"),
    "swapped centroids": (published.int8_with_ct, change("lm_head.ct", swap), "lm_head.ct", "ascending"),
    "equal centroids": (published.q5, change(CT_SCALED, torch.zeros_like), CT_SCALED, "ascending"),
    "infinite centroid": (published.q5, put(CT_SCALED, (31,), math.inf), CT_SCALED, "not finite"),
    "centroid that is none": (published.q5, put(CT_SCALED, (0,), math.nan), CT_SCALED, "not finite"),
    "different codebooks": (published.int8, add(CT, torch.arange(32.0)), CT, "different codebooks"),
    "meta of other rows": (published.hlwq, put(META, (0,), 73), META, "[73, 1, 128, 9216, 128]"),
    "meta of more blocks": (published.hlwq, put(META, (1,), 2), META, "[72, 2,"),
    "meta of blocks of 64": (published.hlwq, put(META, (2,), 64), META, "[72, 1, 64,"),
    "meta of fewer codes": (published.hlwq_with_short_meta, put(META, (3,), 9215), META, "9215]"),
    "meta of other columns": (published.hlwq, put(META, (4,), 72), META, "9216, 72]"),
}


@pytest.mark.parametrize(("layout", "damage", "tensor", "complaint"), WHEN_READ.values(), ids=WHEN_READ)
def test_refused_when_read(
    five: PublishedModel, tmp_path: Path, layout: Layout, damage: Damage, tensor: str, complaint: str
) -> None:
    """Packing stops with the tensor's name and leaves nothing; verifying names the same one and no other."""
    directory = damaged(five, tmp_path / "model", layout, damage)
    checkpoint = HuggingFaceCheckpoint.open(directory)
    (tmp_path / "made").mkdir()
    with pytest.raises(CheckpointError) as refusal:
        pack(checkpoint, tmp_path / "made" / "packed", make_plan(checkpoint), lambda done, total: None)
    assert tensor in str(refusal.value) and complaint in str(refusal.value)
    assert not (tmp_path / "made" / "packed").exists()
    (line,) = damaged_weights(HuggingFaceCheckpoint.open(directory), lambda done, total: None)
    assert line.startswith(f"{directory / 'model.safetensors'}: {tensor} ") and complaint in line


def test_nibbles_beyond_a_codebook_of_three_bits(four: PublishedModel, tmp_path: Path) -> None:
    damage = change(f"{UP}.ct_scaled", lambda codebook: codebook[4:12])
    checkpoint = HuggingFaceCheckpoint.open(damaged(four, tmp_path / "model", published.nibbles, damage))
    with pytest.raises(CheckpointError, match=f"{UP}.codes holds code 1[0-5], out of range for .* 3 bits"):
        checkpoint.matrix(f"{UP}.weight")


def test_a_codebook_too_large_to_be_extended(four: PublishedModel, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[f"{UP}.ct"] = torch.linspace(0, 3.4e38, 16)
        del tensors[f"{UP}.ct_scaled"]

    checkpoint = HuggingFaceCheckpoint.open(damaged(four, tmp_path / "model", published.nibbles, damage))
    with pytest.raises(CheckpointError, match=f"{UP}.ct .*too large"):
        checkpoint.matrix(f"{UP}.weight", 8)


def test_plain_weights_that_are_not_finite(five: PublishedModel, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    damage = put("backbone.norm_f.weight", (3,), float("nan"))
    checkpoint = HuggingFaceCheckpoint.open(damaged(five, tmp_path / "model", published.q5, damage))
    lines = damaged_weights(checkpoint, lambda done, total: reports.append((done, total)))
    assert lines == [f"{tmp_path / 'model'}: backbone.norm_f.weight: weights are not finite"]
    assert reports[-1] == (sum(checkpoint.sizes.values()),) * 2 and len(reports) == len(checkpoint.sizes)
