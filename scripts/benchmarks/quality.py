"""What packing costs the demo model in quality, plain and calibrated, at several numbers of bits.

    scripts/quality [--bits 3 4 5] [--dense]

Calibrates on modules of the standard library, and measures on others: library modules, which the model was
trained on as well, and test modules, which it never saw. Of the routed experts' output the relative error,
layer by layer, on the test modules' inputs in the unpacked model; of the whole system, served by both
processes, perplexity, and how far the log-probability of a token is from the unpacked model's (root mean
square).

The demo model is too sure of itself on text that it was not trained on, where a little noise may lower its
perplexity: there the last column says more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pair import served
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.checkpoint import HuggingFaceCheckpoint, PackedCheckpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.checkpoint.source import WeightSource
from common.hlwq.planes import RAW_BITS
from expert_store.block_forward import forward, routed_output
from expert_store.calibration import calibrated, read_text
from expert_store.config import DEMO
from expert_store.models import locate_model

CALIBRATION, LIBRARY, TESTS = "calibration", "library", "tests"
SIZES = {CALIBRATION: 250_000, LIBRARY: 150_000, TESTS: 150_000}  # bytes of text
WINDOW = 2048


@dataclass(frozen=True)
class Quality:
    """One way of packing, measured."""

    bits: int
    calibrated: bool
    output_error: float
    perplexity: dict[str, float]
    logprob_change: dict[str, float]


class OutputErrors:
    """An `Observer` that sends what a layer's experts get through those of packed checkpoints as well."""

    def __init__(self, source: WeightSource, packed: list[PackedCheckpoint]) -> None:
        self._source, self._packed = source, packed
        self._errors: list[list[float]] = [[] for _ in packed]

    def dense(self, name: str, inputs: Tensor) -> None: ...

    def block_done(self) -> None: ...

    def routed(self, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor) -> None:
        expected = routed_output(self._source, layer, inputs, choices, weights)
        for errors, packed in zip(self._errors, self._packed, strict=True):
            output = routed_output(packed, layer, inputs, choices, weights)
            errors.append(float((output - expected).norm() / expected.norm()))

    def means(self) -> list[float]:
        """Over all layers, checkpoint by checkpoint."""
        return [sum(errors) / len(errors) for errors in self._errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--dense", action="store_true", help="dense matrices at the same bits, too")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        texts = write_texts(args.stdlib, Path(directory))
        results = measure(args.bits, args.dense, texts, Path(directory))
    Console(width=None if sys.stdout.isatty() else 160).print(table(results))
    print(json.dumps([asdict(result) for result in results]))


def write_texts(stdlib: Path, directory: Path) -> dict[str, Path]:
    """A file of each kind of text, of modules in an order that their names alone decide."""

    def shuffled(paths: Iterable[Path]) -> list[Path]:
        return sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())

    library = iter(shuffled(stdlib.glob("*.py")))
    modules = {CALIBRATION: library, LIBRARY: library, TESTS: iter(shuffled(stdlib.glob("test/test_*.py")))}
    texts = {}
    for kind, paths in modules.items():
        content = ""
        while len(content) < SIZES[kind] and (path := next(paths, None)):
            content += path.read_text(encoding="utf-8", errors="replace")
        if len(content) < SIZES[kind]:
            raise SystemExit(f"{stdlib} has too few {kind} modules; name another with --stdlib")
        texts[kind] = directory / f"{kind}.txt"
        texts[kind].write_text(content[: SIZES[kind]])
    return texts


def measure(widths: list[int], dense: bool, texts: dict[str, Path], directory: Path) -> list[Quality]:
    """The unpacked model first, then each number of bits plain and calibrated."""
    source = HuggingFaceCheckpoint.open(locate_model(DEMO).directory)
    variants = [(RAW_BITS, False), *((bits, way) for bits in widths for way in (False, True))]
    packed = []
    for bits, is_calibrated in variants:
        destination = directory / f"{bits}-{is_calibrated}"
        packed.append(
            packed_demo(source, bits, dense, texts[CALIBRATION] if is_calibrated else None, destination)
        )
    tokens = read_text(texts[TESTS], source.directory)
    observer = OutputErrors(source, packed)
    forward(source, tokens.windows, observer, lambda done, total: None)
    scores = [logprobs(checkpoint, texts, directory) for checkpoint in packed]
    return [
        Quality(bits, is_calibrated, error, perplexities(score), changes(score, scores[0]))
        for (bits, is_calibrated), error, score in zip(variants, observer.means(), scores, strict=True)
    ]


def packed_demo(
    source: HuggingFaceCheckpoint, bits: int, dense: bool, text: Path | None, destination: Path
) -> PackedCheckpoint:
    plan = make_plan(source, bits, bits if dense else None)
    silent = lambda done, total: None  # noqa: E731
    if text is None:
        return pack(source, destination, plan, silent)
    tokens = read_text(text, source.directory)
    with calibrated(source, plan, tokens, destination, silent) as calibration:
        return pack(source, destination, plan, silent, calibration=calibration)


def logprobs(checkpoint: PackedCheckpoint, texts: dict[str, Path], runtime: Path) -> dict[str, Tensor]:
    """Of every token after the first of both texts that are measured on, by the worker."""
    found = {}
    with served(checkpoint.directory, runtime) as pair:
        for kind in (TESTS, LIBRARY):
            pieces = pair.client.score(texts[kind].read_text(), WINDOW, WINDOW)
            found[kind] = torch.tensor([value for event in pieces for value in event.piece.logprobs])
    return found


def perplexities(score: dict[str, Tensor]) -> dict[str, float]:
    return {kind: math.exp(-float(values.mean())) for kind, values in score.items()}


def changes(score: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, float]:
    return {kind: float((values - before[kind]).square().mean().sqrt()) for kind, values in score.items()}


def table(results: list[Quality]) -> Table:
    made = Table(title="the demo model; test modules are new to it, library modules are not")
    for column in ("bits", "rounded", "error of outputs", "perplexity: tests", "library"):
        made.add_column(column, justify="right")
    made.add_column("change of log-probabilities: tests", justify="right")
    made.add_column("library", justify="right")
    for result in results:
        rounded = "-" if result.bits == RAW_BITS else "calibrated" if result.calibrated else "plain"
        made.add_row(
            str(result.bits), rounded, f"{result.output_error:.4f}",
            *(f"{result.perplexity[kind]:.4f}" for kind in (TESTS, LIBRARY)),
            *(f"{result.logprob_change[kind]:.4f}" for kind in (TESTS, LIBRARY)),
        )  # fmt: skip
    return made


if __name__ == "__main__":
    main()
