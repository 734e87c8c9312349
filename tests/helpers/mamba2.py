"""A Mamba-2 block drawn at random, for tests of its kernels: weights but for the projections, and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.model_config import ModelConfig
from gpu_worker.model.linear import Linear
from gpu_worker.model.weights import Mamba2Weights
from tests.helpers.models import tiny_config


class DrawnBlock:
    """Always the same for a shape, which is what it changes of `tiny_config`; states of some sequences."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: dict[str, Any], sequences: int
    ) -> None:
        self.config = ModelConfig.from_dict(tiny_config(**shape))
        self._generator, self.device, self.dtype = torch.Generator().manual_seed(1), device, dtype
        config, heads = self.config, self.config.mamba_num_heads
        self.weights = Mamba2Weights(
            in_proj=Linear(torch.empty(0)),
            conv1d_weight=self.draw(config.conv_dim, config.conv_kernel),
            conv1d_bias=self.draw(config.conv_dim) if config.use_conv_bias else None,
            dt_bias=self.draw(heads, dtype=torch.float32) - 2,
            A=-self.draw(heads, dtype=torch.float32).exp(),
            D=self.draw(heads, dtype=torch.float32),
            norm=self.draw(config.mamba_intermediate_size),
            out_proj=Linear(torch.empty(0)),
        )
        self.conv = self.draw(sequences, config.conv_dim, config.conv_kernel - 1)
        ssm = (heads, config.mamba_head_dim, config.ssm_state_size)
        self.ssm = self.draw(sequences, *ssm, dtype=torch.float32)

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype or self.dtype)

    @property
    def width(self) -> int:
        """Columns of what the input projection makes: gate, convolution inputs, dt."""
        config = self.config
        return config.mamba_intermediate_size + config.conv_dim + config.mamba_num_heads
