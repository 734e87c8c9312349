"""Triton kernels, each beside a plain PyTorch twin of the same signature, which is its definition.

They run on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before the
kernels are imported), which is how they are tested without a GPU. Launchers check nothing that their callers
guarantee; shapes and types are in their docstrings. Sums are ordered, never atomic: the same inputs give the
same bits.
"""
