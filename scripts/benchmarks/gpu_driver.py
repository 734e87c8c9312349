"""What the GPU's driver says, asked without a CUDA context, which would take memory itself."""

from __future__ import annotations

import subprocess


def device_name() -> str | None:
    """None without a GPU, or without nvidia-smi."""
    return _ask("name")


def device_bytes() -> int | None:
    """Memory in use, by whatever process; None without a GPU."""
    mebibytes = _ask("memory.used")
    return None if mebibytes is None else int(mebibytes) << 20


def _ask(what: str) -> str | None:
    """Of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
