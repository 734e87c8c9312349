"""JSON that others wrote: files, requests. What cannot be read is a ValueError, whatever is wrong with it."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`, with a ValueError for text that is nested too deep as well."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
