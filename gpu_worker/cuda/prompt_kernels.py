"""The GPU's kernels for prompts, where the model has PyTorch's unless it is told otherwise.

Not done here: projections (`kernels.matrix_decode`), routed experts (`prompt_experts`), and decode steps,
which have a model of their own (`decode_model`).
"""

from __future__ import annotations

from gpu_worker.cuda.kernels.added_norm import added_norm
from gpu_worker.cuda.kernels.mamba2_chunks import chunk_scan
from gpu_worker.cuda.kernels.mamba2_prompt import TOKENS, gated_group_norm, scan_inputs
from gpu_worker.cuda.kernels.router import prompt_router
from gpu_worker.model.mamba2 import MixerKernels
from gpu_worker.model.nemotron_h import ModelKernels

MIXER_KERNELS = MixerKernels(scan_inputs, chunk_scan, gated_group_norm, TOKENS)
PROMPT_KERNELS = ModelKernels(MIXER_KERNELS, prompt_router, added_norm)
