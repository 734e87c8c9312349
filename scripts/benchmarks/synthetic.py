"""Synthetic checkpoints in the 30B's real widths, reduced in blocks, experts or vocabulary.

Made in a temporary directory (TMPDIR names another disk) and removed afterwards. Weights are random, so
whatever is measured on one carries SYNTHETIC in its name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.checkpoint.packed import PackedCheckpoint
from expert_store.synth.shapes import NEMOTRON_30B, SHAPES

HIDDEN, INTERMEDIATE = (SHAPES[NEMOTRON_30B][name] for name in ("hidden_size", "moe_intermediate_size"))
SYNTHETIC = "(synthetic)"
COMMANDS = Path(sys.executable).parent


@contextmanager
def synthetic_checkpoint(pattern: str, **options: int) -> Iterator[PackedCheckpoint]:
    """A packed checkpoint of these blocks; `options` are those of `expert-store synth`."""
    with TemporaryDirectory() as directory:
        packed = Path(directory) / "packed"
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        run_command("expert-store", "synth", packed, "--pattern", pattern, *words)
        yield PackedCheckpoint.open(packed)


def marked(what: str, checkpoint: PackedCheckpoint) -> str:
    """The name of a figure measured on this checkpoint."""
    return f"{what} {SYNTHETIC}" if checkpoint.synthetic else what


def run_command(command: str, *words: object) -> None:
    """One of this installation's commands, to its end."""
    subprocess.run([str(COMMANDS / command), *map(str, words)], check=True, stdout=subprocess.DEVNULL)
