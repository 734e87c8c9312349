"""How large every weight is, and the weights that are no matrices.

Activations must stay finite and of sensible size through any number of blocks. Matrices that read the
normalised residual stream keep it at unit size; each mixer adds 1 / (2 blocks) to the variance of a residual
stream that starts at 1, so it ends near 1.5. Decays, time steps and skips have the ranges that NemotronH is
initialised with. Routers' correction biases are the affair of `router`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from common.checkpoint.names import Shape
from common.model_config import ModelConfig

CORRECTION_BIAS = "gate.e_score_correction_bias"
_FLOAT32 = ("A_log", "D", "dt_bias", CORRECTION_BIAS)
_RELU2_MEAN_SQUARE = 1.5  # E[relu(u)^4] for u ~ N(0, 1)


def dtype_of(name: str) -> str:
    """How a dense weight that is not packed is stored, in the words of safetensors."""
    return "F32" if name.endswith(_FLOAT32) else "BF16"


def standard_deviation(config: ModelConfig, name: str) -> float:
    """Of a matrix's entries, by canonical name; routed experts included."""
    if name == "backbone.embeddings.weight":
        return 1.0
    gain = _output_gain(config, name.partition(".mixer.")[2])
    if gain is None:
        return 1 / math.sqrt(config.hidden_size)
    return gain / math.sqrt(2 * len(config.pattern))


def vector(config: ModelConfig, name: str, shape: Shape, rng: np.random.Generator) -> Tensor:
    """A weight that is neither a matrix nor a correction bias, as it is stored."""
    if name.endswith(("norm.weight", "norm_f.weight")):
        values = 1 + 0.1 * rng.standard_normal(shape)
    elif name.endswith("A_log"):
        values = np.log(rng.uniform(1, 16, shape))
    elif name.endswith("D"):
        values = np.ones(shape)
    elif name.endswith("dt_bias"):
        step = np.exp(rng.uniform(math.log(0.001), math.log(0.1), shape))
        values = step + np.log(-np.expm1(-step))  # softplus, inverted
    elif name.endswith("conv1d.weight"):
        values = rng.standard_normal(shape) / math.sqrt(config.conv_kernel)
    else:
        assert name.endswith("conv1d.bias"), name
        values = 0.1 * rng.standard_normal(shape)
    dtype = torch.float32 if dtype_of(name) == "F32" else torch.bfloat16
    return torch.from_numpy(values).to(dtype)


def _output_gain(config: ModelConfig, name: str) -> float | None:
    """Deviation of an output projection for which its mixer's output has unit variance; None for others.

    What an expert's down projection reads has a mean square of 1.5, the gated norm's output one of 1, and
    attention's one of at most 1. A MoE block's variance is shared by its routed and its shared experts; the
    weights of the k chosen experts are nearly equal, so their squares add up to about scale^2 / k.
    """
    if name == "out_proj.weight":
        return 1 / math.sqrt(config.mamba_intermediate_size)
    if name == "o_proj.weight":
        return 1 / math.sqrt(config.num_attention_heads * config.head_dim)
    if name == "down_proj.weight":
        return 1 / math.sqrt(_RELU2_MEAN_SQUARE * config.intermediate_size)
    if name == "shared_experts.down_proj.weight":
        return 1 / math.sqrt(2 * _RELU2_MEAN_SQUARE * config.moe_shared_expert_intermediate_size)
    if name.endswith("down_proj.weight"):
        spread = math.sqrt(config.num_experts_per_tok) / config.routed_scaling_factor
        return spread / math.sqrt(2 * _RELU2_MEAN_SQUARE * config.moe_intermediate_size)
    return None
