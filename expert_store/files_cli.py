"""`expert-store pack | inspect | verify`: the commands that work on checkpoint files and start no process.

Parses and prints; errors are raised for the main command line to show. Everything that needs PyTorch is
imported inside the commands: help should not wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from common.errors import ConfigError
from common.options import check_bits_option
from common.units import format_bytes
from expert_store.config import DEMO

if TYPE_CHECKING:
    from common.checkpoint.plan import BitPlan
    from common.checkpoint.source import WeightSource
    from expert_store.calibration import TextCalibration


class Codebook(str, Enum):
    """The names of `common.checkpoint.packing.CODEBOOKS`, which help should not have to import."""

    CONVERGED = "converged"
    PUBLISHED = "published"


def _directory(text: str) -> Path:
    """Nothing is downloaded to be looked at, and what is refused does not wait for PyTorch."""
    if text == DEMO:
        from expert_store.models import locate_model

        return locate_model(DEMO).directory
    if not Path(text).is_dir():
        raise typer.BadParameter(f"{text} is no directory")
    return Path(text)


CheckpointDirectory = Annotated[
    Path, typer.Argument(help="A checkpoint's directory, or 'demo'.", metavar="DIR", parser=_directory)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the store's command line."""
    app.command("pack")(pack)
    app.command("inspect")(inspect)
    app.command("verify")(verify)


