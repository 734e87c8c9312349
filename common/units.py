"""Sizes in bytes as people write and read them: `7.6GB`, `12GiB`, `512MB`."""

from __future__ import annotations

import re

from common.errors import ConfigError

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _FACTORS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1000**_power}


def parse_size(text: str) -> int:
    """Bytes; raises ConfigError for anything that is no positive size."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not a size; write it like 7.6GB, 12GiB or 512MB")
    size = int(float(match[1]) * factor)
    if size < 1:
        raise ConfigError(f"the size {text!r} is less than one byte")
    return size


def format_bytes(count: float) -> str:
    """Decimal units with three digits: 6.50 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
