"""The norm before a block and the router, by native kernels: see `small_steps.cpp`.

For float32 on the CPU. The twins are `norms.rms_norm` and `moe.route`, which come here by themselves.
"""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from common.hlwq import native
from common.model_config import ModelConfig

native.declare("rms_norm", [c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p])
native.declare("route", [*[c_void_p] * 3, *[c_int64] * 4, c_int32, c_float, c_void_p, c_void_p], native.Done)


def usable(*tensors: Tensor) -> bool:
    """Whether these are contiguous float32 tensors that native kernels can work on."""
    good = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    return good and native.usable(*tensors)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x (..., columns), weight (columns,)."""
    y = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    native.call("rms_norm", x.data_ptr(), weight.data_ptr(), epsilon, rows, x.shape[-1], y.data_ptr())
    return y


def route(x: Tensor, gate: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choices (rows, k) int64 and weights (rows, k), as `moe.route` has them without groups of experts."""
    rows, k = x.shape[0], config.num_experts_per_tok
    choices, weights = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    native.call(
        "route", x.data_ptr(), gate.data_ptr(), bias.data_ptr(), rows, *gate.shape, k,
        config.norm_topk_prob, config.routed_scaling_factor, choices.data_ptr(), weights.data_ptr(),
    )  # fmt: skip
    return choices, weights
