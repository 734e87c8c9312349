"""Tests on every path of the native kernels that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from common.errors import ConfigError
from common.hlwq import native


@contextmanager
def forced_or_skipped(path: str) -> Iterator[str]:
    """The kernels by this path; a processor that lacks it skips the test."""
    context = native.forced(path)
    try:
        context.__enter__()
    except ConfigError:
        pytest.skip(f"this processor has no {path}")
    try:
        yield path
    finally:
        context.__exit__(None, None, None)
