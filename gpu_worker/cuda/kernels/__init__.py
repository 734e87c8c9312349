"""Triton kernels, each beside a plain PyTorch twin of the same signature, which is its definition.

They run on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before the
kernels are imported), which is how they are tested without a GPU. Launchers check nothing that their callers
guarantee; shapes and types are in their docstrings. Sums are ordered, never atomic: the same inputs give the
same bits.
"""

from __future__ import annotations

import os

# An addition takes its product unrounded, which is part of the order of a sum: a host adds the same way
# (common/hlwq/native/device_order.inc). Triton 3.10 would not by default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
