"""The published layouts as `unpack` writes them, against the check values and a decoder of plain integers.

The decoder here was written from the description of the layouts alone: it shares no code with the writer.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.checkpoint.source import Stored
from common.checkpoint.tensor_file import TensorFile
from common.checkpoint.unpack_layouts import LAYOUTS, polar_entry
from common.checkpoint.unpack_shards import Group, Shard, Weight
from common.errors import ConfigError
from common.hlwq.codebook import converged_codebook, published_codebook
from common.hlwq.matrix import PackedMatrix
from common.hlwq.quantize import pack_matrix
from tests.common.hlwq.test_check_values import check_weights

NAME = "backbone.layers.1.mixer.experts.0.up_proj.weight"
KEY = NAME.removesuffix(".weight")
BITS = [2, 3, 4, 5, 6, 8]


def written(directory: Path, layout: str, matrix: PackedMatrix, name: str = NAME) -> dict[str, Tensor]:
    """The tensors of one matrix, written to a file of its own and read by safetensors."""
    stored = Stored(matrix.shape, "BF16", matrix.nbytes, matrix.bits)
    group = Group([Weight(name, LAYOUTS[layout](name, stored))], lambda: (matrix,))
    counted: list[int] = []
    Shard("model.safetensors", [group]).write(directory, counted.append)
    assert counted == [sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())]
    return load_file(directory / "model.safetensors")


def random_matrix(bits: int, rows: int = 37, columns: int = 300) -> PackedMatrix:
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return pack_matrix(weights, bits, published_codebook(bits))


def number_of(raw: bytes, order: str) -> Iterator[int]:
    """The 40-bit numbers of a run of bytes."""
    assert len(raw) % 5 == 0
    return (int.from_bytes(raw[i : i + 5], order) for i in range(0, len(raw), 5))  # type: ignore[arg-type]


def decoded_codes(codes: Tensor, in_padded: int) -> list[list[int]]:
    """Codes of the layouts with rows, told apart by shape alone."""
    rows = [bytes(row) for row in codes.view(torch.uint8).numpy()]
    if codes.shape[1] == in_padded:
        return [list(row) for row in rows]
    if codes.shape[1] == in_padded // 2:
        blocks = [[row[i : i + 64] for i in range(0, len(row), 64)] for row in rows]
        return [[byte >> shift & 15 for block in row for shift in (0, 4) for byte in block] for row in blocks]
    assert codes.shape[1] == in_padded * 5 // 8
    return [[n >> 5 * i & 31 for n in number_of(row, "little") for i in range(8)] for row in rows]


def decoded_run(packed: Tensor) -> list[int]:
    """Codes of HLWQ packed."""
    return [n >> 35 - 5 * i & 31 for n in number_of(bytes(packed.numpy()), "big") for i in range(8)]


def decoded_weights(codes: list[list[int]], norms: Tensor, scaled: np.ndarray, columns: int) -> Tensor:
    """n (c / sqrt(B)) H by the definition of H: its entry (i, j) is the parity of i & j."""
    signs = np.array([[(-1.0) ** (i & j).bit_count() for j in range(128)] for i in range(128)])
    blocks = scaled.astype(np.float64)[np.array(codes)].reshape(*norms.shape, 128)
    weights = blocks @ signs / math.sqrt(128) * norms.double().numpy()[:, :, None]
    return torch.from_numpy(weights.reshape(len(codes), -1)[:, :columns])


def test_check_values_of_polar_engine(tmp_path: Path) -> None:
    tensors = written(tmp_path, "polar_engine_v5", pack_matrix(check_weights(), 5, published_codebook(5)))
    assert set(tensors) == {f"{KEY}.{part}" for part in ("codes", "norms", "ct_scaled")}
    codes, norms, scaled = (tensors[f"{KEY}.{part}"] for part in ("codes", "norms", "ct_scaled"))
    assert codes.dtype == torch.uint8 and codes.shape == (2, 160)
    assert codes[0, :10].tolist() == [19, 54, 248, 158, 131, 13, 137, 8, 96, 148]
    assert norms.dtype == torch.float16
    assert norms.view(torch.int16).tolist() == [[13322, 12326], [13639, 12616]]
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled * math.sqrt(128), published_codebook(5), rtol=1e-6, atol=0)


def test_check_values_of_hlwq_packed(tmp_path: Path) -> None:
    tensors = written(tmp_path, "hlwq-q5", pack_matrix(check_weights(), 5, published_codebook(5)))
    assert set(tensors) == {f"{NAME}__{part}" for part in ("packed", "norms", "meta")}
    packed, norms, meta = (tensors[f"{NAME}__{part}"] for part in ("packed", "norms", "meta"))
    assert packed.dtype == torch.uint8 and packed.shape == (2 * 256 * 5 // 8,)
    assert packed[:10].tolist() == [156, 27, 7, 189, 208, 106, 5, 16, 66, 50]
    assert norms.view(torch.int16).tolist() == [[13322, 12326], [13639, 12616]]
    assert meta.dtype == torch.int64 and meta.tolist() == [2, 2, 128, 512, 160]


def test_check_values_of_nibbles(tmp_path: Path) -> None:
    tensors = written(tmp_path, "polar_engine_v5", pack_matrix(check_weights(), 4, published_codebook(4)))
    assert tensors[f"{KEY}.codes"].shape == (2, 128)
    assert tensors[f"{KEY}.codes"][0, :8].tolist() == [138, 136, 150, 168, 151, 119, 135, 120]


@pytest.mark.parametrize("bits", BITS)
def test_polar_engine_means_what_it_was_made_of(tmp_path: Path, bits: int) -> None:
    matrix = random_matrix(bits)
    tensors = written(tmp_path, "polar_engine_v5", matrix)
    codes = decoded_codes(tensors[f"{KEY}.codes"], 384)
    assert codes == matrix.codes().tolist() and max(map(max, codes)) < 1 << bits
    norms = tensors[f"{KEY}.norms"]
    assert matrix.norms is not None and torch.equal(norms, matrix.norms)
    weights = decoded_weights(codes, norms, tensors[f"{KEY}.ct_scaled"].numpy(), 300)
    torch.testing.assert_close(matrix.decode().double(), weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "dtype", "columns"),
    [(2, "U8", 192), (3, "U8", 192), (4, "U8", 192), (5, "U8", 240), (6, "I8", 384), (8, "U8", 384)],
)
def test_form_of_codes(tmp_path: Path, bits: int, dtype: str, columns: int) -> None:
    """8 bits are uint8, because int8 would make the codes above 127 negative indices."""
    written(tmp_path, "polar_engine_v5", random_matrix(bits))
    info = TensorFile(tmp_path / "model.safetensors").tensors[f"{KEY}.codes"]
    assert (info.dtype, info.shape) == (dtype, (37, columns))


@pytest.mark.parametrize("bits", BITS)
def test_what_polar_config_says(bits: int) -> None:
    matrix = random_matrix(bits)
    assert polar_entry(Stored(matrix.shape, "BF16", matrix.nbytes, bits)) == {
        "in_features": 300, "out_features": 37, "in_features_padded": 384, "n_blocks": 3, "bits": bits,
        "block_size": 128, "packed": bits in (2, 3, 4), "packed_q5": bits == 5,
    }  # fmt: skip


def test_hlwq_packed_means_what_it_was_made_of(tmp_path: Path) -> None:
    matrix = random_matrix(5)
    tensors = written(tmp_path, "hlwq-q5", matrix)
    rows, blocks, block, total, columns = tensors[f"{NAME}__meta"].tolist()
    codes = decoded_run(tensors[f"{NAME}__packed"])
    assert len(codes) == total == rows * blocks * block and columns == 300
    assert codes == matrix.codes().view(-1).tolist()
    by_row = [codes[start : start + blocks * block] for start in range(0, total, blocks * block)]
    implied = published_codebook(5).numpy() / math.sqrt(128)
    weights = decoded_weights(by_row, tensors[f"{NAME}__norms"], implied, columns)
    torch.testing.assert_close(matrix.decode().double(), weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows_at_once", [1, 10])
def test_rows_at_once_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, rows_at_once: int
) -> None:
    """Codes and norms are the same; weights are up to the rounding of a product of fewer rows."""
    matrix = random_matrix(5)
    (tmp_path / "whole").mkdir()
    whole = written(tmp_path / "whole", layout, matrix)
    monkeypatch.setattr("common.checkpoint.packing._WEIGHTS_AT_ONCE", 300 * rows_at_once)
    pieces = written(tmp_path, layout, matrix)
    for name, tensor in pieces.items():
        rounding = 2**-7 if tensor.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(tensor, whole[name], rtol=rounding, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sixteen_bits_are_plain(tmp_path: Path, layout: str) -> None:
    weights = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = written(tmp_path, layout, pack_matrix(weights, 16, None))
    assert list(tensors) == [NAME] and tensors[NAME].dtype == torch.bfloat16
    assert torch.equal(tensors[NAME], weights)


def test_bf16_is_the_decoded_matrix(tmp_path: Path) -> None:
    matrix = random_matrix(3)
    assert torch.equal(written(tmp_path, "bf16", matrix)[NAME], matrix.decode(torch.bfloat16))


def test_hlwq_refuses_other_bits(tmp_path: Path) -> None:
    for bits in (2, 3, 4, 6, 8):
        with pytest.raises(ConfigError, match=rf"has codes of {bits} bits.*choose polar_engine_v5"):
            written(tmp_path, "hlwq-q5", random_matrix(bits))


def test_hlwq_refuses_other_codebooks(tmp_path: Path) -> None:
    matrix = pack_matrix(torch.randn(4, 128), 5, converged_codebook(5))
    with pytest.raises(ConfigError, match=rf"^{NAME} has a codebook of its own.*choose polar_engine_v5"):
        written(tmp_path, "hlwq-q5", matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_are_aligned_to_their_elements(tmp_path: Path, layout: str) -> None:
    """As mapped files want it: 111 norms in float16 must not come before a codebook in float32."""
    written(tmp_path, layout, random_matrix(5))
    raw = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    assert entries.pop("__metadata__") == {"format": "pt"}
    for entry in entries.values():
        size = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I64": 8}[entry["dtype"]]
        assert (start + entry["data_offsets"][0]) % size == 0, entry
