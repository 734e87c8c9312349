"""That the GPU's kernels compile for GPUs that no test runs on."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


def test_the_oldest_gpu_that_is_supported() -> None:
    """Every kernel of a decode step; all kernels, and newer GPUs, are for the script alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--steps-only", "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a warning is for those who start a worker, too"
    told = re.fullmatch(r"compute capability 8\.0: (\d+) kernels\n", done.stdout)
    assert told is not None and int(told[1]) > 20


def test_interpreted_kernels_are_not_counted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nothing is compiled under TRITON_INTERPRET=1\n"
