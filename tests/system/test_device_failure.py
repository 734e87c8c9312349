"""A GPU that fails while a worker serves: it ends in one line, its caller is told, its store goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.errors import Unavailable
from tests.system.processes import READY, Pair

# The worker as it is, but for a device that fails at the second token, and at whatever is asked of it then.
BROKEN = """#!{python}
import torch
from gpu_worker.cli import main
from gpu_worker.engine import Engine

def fail(self, *args):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nand more lines")

Engine.decode = Engine.close = fail
main()
"""


def test_a_failed_device_ends_the_worker_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    program = tmp_path / "broken-worker"
    program.write_text(BROKEN.format(python=sys.executable))
    program.chmod(0o700)
    pair.start_store()
    broken = pair._start(pair.worker_address, str(program), "start", "--device", "cpu")
    with pytest.raises(Unavailable, match="an illegal memory access was encountered'; this worker ends"):
        pair.generate([1, 2, 3], 5)
    assert broken.popen.wait(READY) == 70
    lines = [line for line in broken.log.read_text().splitlines() if "illegal memory access" in line]
    of_the_device, of_the_request = lines
    assert " C " in of_the_device and "3 + 1 tokens" in of_the_request
    assert "Traceback" not in broken.log.read_text()
    assert pair.store_stats().ready_frames and not pair.store_stats().leases
