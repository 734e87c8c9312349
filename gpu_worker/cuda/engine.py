"""The engine on a GPU: decode steps as captured graphs where the device can drive them, else led by the host.

`eager` launches the same kernels one by one instead, and gives the same bits; so does the host. Used by one
thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.cuda.decode_model import DecodeModel
from gpu_worker.cuda.experts import DeviceExperts
from gpu_worker.cuda.graphs import CapturedSteps, Decoded
from gpu_worker.cuda.kernels.best_token import best_token
from gpu_worker.cuda.memory import captured_sizes
from gpu_worker.cuda.step_sizes import StepSizes
from gpu_worker.cuda.transfers import upload
from gpu_worker.engine import Engine
from gpu_worker.model.nemotron_h import NemotronH
from gpu_worker.model.states import StatePools


class DeviceEngine(Engine):
    """Steps over the slots of the device."""

    def __init__(
        self, model: NemotronH, decode: DecodeModel, pools: StatePools, experts: DeviceExperts, eager: bool
    ) -> None:
        super().__init__(model, pools, experts)
        self._decode, self._device_experts = decode, experts
        self._device = pools.lengths.device
        able = captured_sizes(pools.sequences)
        sizes = [] if eager else list(filter(experts.device_drives, able))
        self._captured = CapturedSteps(self._step, sizes, self._device)
        # Larger steps than the captured ones are led by the host, which may be faster yet. Where none is
        # captured, all that costs something is shared by a step's sequences.
        self._sizes = StepSizes(able, self._device) if sizes and len(able) > 1 else None
        self.launches_only = bool(sizes)
        # Capturing decoded token 0 at places that are free: as new again.
        for place in range(pools.sequences):
            pools.reset(place)
        experts.start_counting()

    def close(self) -> None:
        self._device_experts.close()

    def divide(self, count: int) -> list[int]:
        return self._sizes.divide(count) if self._sizes is not None else super().divide(count)

    def decode(self, places: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One token for each of several sequences: logits (b, vocab_size) float32, until the next step."""
        if self._sizes is None:
            return self._decoded(places, tokens)
        with self._sizes.measuring(len(places)):
            return self._decoded(places, tokens)

    def _decoded(self, places: Sequence[int], tokens: Sequence[int]) -> Tensor:
        for place in places:
            self._lengths[place] += 1
        if self._device_experts.device_drives(len(places)):
            self._device_experts.before_step(len(places))
            if len(places) in self._captured:
                return self._told(self._captured(tokens, places))
        return self._told(self._step(upload(tokens, self._device), upload(places, self._device)))

    def _told(self, decoded: Decoded) -> Tensor:
        self.best = decoded.best
        return decoded.logits

    @torch.inference_mode()
    def _step(self, tokens: Tensor, places: Tensor) -> Decoded:
        logits = self._decode(tokens, places, self.pools, self._device_experts.steps(len(tokens)))
        return Decoded(logits, best_token(logits))
