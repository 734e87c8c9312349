"""Reading one safetensors file, against the safetensors library; and files that change under the reader."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoint.tensor_file import TensorFile
from common.errors import CheckpointError

TENSORS = {
    "bf16": torch.randn(7, 5).bfloat16(),
    "f16": torch.randn(3, 2, 4).half(),
    "f32": torch.randn(6),
    "i8": torch.arange(-4, 4, dtype=torch.int8),
    "u8": torch.arange(9, dtype=torch.uint8).view(3, 3),
    "i32": torch.arange(5, dtype=torch.int32),
    "i64": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "some.safetensors", metadata={"format": "pt"})
    return tmp_path / "some.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_reads_what_was_saved(path: Path, name: str) -> None:
    file = TensorFile(path)
    assert_identical(file.read(name), TENSORS[name])
    assert_identical(file.tensor(name), TENSORS[name])
    assert file.tensors[name].shape == tuple(TENSORS[name].shape)
    assert file.tensors[name].size == TENSORS[name].nbytes


@pytest.mark.parametrize("rows", [slice(0, 1), slice(2, 5), slice(6, 9), slice(3, None), slice(2, 2)])
def test_reads_some_rows(path: Path, rows: slice) -> None:
    assert_identical(TensorFile(path).read("bf16", rows), TENSORS["bf16"][rows])


def test_every_read_has_memory_of_its_own(path: Path) -> None:
    file = TensorFile(path)
    file.read("f32").zero_()
    assert_identical(file.read("f32"), TENSORS["f32"])


@pytest.mark.parametrize("size", [0, 3000], ids=["emptied", "cut short"])
def test_a_file_that_shrinks_is_refused(path: Path, size: int) -> None:
    """Touching a mapped page that is no longer in the file would kill the process."""
    long = {"long": torch.zeros(1 << 20)}
    save_file(long, path)
    file = TensorFile(path)
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=f"{path} changed while long was being read"):
        file.read("long")


def test_a_file_that_was_written_to_is_refused(path: Path) -> None:
    file = TensorFile(path)
    file.read("f32")
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match=f"{path} changed while f32 was being read"):
        file.read("f32")


def test_a_file_that_is_gone_is_refused(path: Path) -> None:
    file = TensorFile(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path} changed while f32 was being read"):
        file.read("f32")


def assert_identical(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)