def pack(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint's directory, a Hugging Face id, or 'demo'.", metavar="SRC"),
    ],
    destination: Annotated[Path, typer.Argument(help="The directory to make.", metavar="DST")],
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits per weight of the routed experts: 2, 3, 4, 5, 6, 8, or 16 for bfloat16 as it is; "
            "default: what SRC has if it is quantized, else 5.",
            callback=check_bits_option,
        ),
    ] = None,
    dense_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of the dense matrices (attention, Mamba and shared experts' projections, lm_head); "
            "default: what SRC has, which is 16 (not packed) unless it is quantized.",
            callback=check_bits_option,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help='Bits matrix by matrix: a JSON file like {"*.experts.*.up_proj": 3, "lm_head": 6}. The last '
            "pattern that fits a name counts, and comes before --bits and --dense-bits.",
            metavar="FILE",
        ),
    ] = None,
    codebook: Annotated[
        Codebook | None,
        typer.Option(
            help="What the codes of newly quantized matrices stand for. converged, the default: the values "
            "of the smallest error. published: those that layouts without a codebook imply, for `unpack "
            "--layout hlwq-q5`; the error is larger, by 3 % at 5 bits. Codes that SRC has keep theirs.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Round for what the model sees of this text, at most 32,768 tokens of it; takes longer.",
            metavar="TEXT",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Pack SRC into DST, the form that experts are served in.

    Routed experts are quantized (HLWQ, 5 bits by default: 3.1 times smaller
    than bfloat16). All other weights, the tokenizer and the chat template are
    copied. DST appears when it is complete and must not exist before.

    The model may be larger than memory. After an interruption or on a disk
    that was full, the same command goes on where it stopped; until then, what
    is finished is kept in DST.partial.

    SRC may be packed or quantized already, in any layout that HLWQ checkpoints
    are published in: matrices that keep their bits keep their codes.

    --calibrate runs the model over a text like those it will serve, block by
    block, and rounds each matrix so that its outputs err least on the inputs
    that it got: same size, same speed when served, a smaller error.

    `start` packs by itself what is not packed: this command is for keeping
    or moving the result.

    Example: expert-store pack ~/models/nemotron ~/models/nemotron-q5 --bits 5
    """
    from common.checkpoint import open_checkpoint, packed_writer
    from common.checkpoint.plan import make_plan, read_recipe
    from expert_store.models import locate_model
    from expert_store.progress_bar import progress_bar

    location = locate_model(source)
    checkpoint = open_checkpoint(location.directory)
    plan = make_plan(checkpoint, bits, dense_bits, read_recipe(recipe) if recipe else None)
    if codebook is not None:
        _check_codebook(checkpoint, plan)
    with _calibration(calibrate, checkpoint, plan, destination) as calibration:
        details = {"calibration": calibration.description} if calibration else None
        with progress_bar(Console(stderr=True), f"packing {location.name} at {plan.describe()}") as progress:
            packed = packed_writer.pack(
                checkpoint,
                destination,
                plan,
                progress,
                location.name,
                details,
                calibration,
                (codebook or Codebook.CONVERGED).value,
            )
    size = format_bytes(sum(entry.bytes for entry in packed.manifest.files.values()))
    rounded = f", rounded for {details['calibration']}" if details else ""
    typer.echo(f"{destination}: {packed.num_experts} experts at {plan.describe()}{rounded}, {size} in all")


def _check_codebook(checkpoint: WeightSource, plan: BitPlan) -> None:
    """Refuse to choose a codebook that no matrix would get, which nobody would notice before it matters."""
    from common.checkpoint.plan import kept_codes

    if False not in kept_codes(checkpoint, plan):
        raise ConfigError(
            "there is nothing to choose a codebook for: no matrix is quantized anew, and codes that SRC has "
            "keep theirs; pack the original, or choose other bits"
        )


@contextmanager
def _calibration(
    text: Path | None, checkpoint: WeightSource, plan: BitPlan, destination: Path
) -> Iterator[TextCalibration | None]:
    """What the model sees of the text, if there is one, with a progress bar."""
    if text is None:
        yield None
        return
    from common.checkpoint.partial import check_absent
    from expert_store.calibration import calibrated, read_text
    from expert_store.progress_bar import progress_bar

    check_absent(destination)  # now, and not after minutes
    tokens = read_text(text, checkpoint.directory)
    with ExitStack() as stack:
        with progress_bar(Console(stderr=True), f"reading {tokens.tokens} tokens of {text}") as progress:
            calibration = stack.enter_context(calibrated(checkpoint, plan, tokens, destination, progress))
        yield calibration


def inspect(
    directory: CheckpointDirectory,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    errors: Annotated[
        bool, typer.Option("--errors", help="Also how far its matrices are from the original's; reads both.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="The original for --errors: a directory, a Hugging Face id, or 'demo'; default: what DIR was"
            " packed from, if that lies beside it or is the demo.",
            metavar="SRC",
        ),
    ] = None,
) -> None:
    """Show what a checkpoint is: architecture, parameters, bytes, bits, source.

    Works for packed and unpacked checkpoints. Reads headers only, so it is
    quick at any size; --errors reads every matrix.

    Example: expert-store inspect ~/models/nemotron-q5 --errors --against ~/models/nemotron
    """
    from expert_store.inspect import as_table, describe

    if against is not None and not errors:
        raise typer.BadParameter("--against goes with --errors")
    description = describe(directory)
    report = _errors(directory, against) if errors else None
    if as_json:
        typer.echo(json.dumps(description | ({"errors": report} if report else {})))
        return
    Console().print(as_table(description))
    if report:
        from expert_store.error_report import errors_table

        # A pipe has no width, and names that are cut off are of no use to whoever reads it.
        Console(width=None if sys.stdout.isatty() else 160).print(errors_table(report))


def _errors(directory: Path, against: str | None) -> dict[str, Any]:
    """The report of errors, with a progress bar."""
    from common.checkpoint import open_checkpoint
    from expert_store.error_report import find_source, measure
    from expert_store.models import locate_model
    from expert_store.progress_bar import progress_bar

    checkpoint = open_checkpoint(directory)
    original = open_checkpoint(locate_model(against).directory) if against else find_source(checkpoint)
    with progress_bar(Console(stderr=True), f"comparing with {original.directory}") as progress:
        return measure(checkpoint, original, progress)


def verify(directory: CheckpointDirectory) -> None:
    """Read every byte of a checkpoint and compare it with what is known of it.

    A packed checkpoint has checksums. Any other is read as packing would read
    it: codes must be in range, codebooks ascend, norms and weights be finite.

    Ends with OK, or lists what is damaged and exits with status 1.

    Example: expert-store verify ~/models/nemotron-q5
    """
    from common.checkpoint import is_packed

    damaged, found = _verify_packed(directory) if is_packed(directory) else _verify_published(directory)
    for line in damaged:
        typer.echo(line)
    if damaged:
        raise typer.Exit(1)
    typer.echo(f"OK: {found}")


def _verify_packed(directory: Path) -> tuple[list[str], str]:
    """What is damaged, and what was compared."""
    from common.checkpoint import PackedCheckpoint
    from common.checkpoint.manifest import Manifest
    from expert_store.progress_bar import progress_bar

    manifest = Manifest.read(directory)
    with progress_bar(Console(stderr=True), f"verifying {directory.name}") as progress:
        damaged = manifest.damaged_files(directory, progress)
    if not damaged:
        PackedCheckpoint.open(directory)  # files as they were written may still not fit each other
    return damaged, f"{len(manifest.files)} files, fingerprint {manifest.fingerprint[:16]}"


def _verify_published(directory: Path) -> tuple[list[str], str]:
    """What is damaged, and what was read."""
    from common.checkpoint import HuggingFaceCheckpoint
    from common.checkpoint.damage import damaged_weights
    from expert_store.progress_bar import progress_bar

    checkpoint = HuggingFaceCheckpoint.open(directory)
    with progress_bar(Console(stderr=True), f"verifying {directory.name}") as progress:
        damaged = damaged_weights(checkpoint, progress)
    return damaged, f"{len(checkpoint.sizes)} weights can be read (there are no checksums to compare)"
