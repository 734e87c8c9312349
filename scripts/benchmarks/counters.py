"""Counters out of the processes' own messages, whatever these have: numbers by name, and sums of them.

Nothing here knows a counter: one that is added to proto/ appears in what is made of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from common.message_json import as_dict

Counters = dict[str, float]

SECONDS = "_seconds"
# Endings of what is a ratio or a state, which neither sums nor differences say anything of.
_NOT_ADDITIVE = (
    "_rate", "_per_second", "uptime_seconds", "frames", "running", "waiting", "resident_bytes",
)  # fmt: skip


def counters(message: Message) -> Counters:
    """The message's numbers that may be added up, those of the messages inside it as well."""
    return dict(_numbers(as_dict(message)))


def difference(after: Counters, before: Counters) -> Counters:
    """What happened in between. What did not change is left out, as sizes are, unless it is a time."""
    return {
        name: value - before[name]
        for name, value in after.items()
        if value != before[name] or name.endswith(SECONDS)
    }


def total(several: Iterable[Counters]) -> Counters:
    sums: Counters = {}
    for some in several:
        for name, value in some.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _numbers(fields: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif type(value) in (int, float) and not name.endswith(_NOT_ADDITIVE):  # a bool is neither
            yield name, value
