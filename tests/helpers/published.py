"""Tiny models in every published HLWQ layout, written by plain NumPy from the description of the layouts.

Shares nothing with the reader but the quantizer, whose codes are only something to write. Bits are packed by
`numpy.packbits`, which knows both orders; weights are decoded in float64 with a Hadamard matrix of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.hlwq.codebook import published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.quantize import quantize

Array = NDArray[Any]
Arrays = dict[str, Array]
ALL_MATRICES = ("*_proj", "lm_head")


@dataclass(frozen=True)
class Codes:
    """One quantized matrix: codes uint8 (out, padded), norms float16 (out, blocks), codebook float32."""

    bits: int
    in_features: int
    codes: Array
    norms: Array
    codebook: Array

    def decode(self) -> Tensor:
        """The weights in float64."""
        hadamard = np.ones((1, 1))
        while len(hadamard) < 128:
            hadamard = np.kron(np.array([[1, 1], [1, -1]]), hadamard)
        levels = self.codebook.astype(np.float64)[self.codes].reshape(*self.norms.shape, 128)
        blocks = levels @ hadamard / 128 * self.norms.astype(np.float64)[:, :, None]
        return torch.from_numpy(blocks.reshape(len(self.codes), -1)[:, : self.in_features].copy())


Layout = Callable[[str, Codes], Arrays]


def int8(name: str, matrix: Codes) -> Arrays:
    return {f"{name}.codes": matrix.codes.view(np.int8), **_norms_and_scaled(name, matrix)}


def int8_with_ct(name: str, matrix: Codes) -> Arrays:
    return {
        f"{name}.codes": matrix.codes.view(np.int8),
        f"{name}.norms": matrix.norms,
        f"{name}.ct": matrix.codebook,
    }


def nibbles(name: str, matrix: Codes) -> Arrays:
    blocks = matrix.codes.reshape(len(matrix.codes), -1, 128)
    packed = blocks[:, :, 64:] * 16 + blocks[:, :, :64]
    return {f"{name}.codes": packed.reshape(len(blocks), -1), **_norms_and_scaled(name, matrix)}


def q5(name: str, matrix: Codes) -> Arrays:
    bits = np.unpackbits(matrix.codes[:, :, None], axis=2, bitorder="little", count=5)
    packed = np.packbits(bits.reshape(len(bits), -1), axis=1, bitorder="little")
    return {f"{name}.codes": packed, **_norms_and_scaled(name, matrix)}


def hlwq(name: str, matrix: Codes, entries: int = 5) -> Arrays:
    bits = np.unpackbits(matrix.codes.reshape(-1, 1), axis=1)[:, 8 - matrix.bits :]
    rows, blocks = matrix.norms.shape
    return {
        f"{name}.weight__packed": np.packbits(bits.reshape(-1)),
        f"{name}.weight__norms": matrix.norms,
        f"{name}.weight__meta": np.array(
            [rows, blocks, 128, matrix.codes.size, matrix.in_features][:entries], dtype=np.int64
        ),
    }


def hlwq_with_short_meta(name: str, matrix: Codes) -> Arrays:
    parts = hlwq(name, matrix, entries=4)
    meta = f"{name}.weight__meta"
    return parts | {meta: parts[meta].astype(np.int32)}


def double_underscore(name: str, matrix: Codes) -> Arrays:
    return {f"{name}__codes": matrix.codes.view(np.int8), f"{name}__norms": matrix.norms}


def all_underscores(name: str, matrix: Codes) -> Arrays:
    return double_underscore(name.replace(".", "__"), matrix)


def polar_engine(name: str, matrix: Codes) -> Arrays:
    """What the publisher's own tool chooses by the bits of each matrix."""
    chosen = nibbles if matrix.bits <= 4 else q5 if matrix.bits == 5 else int8
    return chosen(name, matrix)


# Layouts of any bits, one case for each layout, and more for the bits that they can have.
ANY_BITS = [int8, int8_with_ct, hlwq, hlwq_with_short_meta, double_underscore, all_underscores]
ONE_OF_EACH = [*((layout, 5) for layout in ANY_BITS), (nibbles, 4), (q5, 5)]
MORE_BITS = [
    (int8, 2), (int8, 8), (hlwq, 3), (hlwq, 4), (hlwq, 8), (double_underscore, 3), (double_underscore, 6),
    (double_underscore, 8), (nibbles, 2), (nibbles, 3),
]  # fmt: skip
# Bits as a recipe in use mixes them.
MIXED = {
    "*.experts.*.up_proj": 3,
    "*.experts.*.down_proj": 4,
    "*.in_proj": 5,
    "*.shared_experts.*": 8,
    "*.[qkv]_proj": 5,
    "*.out_proj": 6,
    "*.o_proj": 6,
    "lm_head": 6,
}


