"""Mamba-2's mixer between its projections, by a native kernel: see `mamba2_scan.cpp`.

Works on float32 states on the CPU; `usable` says whether it may. The twin is `Mamba2.mix`.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from common.hlwq import native
from common.model_config import ModelConfig
from gpu_worker.model.weights import Mamba2Weights


class _Shape(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("groups", c_int64),
        ("state", c_int64),
        ("conv_kernel", c_int64),
        ("time_step_min", c_float),
        ("epsilon", c_float),
        ("conv_weight", c_void_p),
        ("conv_bias", c_void_p),
        ("dt_bias", c_void_p),
        ("A", c_void_p),
        ("D", c_void_p),
        ("norm", c_void_p),
    )


native.declare("mamba2_scan", [POINTER(_Shape), c_int64, c_int64, *[c_void_p] * 5], native.Done)


class Mamba2Kernel:
    """The scan of one block; keeps the weights it points to."""

    def __init__(self, weights: Mamba2Weights, config: ModelConfig) -> None:
        named = (
            weights.conv1d_weight, weights.conv1d_bias, weights.dt_bias, weights.A, weights.D, weights.norm
        )  # fmt: skip
        self._weights = [None if tensor is None else tensor.float().contiguous() for tensor in named]
        self._inner = config.mamba_intermediate_size
        self._shape = _Shape(
            config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size,
            config.conv_kernel, config.time_step_min, config.layer_norm_epsilon,
            *(None if tensor is None else tensor.data_ptr() for tensor in self._weights),
        )  # fmt: skip

    @staticmethod
    def usable(projected: Tensor, conv: Tensor, ssm: Tensor) -> bool:
        tensors = (projected, conv, ssm)
        return native.usable(*tensors) and all(tensor.dtype == torch.float32 for tensor in tensors)

    def __call__(self, projected: Tensor, conv: Tensor, ssm: Tensor, places: Tensor | slice) -> Tensor:
        """projected (b, t, gate + convolution inputs + dt) to y (b, t, inner), before the output projection.

        conv (sequences, channels, kernel - 1) and ssm (sequences, heads, head_dim, state) advance at places.
        """
        if isinstance(places, slice):
            places = torch.arange(places.start, places.stop)
        projected, places = projected.contiguous(), places.contiguous()
        assert conv.is_contiguous() and ssm.is_contiguous()
        b, t, _ = projected.shape
        y = torch.empty(b, t, self._inner)
        native.call(
            "mamba2_scan", self._shape, b, t, places.data_ptr(), projected.data_ptr(),
            conv.data_ptr(), ssm.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y
