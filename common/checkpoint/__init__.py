"""Checkpoints on disk: reading every kind this project knows, writing packed, published and plain ones.

`source` says what any of them gives. `huggingface` reads a NemotronH directory as models are published,
plain or in one of the published HLWQ layouts; `packed` the native packed checkpoint, which `packed_writer`
makes from any of them by a `plan`, and `unpacking` turns any of them into a published or a plain one.
`names` says which tensors a model has, `tensor_file` what a safetensors file is, `manifest` and `checksum`
what a packed directory claims about itself. Nothing here knows processes, arenas or devices.
"""

from pathlib import Path

from common.checkpoint.huggingface import HuggingFaceCheckpoint
from common.checkpoint.packed import PackedCheckpoint, is_packed

__all__ = ["HuggingFaceCheckpoint", "PackedCheckpoint", "is_packed", "open_checkpoint"]


def open_checkpoint(directory: Path) -> HuggingFaceCheckpoint | PackedCheckpoint:
    """Open `directory` as the kind of checkpoint it is; CheckpointError or ConfigError if it is none."""
    if is_packed(directory):
        return PackedCheckpoint.open(directory)
    return HuggingFaceCheckpoint.open(directory)
