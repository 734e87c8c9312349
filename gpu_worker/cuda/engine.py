"""The engine on a GPU: prompts as everywhere, decode steps as a captured graph for each number of sequences.

`eager` launches the same kernels one by one instead, and gives the same bits. Used by one thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.experts import DeviceExperts
from gpu_worker.cuda.graphs import CapturedSteps
from gpu_worker.engine import Engine
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools


class DeviceEngine(Engine):
    """Steps over experts that the device itself looks up and fetches."""

    def __init__(
        self, model: NemotronH, decode: DecodeModel, pools: StatePools, experts: DeviceExperts, eager: bool
    ) -> None:
        super().__init__(model, pools, experts)
        self._decode, self._device_experts = decode, experts
        device = pools.lengths.device
        self._captured = None if eager else CapturedSteps(self._step, pools.sequences, device)
        # Capturing decoded token 0 at places that are free: as new again.
        for place in range(pools.sequences):
            pools.reset(place)

    def close(self) -> None:
        self._device_experts.close()

    def decode(self, places: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One token for each of several sequences: logits (b, vocab_size) float32, until the next step."""
        for place in places:
            self._lengths[place] += 1
        if self._captured is not None:
            return self._captured(tokens, places)
        device = self.pools.lengths.device
        return self._step(torch.tensor(tokens, device=device), torch.tensor(places, device=device))

    @torch.inference_mode()
    def _step(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self._decode(tokens, places, self.pools, self._device_experts.steps)
