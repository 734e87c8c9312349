"""The native kernels on tensors: finds the compiled library, and hands it pointers.

Every function has a plain PyTorch twin beside the algorithm it computes (`planes`, `hadamard`, `quantize`,
`matrix`), which decides by `usable` whether to come here. EXPERT_SERVING_KERNELS=plain forces the twins, so
does an installation without a C++ compiler, which says so once; avx512, avx2 or portable force one path.
The kernels take contiguous CPU tensors, spread their work over threads of their own, and keep nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, Exhausted

if TYPE_CHECKING:
    from common.hlwq.matrix import PackedMatrix
    from common.hlwq.quantize import NearestCentroid
    from common.record import MatrixLayout

ENVIRONMENT = "EXPERT_SERVING_KERNELS"
PLAIN = "plain"
PATHS = ("avx512", "avx2", "portable")

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_logger = logging.getLogger(__name__)
_plain = False  # set by `forced` alone


class Layout(ctypes.Structure):
    """HlwqLayout of kernels.h: where a matrix lies, relative to its record."""

    _fields_ = (
        ("bits", c_int64),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("planes", c_int64 * 2),
        ("norms", c_int64),
        ("codebook", c_int64),
    )


class Grid(ctypes.Structure):
    """HlwqGrid of kernels.h: a `NearestCentroid`."""

    _fields_ = (
        ("codebook", c_void_p),
        ("thresholds", c_void_p),
        ("lowest", c_void_p),
        ("above", c_void_p),
        ("origin", c_float),
        ("inverse_cell", c_float),
        ("last_cell", c_int32),
        ("bits", c_int32),
    )


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are there and can work on these tensors."""
    return all(tensor.is_cpu for tensor in tensors) and _library() is not None


def path() -> str:
    """What computes on the CPU: one of PATHS, or "plain"."""
    library = _library()
    return PLAIN if library is None else str(library.hlwq_path().decode())


def set_threads(threads: int) -> None:
    """How many threads the kernels use from now on; as many as PyTorch at their first use, if never told."""
    library = _library()
    if library is not None:
        library.hlwq_set_threads(threads)


@contextmanager
def one_thread() -> Iterator[int]:
    """Kernels and PyTorch compute on the thread that calls them; gets how many PyTorch had."""
    library, before = _library(), torch.get_num_threads()
    kernels_before = 1 if library is None else library.hlwq_threads()
    set_threads(1)
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
        set_threads(kernels_before)


@contextmanager
def forced(kernels: str) -> Iterator[None]:
    """Compute on one of PATHS, or with the "plain" twins, in the whole process until the block ends.

    For tests and benchmarks. Raises ConfigError when this machine lacks the path.
    """
    global _plain
    before, was_plain = path(), _plain
    _plain = kernels == PLAIN
    try:
        if not _plain:
            _choose_path(_loaded(), kernels)
        yield
    finally:
        _plain = was_plain
        if before != PLAIN:
            _choose_path(_loaded(), before)


def layout_of(matrix: PackedMatrix, base: int | None = None) -> tuple[Layout, int]:
    """The layout of a matrix relative to an address, its first plane's by default; and that address."""
    base = matrix.planes[0].data_ptr() if base is None else base
    parts = [part for part in (*matrix.planes, matrix.norms, matrix.codebook) if part is not None]
    assert all(part.is_contiguous() for part in parts)
    planes = (c_int64 * 2)(*(plane.data_ptr() - base for plane in matrix.planes))
    norms, codebook = (
        0 if part is None else part.data_ptr() - base for part in (matrix.norms, matrix.codebook)
    )
    return Layout(matrix.bits, *matrix.shape, planes, norms, codebook), base


def record_layout(layout: MatrixLayout) -> Layout:
    """The layout of a matrix relative to the start of its record."""
    planes = (c_int64 * 2)(*(section.offset for section in layout.planes))
    norms, codebook = (
        0 if section is None else section.offset for section in (layout.norms, layout.codebook)
    )
    return Layout(layout.bits, layout.out_features, layout.in_features, planes, norms, codebook)


class Product:
    """x W'^T for one matrix, which it keeps: made once where it is used often."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix
        self._layout, self._base = layout_of(matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x.dtype; computed in float32."""
        rows = _rows(x)
        assert rows.shape[1] == self._layout.in_features
        y = torch.empty(rows.shape[0], self._layout.out_features)
        call("hlwq_product", self._layout, self._base, rows.data_ptr(), rows.shape[0], y.data_ptr())
        return _like(y, x)


