"""Engines of the GPU in this process, on whatever device tests have: by Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.checkpoint import PackedCheckpoint
from common.hlwq.matrix import PackedMatrix
from gpu_worker.cuda.engine import DeviceEngine
from gpu_worker.cuda.host_memory import RegisteredArena
from gpu_worker.cuda.loading import device_engine
from gpu_worker.model.states import StatePools
from gpu_worker.model.weights import build_weights
from gpu_worker.slots.fetch import Fetcher
from gpu_worker.slots.hints import Hints


@contextmanager
def engine_of(
    checkpoint: PackedCheckpoint,
    fetcher: Fetcher,
    slots: int,
    device: torch.device,
    policy: str = "lru",
    eager: bool = False,
    prefetch: str = "auto",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Iterator[DeviceEngine]:
    """For two sequences, shared experts unpacked; with captured steps where there is a GPU.

    Capturing runs steps, so only an eager engine begins with empty slots.
    """
    config = checkpoint.config
    dense = {name: checkpoint.mapped_dense_matrix(name) for name in checkpoint.dense_stored}
    for name, matrix in dense.items():
        if "shared_experts" in name and isinstance(matrix, PackedMatrix):
            dense[name] = matrix.decode()
    weights = build_weights(dense, config, dtype, device)
    pools = StatePools(config, 2, config.max_position_embeddings, dtype, device)
    cache = slots, policy, eager or device.type == "cpu"
    hints = Hints(prefetch, fetcher)
    arena = RegisteredArena(fetcher.arena, device)
    engine = device_engine(
        weights, pools, checkpoint.layout, *cache, fetcher, arena, hints, config, **options
    )
    try:
        yield engine
        engine.check_integrity()
    finally:
        engine.close()
