"""No time limit depends on the wall clock, which jumps: what is computed or compared is monotonic time."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
# Spans are shown by the time of day: their monotonic times are moved to it.
ALLOWED = {"common/tracing.py"}


def wall_clock_sums(tree: ast.AST) -> Iterator[int]:
    """Lines where a wall-clock time is added to, subtracted from or compared with something."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.Compare)):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and tuple(ast.unparse(call.func).split(".")[-2:]) in WALL:
                    yield call.lineno


@pytest.mark.parametrize("room", ["common", "expert_store", "gpu_worker"])
def test_time_limits_are_monotonic(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if str(path.relative_to(ROOT)) not in ALLOWED:
            found = list(wall_clock_sums(ast.parse(path.read_text())))
            assert not found, f"{path}:{found[0]} reckons with the wall clock"


def test_what_is_looked_for_is_found() -> None:
    assert list(wall_clock_sums(ast.parse("import time\ndeadline = time.time() + 5"))) == [2]
    assert list(wall_clock_sums(ast.parse("created = int(time.time())\nlimit = time.monotonic() + 5"))) == []