class FeedForward:
    """down(relu(up(x))^2) for two matrices, which it keeps, in one call."""

    def __init__(self, up: PackedMatrix, down: PackedMatrix) -> None:
        self.matrices = up, down
        self._up, self._base = layout_of(up)
        self._down, _ = layout_of(down, self._base)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., hidden) to the same, in x.dtype; computed in float32."""
        rows = _rows(x)
        count = rows.shape[0]
        y = torch.empty(count, self._down.out_features)
        starts, pairs = np.array([0, count]), np.arange(count)
        experts(self._up, self._down, [self._base], starts, pairs, 1, rows, y)
        return _like(y, x)


def _rows(x: Tensor) -> Tensor:
    """x (..., columns) as contiguous rows of float32."""
    return x.reshape(-1, x.shape[-1]).float().contiguous()


def _like(y: Tensor, x: Tensor) -> Tensor:
    """y (rows, columns) in the form and type of x (..., any)."""
    y = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
    return y if x.dtype == y.dtype else y.to(x.dtype)


def decode(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """W' (out, in) in float32 or bfloat16; not for raw matrices."""
    layout, base = layout_of(matrix)
    weights = torch.empty(matrix.shape, dtype=dtype)
    call("hlwq_decode", layout, base, _TYPES[dtype], weights.data_ptr())
    return weights


