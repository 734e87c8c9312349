"""Scripts that answer in JSON from a process of their own, whose memory and death are theirs alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from pair import Ended, stop

_HERE = Path(__file__).parent


def answers(script: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that a script beside this one prints, a line each, as they come.

    It gets `options` as JSON. Raises Ended, with what it wrote to stderr, when it fails.
    """
    command = [sys.executable, str(_HERE / script), json.dumps(options)]
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
            if status := process.wait():
                errors.seek(0)
                raise Ended(f"{errors.read()}\n{script} ended with status {status}")
        finally:
            stop(process)
