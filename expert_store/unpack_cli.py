"""`expert-store unpack`: from packed weights back to a directory that other programs load.

Parses and prints; errors are raised for the main command line to show. Everything that needs PyTorch is
imported inside the command: help should not wait for it.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.units import format_bytes


class Layout(str, Enum):
    """The names of `common.checkpoint.unpack_layouts.LAYOUTS`, which help should not have to import."""

    BF16 = "bf16"
    HLWQ_Q5 = "hlwq-q5"
    POLAR_ENGINE_V5 = "polar_engine_v5"


def register(app: typer.Typer) -> None:
    """Add the command to the store's command line."""
    app.command("unpack")(unpack)


def unpack(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint's directory, a Hugging Face id, or 'demo'.", metavar="SRC"),
    ],
    destination: Annotated[Path, typer.Argument(help="The directory to make.", metavar="DST")],
    layout: Annotated[
        Layout,
        typer.Option(
            help="bf16: plain weights, for transformers, vLLM and others. The published HLWQ layouts keep "
            "codes: hlwq-q5 can those of 5 bits under the published codebook, polar_engine_v5 all."
        ),
    ] = Layout.BF16,
) -> None:
    """Turn a packed checkpoint back into a plain one.

    DST becomes a Hugging Face directory: weights in bfloat16, in shards of at
    most 5 GB with their index, with config, tokenizer and chat template. It
    appears when it is complete and must not exist before. What SRC stores
    plain keeps its bytes.

    With --layout, DST holds the codes, norms and codebooks of SRC in a layout
    that other HLWQ programs read. Nothing is quantized anew.

    Example: expert-store unpack ~/models/nemotron-q5 ~/models/nemotron-bf16
    """
    from common.checkpoint import open_checkpoint
    from common.checkpoint.unpacking import unpack as write
    from expert_store.models import locate_model
    from expert_store.progress_bar import progress_bar

    location = locate_model(source)
    checkpoint = open_checkpoint(location.directory)
    with progress_bar(Console(stderr=True), f"unpacking {location.name} as {layout.value}") as progress:
        shards = write(checkpoint, destination, layout.value, progress)
    size = format_bytes(sum(info.size for shard in shards for info in shard.tensors.values()))
    tensors = sum(len(shard.tensors) for shard in shards)
    files = "one file" if len(shards) == 1 else f"{len(shards)} files"
    typer.echo(f"{destination}: {tensors} tensors as {layout.value}, {size} in {files}")
