"""How a process logs: lines of text for people, or lines of JSON for what collects them.

Every line says for which requests the work was that it tells of (`common.origin`), if it was for any. Further
fields are given as `extra=fields(...)`: in JSON they stand by their names; a text's message says what people
want of them.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

from common import origin

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
_TEXT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_FIELDS = "fields"  # the attribute of a record


def configure(level: str, form: str = TEXT) -> None:
    """Log to stderr, from `level` on, whatever was configured before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form == JSON else _TextLines(_TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """For `extra`."""
    return {_FIELDS: values}


def printable(text: str) -> str:
    """What others have written, for a line of text: neither more lines of it nor sequences for terminals."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class _TextLines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        ids = _request_ids(record)
        return f"{line} [{ids}]" if ids else line


class _JsonLines(logging.Formatter):
    """One object a line: time, level, logger, message, and what there is of request_id, fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if ids := _request_ids(record):
            entry["request_id"] = ids
        entry |= getattr(record, _FIELDS, {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, ensure_ascii=False, default=str)


def _request_ids(record: logging.LogRecord) -> str:
    """Of the work that is logged; the handler runs where it was done."""
    named = getattr(record, _FIELDS, {}).get("request_id")
    return named or ",".join(origin.current().requests)
