"""`expert-store synth`: the command that makes synthetic checkpoints. Parses and prints.

What needs PyTorch is imported inside the command: help should not wait for it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.options import check_bits_option
from common.units import format_bytes


def register(app: typer.Typer) -> None:
    """Add the command to the store's command line."""
    app.command("synth")(synth)


def synth(
    destination: Annotated[Path, typer.Argument(help="The directory to make.", metavar="DST")],
    shape: Annotated[
        str, typer.Option(help="The architecture whose sizes it has: nemotron-cascade-2-30b-a3b.")
    ] = "nemotron-cascade-2-30b-a3b",
    blocks: Annotated[int | None, typer.Option(help="Only the first so many blocks.", min=1)] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Other blocks, a letter each, like MEM*E: M Mamba-2, E experts, * attention, - MLP."
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Routed experts of a layer.", min=1)] = None,
    vocab: Annotated[int | None, typer.Option(help="Size of the vocabulary.", min=1)] = None,
    bits: Annotated[
        int,
        typer.Option(
            help="Bits per weight of the routed experts: 2, 3, 4, 5, 6, 8 or 16.", callback=check_bits_option
        ),
    ] = 5,
    dense_bits: Annotated[
        int,
        typer.Option(
            help="Bits of the dense matrices (projections and lm_head); 16: not packed.",
            callback=check_bits_option,
        ),
    ] = 16,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.", min=0)] = 0,
    skew: Annotated[
        float,
        typer.Option(
            help="How unevenly experts are chosen: popularity falls with rank to this power; 0: evenly.",
            min=0.0,
            max=4.0,
        ),
    ] = 0.0,
) -> None:
    """Make DST, a packed checkpoint of random weights in a real model's shape.

    For trying and measuring a large model without downloading it: sizes,
    formats and speed are real, what it says is noise. Activations are finite
    and experts are as popular as --skew says. It is marked synthetic wherever
    its name is shown.

    The whole model takes 24 GB of disk; --blocks or --pattern, --experts and
    --vocab make smaller ones.

    Example: expert-store synth /tmp/small --pattern "MEM*E" --vocab 8192
    """
    from expert_store.progress_bar import progress_bar
    from expert_store.synth.shapes import SHAPES, config_json
    from expert_store.synth.source import Synthesis, synthesize

    if shape not in SHAPES:
        raise typer.BadParameter(f"unknown --shape {shape!r}; one of {', '.join(SHAPES)}")
    if blocks is not None and pattern is not None:
        raise typer.BadParameter("give either --blocks or --pattern")
    if math.isnan(skew):
        raise typer.BadParameter("--skew must be a number")
    config = config_json(shape, blocks, pattern, experts, vocab)
    synthesis = Synthesis(shape, config, bits, dense_bits, seed, skew)
    started = time.monotonic()
    with progress_bar(Console(stderr=True), synthesis.name) as progress:
        made = synthesize(synthesis, destination, progress)
    size = sum(entry.bytes for entry in made.manifest.files.values())
    speed = format_bytes(size / (time.monotonic() - started))
    typer.echo(
        f"{destination}: {synthesis.name}; {made.num_experts} experts at {made.plan.describe()}, "
        f"{format_bytes(size)} in all, {speed}/s"
    )
