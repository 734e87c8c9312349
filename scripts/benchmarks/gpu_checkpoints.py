"""Checkpoints of the 30B's shape to measure on, made where none are given, and stores that have read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu_report import Report
from pair import Store, store_of
from synthetic import run_command

# How unevenly the experts of a made checkpoint are chosen: so that an LRU cache of 24 of 128 slots hits 70 %
# of the time, as in public traces of models with 128 experts. Simulated with tokens that know nothing of each
# other, lru and lfru hit 68 and 75 % at 24 slots, 76 and 81 % at 36, 79 and 84 % at 41; a worker that decoded
# with the first three such layers hit 71 and 76 % at 24, 80 and 84 % at 36. Of a token's choices 40 % are the
# next token's too; in the traces, 45 %.
SKEW = 1.25
PACKED = {"bits": 5, "dense_bits": 5}
REFERENCE = {"bits": 16, "dense_bits": 16}  # as the published method has it
_FILL_SECONDS = 900.0


@contextmanager
def given_or_made(given: Path | None, report: Report, **options: float) -> Iterator[Path]:
    """The checkpoint given, or else the full synthetic 30B, for the block's time; TMPDIR names another disk.

    `options` are those of `expert-store synth`.
    """
    if given is not None:
        yield given
        return
    with TemporaryDirectory() as directory:
        made = Path(directory) / "checkpoint"
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        report.note(f"making the synthetic 30B: {' '.join(map(str, words))}")
        run_command("expert-store", "synth", made, *words)
        yield made


@contextmanager
def full_store(checkpoint: Path, report: Report) -> Iterator[Store]:
    """A store that has read every expert, for the block's time."""
    report.note(f"starting the store on {checkpoint}")
    with TemporaryDirectory() as runtime, store_of(checkpoint, Path(runtime), (), _FILL_SECONDS) as store:
        store.wait_until_full(_FILL_SECONDS)
        report.note("the store has read every expert")
        yield store
