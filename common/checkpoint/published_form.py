"""In which published HLWQ layout a matrix is stored, told from its tensors' names, dtypes and shapes.

Reads headers only. Refuses, naming the tensor, what no layout explains: parts that are missing or too many,
sizes that fit neither each other nor the model, bits and block sizes that are not supported.
"""

from __future__ import annotations

from typing import NamedTuple

from common.checkpoint.names import Shape
from common.checkpoint.polar_config import Claims, matrix_name
from common.checkpoint.shards import Place
from common.errors import CheckpointError
from common.hlwq.planes import BLOCK, PLANE_WIDTHS, padded

INT8, NIBBLES, Q5 = "int8", "nibbles", "Q5 packed"
HLWQ, DOUBLE_UNDERSCORE = "HLWQ packed", "double underscore"

_CODES_PARTS, _HLWQ_PARTS = ("codes", "norms"), ("packed", "norms", "meta")
_CODEBOOKS = ("ct", "ct_scaled")
_BYTE = 8  # bits that a code takes where it has a byte of its own


class Form(NamedTuple):
    """One matrix on disk: its layout and its tensors."""

    layout: str
    shape: tuple[int, int]  # (out_features, in_features)
    codes: Place
    norms: Place
    codebooks: dict[str, Place]  # by part, `ct` or `ct_scaled`; empty where the published one is implied
    meta: Place | None
    width: int  # bits that each code takes in `codes`
    bits: int | None  # bits of the codes; None where only the codes themselves can tell

    @property
    def places(self) -> list[Place]:
        """All its tensors."""
        meta = [] if self.meta is None else [self.meta]
        return [self.codes, self.norms, *self.codebooks.values(), *meta]


def part_of(name: str) -> tuple[str, str] | None:
    """The canonical name of the quantized matrix that tensor `name` belongs to, and which part it is."""
    matrix, _, part = name.replace("__", ".").rpartition(".")
    if part in (*_CODES_PARTS, *_CODEBOOKS) or (part in _HLWQ_PARTS and matrix.endswith(".weight")):
        return matrix_name(matrix), part
    return None


def tell_form(parts: dict[str, Place], shape: Shape, claims: Claims) -> Form:
    """The form of the matrix of `shape` that these parts make; raises CheckpointError naming the tensor."""
    _check_complete(parts)
    packed = "packed" in parts
    codes, norms, meta = parts["packed" if packed else "codes"], parts["norms"], parts.get("meta")
    if len(shape) != 2:
        raise codes.refusal(f"belongs to a matrix, but the model needs a tensor of shape {list(shape)}")
    if claims.block_size not in (None, BLOCK):
        raise codes.refusal(f"has blocks of {claims.block_size} by polar_config.json; only {BLOCK} is read")
    rows, blocks = shape[0], padded(shape[1]) // BLOCK
    _check(norms, ("F16",), [(rows, blocks), (rows * blocks,)], f"{list(shape)} in blocks of {BLOCK}")
    layout, width = _packed_form(codes, rows * blocks) if packed else _codes_form(codes, rows, blocks)
    if meta is not None:
        _check(meta, ("I32", "I64"), [(4,), (5,)], "its matrix")
    codebooks = {part: parts[part] for part in _CODEBOOKS if part in parts}
    bits = _bits(codes, list(codebooks.values()), claims, width, packed)
    return Form(layout, (rows, shape[1]), codes, norms, codebooks, meta, width, bits)


def checked_bits(place: Place, bits: object, origin: str, width: int) -> int:
    """`bits` if codes can have as many; raises CheckpointError with what told them, `origin`."""
    if not isinstance(bits, int) or bits not in PLANE_WIDTHS:
        allowed = ", ".join(map(str, PLANE_WIDTHS))
        raise place.refusal(f"has codes of {bits} bits by {origin}; only {allowed} can be read")
    if bits > width:
        raise place.refusal(f"has codes of {bits} bits by {origin}, but only {width} bits for each")
    return bits


def _check_complete(parts: dict[str, Place]) -> None:
    """One layout's parts, and all of them; a codebook may come with any."""
    names = [place.name for place in parts.values()]
    packed = parts.keys() & {"packed", "meta"}
    if packed and "codes" in parts:
        raise CheckpointError(
            f"{parts['codes'].file.path}: two layouts of one matrix, {', '.join(names)}: remove one"
        )
    needed = _HLWQ_PARTS if packed else _CODES_PARTS
    missing = [part for part in needed if part not in parts]
    if missing:
        place = next(parts[part] for part in (*needed, *parts) if part in parts)
        raise place.refusal(f"is there without the matrix's {' and '.join(missing)}: complete the download")


def _codes_form(codes: Place, rows: int, blocks: int) -> tuple[str, int]:
    """Layout and bits a code takes, of codes in rows."""
    columns = blocks * BLOCK
    forms: dict[Shape, int] = {(rows, columns): _BYTE, (rows, columns // 2): 4, (rows, columns * 5 // 8): 5}
    _check(codes, ("I8", "U8"), list(forms), f"{rows} rows of {columns} codes of 8, 4 or 5 bits")
    width = forms[codes.info.shape]
    if width == _BYTE:
        return DOUBLE_UNDERSCORE if codes.name.endswith("__codes") else INT8, width
    _check(codes, ("U8",), list(forms), "packed codes")
    return {4: NIBBLES, 5: Q5}[width], width


def _packed_form(codes: Place, blocks: int) -> tuple[str, int]:
    """Layout and bits a code takes, of all codes in one run of bytes."""
    forms: dict[Shape, int] = {(blocks * BLOCK * bits // 8,): bits for bits in range(1, 9)}
    _check(codes, ("U8",), list(forms), f"{blocks * BLOCK} codes in whole bits")
    return HLWQ, checked_bits(codes, forms[codes.info.shape], "the number of its bytes", _BYTE)


def _bits(codes: Place, codebooks: list[Place], claims: Claims, width: int, packed: bool) -> int | None:
    """Bits by the codebook's length, else by polar_config.json, else by the bytes a code takes."""
    lengths = [_codebook_bits(place) for place in codebooks]
    if lengths:
        if len(set(lengths)) > 1:
            raise codebooks[0].refusal(f"and {codebooks[1].name} are codebooks of different lengths")
        bits = checked_bits(codebooks[0], lengths[0], "its length", width)
    elif claims.bits is not None:
        bits = checked_bits(codes, claims.bits, "polar_config.json", width)
    else:
        return None if width == _BYTE and not packed else width
    if packed and bits != width:
        raise codes.refusal(f"takes {width} bits a code, which contradicts codes of {bits} bits")
    return bits


def _codebook_bits(place: Place) -> int:
    _check(place, ("F32",), [(1 << bits,) for bits in range(1, 9)], "codes of whole bits")
    return place.info.shape[0].bit_length() - 1


def _check(place: Place, dtypes: tuple[str, ...], shapes: list[Shape], of: str) -> None:
    """The tensor has one of these dtypes and shapes."""
    if place.info.dtype not in dtypes:
        raise place.refusal(f"is stored as {place.info.dtype}, which is not {' or '.join(dtypes)}")
    if place.info.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise place.refusal(f"has shape {list(place.info.shape)}, but {of} needs {allowed}")
