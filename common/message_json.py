"""Protocol messages as JSON for people and scripts: every field, proto names, numbers as numbers.

(protobuf's own JSON writes 64-bit integers as strings.)
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.message import Message


def as_dict(message: Message) -> dict[str, Any]:
    """Every field, set or not; an unset sub-message appears with its defaults."""
    return {
        field.name: _plain(getattr(message, field.name), field.is_repeated)
        for field in message.DESCRIPTOR.fields
    }


def print_json(value: Message | dict[str, Any]) -> None:
    """One line on stdout."""
    print(json.dumps(as_dict(value) if isinstance(value, Message) else value, ensure_ascii=False))


def _plain(value: Any, repeated: bool) -> Any:
    if repeated:
        return [_plain(item, False) for item in value]
    return as_dict(value) if isinstance(value, Message) else value
