"""Loads after which a kernel sees what was written before: by the device's other kernels, or by the host.

Triton has acquiring atomics, but an atomic is a write: where many programs look at one place, they queue up.
Not done here: deciding what to wait for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_worker.cuda.kernels.packed_words import INTERPRETED

_ASSEMBLY = tl.constexpr(not INTERPRETED)


@triton.jit
def acquired(pointers):
    """What stands at `pointers` (32 or more, to int32), written by this device with release."""
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [pointers.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return tl.load(pointers, volatile=True)


@triton.jit
def acquired_from_host(pointer):
    """What stands at one place of the host's memory, written by the host with release.

    A look takes 1 us, and several programs that look at one place take turns: 21 of them took 23 us.
    """
    if _ASSEMBLY:
        addresses = tl.zeros([32], tl.int64) + pointer.to(tl.int64)
        numbers = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [addresses],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return tl.max(numbers, 0)
    return tl.load(pointer, volatile=True)


@triton.jit
def zero_after(value):
    """0, which the compiler does not know before it knows `value`, a scalar of int32.

    Added to an address, it keeps loads behind what `value` waited for, those that are taken for free of side
    effects as well.
    """
    if _ASSEMBLY:
        return tl.inline_asm_elementwise(
            "{ .reg .u32 unused; mov.u32 unused, $1; mov.u32 $0, 0; }", "=r,r", [value],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return value * 0


@triton.jit
def pause():
    """A while in which others are not disturbed by looking again: some 100 ns."""
    if _ASSEMBLY:
        tl.inline_asm_elementwise(
            "nanosleep.u32 100; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