@dataclass(frozen=True)
class PublishedModel:
    """A directory's plain tensors and quantized matrices, by name without `.weight`, before it is written."""

    source: Path
    plain: dict[str, Tensor]
    matrices: dict[str, Codes]

    def with_codebook(self, codebook: Callable[[int], Tensor]) -> PublishedModel:
        """The same codes under other codebooks."""
        matrices = {
            name: replace(matrix, codebook=codebook(matrix.bits).numpy())
            for name, matrix in self.matrices.items()
        }
        return replace(self, matrices=matrices)

    def tensors(self, layout: Layout) -> dict[str, Tensor]:
        tensors = dict(self.plain)
        for name, matrix in self.matrices.items():
            for part, array in layout(name, matrix).items():
                tensors[part] = torch.from_numpy(array.copy())  # safetensors refuses shared memory
        return tensors

    def polar_config(self) -> dict[str, Any]:
        layers = {
            name: {
                "in_features": matrix.in_features, "out_features": len(matrix.codes),
                "in_features_padded": matrix.codes.shape[1], "n_blocks": matrix.norms.shape[1],
                "bits": matrix.bits, "block_size": 128, "packed": matrix.bits <= 4,
                "packed_q5": matrix.bits == 5,
            }
            for name, matrix in self.matrices.items()
        }  # fmt: skip
        return {"format": "polar_engine_v5", "block_size": 128, "layers": layers}

    def write(self, directory: Path, layout: Layout, *, polar_config: bool = True) -> Path:
        """One file; returns `directory`."""
        self._begin(directory, polar_config)
        save_file(self.tensors(layout), directory / "model.safetensors")
        return directory

    def write_shards(
        self,
        directory: Path,
        layout: Layout,
        count: int = 3,
        *,
        index: bool = True,
        polar_config: bool = True,
    ) -> Path:
        """Every part of a matrix in another shard than its neighbour; returns `directory`."""
        self._begin(directory, polar_config)
        tensors = self.tensors(layout)
        weight_map = {}
        for shard in range(count):
            names = list(tensors)[shard::count]
            file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            save_file({name: tensors[name] for name in names}, directory / file)
            weight_map |= dict.fromkeys(names, file)
        if index:
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (directory / "model.safetensors.index.json").write_text(text)
        return directory

    def write_decoded(self, directory: Path) -> Path:
        """What the codes mean, as a plain float32 model; returns `directory`."""
        self._begin(directory, polar_config=False)
        tensors = {name: tensor.float() for name, tensor in self.plain.items()}
        for name, matrix in self.matrices.items():
            tensors[name + ".weight"] = matrix.decode().float()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    def _begin(self, directory: Path, polar_config: bool) -> None:
        directory.mkdir()
        for path in self.source.glob("*.json"):
            shutil.copy(path, directory)
        if polar_config:
            (directory / "polar_config.json").write_text(json.dumps(self.polar_config()))


def published_model(
    source: Path, bits: Mapping[str, int] | int, patterns: tuple[str, ...] = ALL_MATRICES
) -> PublishedModel:
    """The plain model in `source`, quantized at `bits`: all matrices that fit, or each pattern at its own."""
    recipe = dict.fromkeys(patterns, bits) if isinstance(bits, int) else bits
    plain, matrices = {}, {}
    for tensor_name, tensor in load_file(source / "model.safetensors").items():
        name = tensor_name.removesuffix(".weight")
        width = next((width for pattern, width in recipe.items() if fnmatchcase(name, pattern)), None)
        if width is None:
            plain[tensor_name] = tensor
        else:
            matrices[name] = codes_of(tensor, width)
    return PublishedModel(source, plain, matrices)


def assert_same(found: object, written: Codes) -> None:
    """`found` is packed, and all that was written is in it."""
    assert isinstance(found, PackedMatrix)
    assert (found.bits, found.in_features) == (written.bits, written.in_features)
    assert np.array_equal(found.codes().numpy(), written.codes)
    assert found.norms is not None and found.codebook is not None
    assert np.array_equal(found.norms.numpy().view(np.int16), written.norms.view(np.int16))
    assert np.array_equal(found.codebook.numpy(), written.codebook)


def codes_of(weight: Tensor, bits: int) -> Codes:
    codebook = published_codebook(bits)
    codes, norms = quantize(weight, codebook)
    return Codes(bits, weight.shape[1], codes.numpy(), norms.numpy(), codebook.numpy())


def _norms_and_scaled(name: str, matrix: Codes) -> Arrays:
    scaled = (matrix.codebook.astype(np.float64) / np.sqrt(128)).astype(np.float32)
    return {f"{name}.norms": matrix.norms, f"{name}.ct_scaled": scaled}