def hadamard_transform(x: Tensor) -> Tensor:
    """H applied to each block of 128 of x float32, in new memory."""
    y = x.clone(memory_format=torch.contiguous_format)
    call("hlwq_hadamard", y.data_ptr(), y.numel() // 128)
    return y


def pack_planes(codes: Tensor, bits: int, planes: Sequence[Tensor]) -> None:
    codes = codes.contiguous()
    assert all(plane.is_contiguous() for plane in planes)
    call("hlwq_pack", codes.data_ptr(), *codes.shape, bits, _pointers(planes))


def unpack_planes(planes: Sequence[Tensor], columns: int, bits: int) -> Tensor:
    planes = [plane.contiguous() for plane in planes]
    codes = torch.empty(planes[0].shape[0], columns, dtype=torch.uint8)
    call("hlwq_unpack", _pointers(planes), codes.shape[0], columns, bits, codes.data_ptr())
    return codes


def unpack_run(rows: Tensor, bits: int, most_significant_first: bool) -> Tensor:
    rows = rows.contiguous()
    groups = rows.numel() // bits
    codes = torch.empty(rows.shape[0], rows.shape[1] * 8 // bits, dtype=torch.uint8)
    call("hlwq_unpack_run", rows.data_ptr(), groups, bits, most_significant_first, codes.data_ptr())
    return codes


def repack_run(
    rows: Tensor, width: int, most_significant_first: bool, bits: int, planes: Sequence[Tensor]
) -> None:
    """Rows of whole blocks of codes of `width` bits into planes of `bits`, which hold them."""
    rows = rows.contiguous()
    blocks = rows.numel() // (16 * width)
    call("hlwq_repack_run", rows.data_ptr(), blocks, width, most_significant_first, bits, _pointers(planes))


def quantize(
    weight: Tensor, nearest: NearestCentroid, shares: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """Codes uint8 (out, padded) and norms float16 (out, blocks) of W (out, in), a float of any type.

    None when a weight is not finite or a norm exceeds float16. Without `shares` norms are not fitted.
    """
    rows, columns = weight.shape
    weight = (weight if weight.dtype in _TYPES else weight.float()).contiguous()
    blocks = -(-columns // 128)
    codes = torch.empty(rows, blocks * 128, dtype=torch.uint8)
    norms = torch.empty(rows, blocks, dtype=torch.float16)
    parts = (nearest.codebook, nearest.midpoints, nearest.lowest, nearest.threshold)
    assert all(part.is_contiguous() for part in parts)
    bits = nearest.codebook.numel().bit_length() - 1
    grid = Grid(*(part.data_ptr() for part in parts), nearest.origin, 1 / nearest.cell, nearest.last, bits)
    tried = (c_float * len(shares))(*shares)
    matrix = (weight.data_ptr(), _TYPES[weight.dtype], rows, columns)
    good = call("hlwq_quantize", *matrix, grid, tried, len(shares), codes.data_ptr(), norms.data_ptr())
    return (codes, norms) if good else None


def experts(
    up: Layout,
    down: Layout,
    records: Sequence[int],
    starts: np.ndarray,
    pairs: np.ndarray,
    k: int,
    x: Tensor,
    products: Tensor,
) -> None:
    """products[p] = down(relu(up(x[p // k]))^2) for the pairs of each expert, at its record's address.

    Those of expert e are pairs[starts[e] : starts[e + 1]]; int64 both. x (rows, hidden) and products float32.
    """
    x = x.contiguous()
    assert products.is_contiguous() and pairs.dtype == starts.dtype == np.int64
    assert x.dtype == products.dtype == torch.float32 and len(starts) == len(records) + 1
    assert x.shape[1] == up.in_features == products.shape[1] == down.out_features
    assert up.out_features == down.in_features and products.shape[0] == x.shape[0] * k
    addresses = (c_void_p * len(records))(*records)
    call(
        "hlwq_experts", up, down, addresses, len(records), starts.ctypes.data, pairs.ctypes.data, k,
        x.data_ptr(), products.data_ptr(),
    )  # fmt: skip


def combine(products: Tensor, weights: Tensor) -> Tensor:
    """products (rows * k, hidden) weighted by weights (rows, k) and summed in rank order; float32 all."""
    (rows, k), hidden = weights.shape, products.shape[1]
    assert products.shape[0] == rows * k and products.dtype == weights.dtype == torch.float32
    products, weights = products.contiguous(), weights.contiguous()
    sums = torch.empty(rows, hidden)
    call("hlwq_combine", products.data_ptr(), weights.data_ptr(), rows, k, hidden, sums.data_ptr())
    return sums


class Done(c_int32):
    """The result of functions that return 0 where memory ran out: calls of them raise Exhausted then."""


def declare(name: str, arguments: list[Any], result: Any = None) -> None:
    """Give the signature of a function that another room adds to the library."""
    _SIGNATURES[name] = (result, arguments)
    if _loaded.cache_info().currsize and (library := _loaded()) is not None:
        _sign(library, name)


def function(name: str) -> Callable[..., Any]:
    """A function of the library, which must be usable."""
    library = _library()
    assert library is not None
    found: Callable[..., Any] = getattr(library, name)
    return found


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the library, which must be usable."""
    return function(name)(*arguments)


def _sign(library: ctypes.CDLL, name: str) -> None:
    signed = getattr(library, name)
    signed.restype, signed.argtypes = _SIGNATURES[name]
    if signed.restype is Done:
        signed.errcheck = _check_done


def _check_done(done: Done, *_: Any) -> None:
    if not done.value:
        raise Exhausted("there is not enough memory to compute with")


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "hlwq_path": (c_char_p, []),
    "hlwq_set_path": (c_int32, [c_char_p]),
    "hlwq_set_threads": (None, [c_int32]),
    "hlwq_threads": (c_int32, []),
    "hlwq_pack": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "hlwq_unpack": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "hlwq_unpack_run": (None, [c_void_p, c_int64, c_int64, c_int32, c_void_p]),
    "hlwq_repack_run": (None, [c_void_p, c_int64, c_int64, c_int32, c_int64, c_void_p]),
    "hlwq_hadamard": (None, [c_void_p, c_int64]),
    "hlwq_quantize": (
        c_int32,
        [c_void_p, c_int32, c_int64, c_int64, POINTER(Grid), c_void_p, c_int32, c_void_p, c_void_p],
    ),
    "hlwq_decode": (None, [POINTER(Layout), c_void_p, c_int32, c_void_p]),
    "hlwq_product": (Done, [POINTER(Layout), c_void_p, c_void_p, c_int64, c_void_p]),
    "hlwq_combine": (None, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "hlwq_experts": (
        Done,
        [
            POINTER(Layout),
            POINTER(Layout),
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
            c_int64,
            c_void_p,
            c_void_p,
        ],
    ),
}


def _library() -> ctypes.CDLL | None:
    return None if _plain else _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    """The compiled library with signatures, on the path that the environment names; None for the twins."""
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", PLAIN, *PATHS):
        raise ConfigError(f"{ENVIRONMENT} must be one of {PLAIN}, {', '.join(PATHS)}, not {wanted!r}")
    if wanted == PLAIN:
        return None
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        if wanted:
            raise ConfigError(f"{ENVIRONMENT}={wanted}: this installation has no native kernels")
        _logger.warning(
            "the native kernels were not built, so the CPU computes through PyTorch, many times slower; "
            "install a C++ compiler and install expert-serving again"
        )
        return None
    library = ctypes.CDLL(str(found[0]))
    for name in _SIGNATURES:
        _sign(library, name)
    if wanted:
        _choose_path(library, wanted)
    library.hlwq_set_threads(torch.get_num_threads())
    return library


def _choose_path(library: ctypes.CDLL | None, wanted: str) -> None:
    if library is None or not library.hlwq_set_path(wanted.encode()):
        raise ConfigError(f"the native kernels cannot run on path {wanted!r} here")
