"""Reads all weights of a directory as published, as packing would, and says which of them are damaged.

Such directories carry no checksums: what is found is what cannot be right, such as codes out of range.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from common.checkpoint.huggingface import HuggingFaceCheckpoint
from common.checkpoint.values import is_finite
from common.errors import CheckpointError


def damaged_weights(checkpoint: HuggingFaceCheckpoint, progress: Callable[[int, int], None]) -> list[str]:
    """One line for each damaged weight, which it names; `progress` gets bytes done and in all."""
    sizes = checkpoint.sizes
    total, done = sum(sizes.values()), 0
    damaged = []
    for name, size in sizes.items():
        try:
            matrix = checkpoint.matrix(name)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            if isinstance(matrix, Tensor) and not is_finite(matrix):
                damaged.append(f"{checkpoint.directory}: {name}: weights are not finite")
        done += size
        progress(done, total)
    return damaged
