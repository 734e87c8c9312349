"""Damage to bytes and to JSON, as it happens and as it is meant."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 4095, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), 0.5, -0.0, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
_TEXTS = ("", "x", "\0", "é", "\ud800", "../../etc/passwd", "%s%n", "A" * 5000, "null", "-1", "🙂" * 50, "\n")


def some_bytes(draw: random.Random, most: int = 300) -> bytes:
    """Of lengths that are small more often than not."""
    return draw.randbytes(min(most, int(draw.paretovariate(0.5)) - 1))


def mutated(draw: random.Random, data: bytes) -> bytes:
    """One to four times damaged."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(_WAYS)(draw, data)
    return data


def number(draw: random.Random) -> int | float:
    return draw.choice(_NUMBERS)


def text(draw: random.Random) -> str:
    return draw.choice(_TEXTS)


def mutated_json(draw: random.Random, value: Any, times: int = 0) -> Any:
    """A value of the same kind with one to three places replaced, removed, repeated or deepened."""
    value = copy.deepcopy(value)
    for _ in range(times or draw.choice((1, 1, 2, 3))):
        holders = [holder for holder in _holders(value) if holder]
        if not holders:
            return _anything(draw)
        holder = draw.choice(holders)
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        way = draw.random()
        if way < 0.15:
            del holder[key]
        elif way < 0.25 and isinstance(holder, dict):
            holder[text(draw)] = holder[key]
        elif way < 0.3 and isinstance(holder, list):
            holder *= 2
        else:
            holder[key] = _anything(draw, holder[key])
    return value


def json_bytes(draw: random.Random, value: Any) -> bytes:
    """The value with a place of it changed, written down; sometimes the writing is damaged instead."""
    way = draw.random()
    if way < 0.3:
        return mutated(draw, json.dumps(value).encode())
    written = json.dumps(mutated_json(draw, value), ensure_ascii=draw.random() < 0.8)
    data = written.encode(errors="surrogatepass")
    if way < 0.35:  # deeper than any reader goes
        place = draw.choice([n for n, byte in enumerate(data) if byte in b"[{:,"] or [0]) + 1
        return data[:place] + draw.choice((b"[", b'{"x":')) * 30_000 + data[place:]
    return data


def _anything(draw: random.Random, old: Any = None) -> Any:
    if isinstance(old, (int, float)) and not isinstance(old, bool) and draw.random() < 0.3:
        return old + draw.choice((-1, 1))
    if isinstance(old, str) and draw.random() < 0.2:
        return old * 3
    return draw.choice((None, True, number(draw), text(draw), [], {}, [old], {"x": old}))


def _holders(value: Any) -> list[Any]:
    """The value and all within it that hold others."""
    if not isinstance(value, (dict, list)):
        return []
    within = value.values() if isinstance(value, dict) else value
    return [value, *(holder for one in list(within)[:200] for holder in _holders(one))]


def _flip(draw: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def _replace(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data) + 1)
    size = draw.choice((1, 2, 4, 8))
    value = draw.choice((0, 1, 127, 128, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
    return data[:start] + (value % 256**size).to_bytes(size, "little") + data[start + size :]


def _cut(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _remove(draw: random.Random, data: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _insert(draw: random.Random, data: bytes) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + some_bytes(draw, 40) + data[place:]


def _repeat(draw: random.Random, data: bytes) -> bytes:
    start, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] + data[end:]


_WAYS = (_flip, _flip, _replace, _cut, _remove, _insert, _repeat)
