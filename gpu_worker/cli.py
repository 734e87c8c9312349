"""`gpu-worker`: the command line of the worker. Parses and prints; the work is elsewhere."""

from __future__ import annotations

import os
import socket
from typing import Annotated

import typer
from rich.console import Console

from common.addresses import Address, AddressClaim
from common.grpc_client import wait_until_serving
from common.message_json import print_json
from common.options import check_bits_option
from common.process import configure_process, run_command, run_service
from common.units import parse_size
from gpu_worker import generate_cli
from gpu_worker.client import WorkerClient
from gpu_worker.config import AUTO, WorkerConfig
from gpu_worker.printing import stats_table

app = typer.Typer(
    help="Runs a mixture-of-experts model whose experts live in an expert store, and serves clients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
generate_cli.register(app)

_ADDRESS_HELP = "unix:PATH or HOST:PORT; default: a socket in your private runtime directory."


@app.command()
def start(
    store: Annotated[str | None, typer.Option(help=_ADDRESS_HELP, metavar="ADDRESS")] = None,
    listen: Annotated[str | None, typer.Option(help=_ADDRESS_HELP, metavar="ADDRESS")] = None,
    device: Annotated[
        str, typer.Option(help="auto, cuda or cpu; auto takes a GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Compute type, bfloat16 or float32; default: bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Slots a layer, from 1 up, or 'direct' (the default on a CPU): compute from the store's "
            "memory. Any choice gives the same output.",
            metavar="N|direct",
        ),
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(
            help="Device memory for everything, like 7.6GB; slots get what all else leaves. Default on a "
            "GPU: auto, most of what is free.",
            metavar="SIZE|auto",
        ),
    ] = None,
    dense_bits: Annotated[
        int | None,
        typer.Option(
            help="Pack attention's, Mamba's and shared experts' projections and lm_head at 2 to 8 bits while "
            "loading, or 16 to unpack them; default: as they are stored.",
            callback=check_bits_option,
        ),
    ] = None,
    expert_bits: Annotated[
        int | None,
        typer.Option(
            help="Refuse a store whose experts have other bits, so that a benchmark says what it measures.",
            callback=check_bits_option,
        ),
    ] = None,
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Longest prompt and answer together, in tokens. Default: the model's; on a GPU, what fits "
            "in 1/32 of the memory, or more if all experts fit.",
            metavar="N",
        ),
    ] = None,
    max_sequences: Annotated[
        int | None,
        typer.Option(
            help="Sequences at a time, 1 to 16, with memory for all of them. Default: 1 on a GPU or within "
            "--vram, where more cost slots; else 8, or fewer if these would take over 1/8 of the RAM.",
            metavar="N",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait for others to end; more are refused.", metavar="N")
    ] = 256,
    policy: Annotated[str, typer.Option(help="Which slot to give up: lru or lfru.")] = "lru",
    prefetch: Annotated[
        str,
        typer.Option(help="Hint the next layer's experts to the store: auto (while it pays), on or off."),
    ] = "auto",
    eager: Annotated[
        bool, typer.Option("--eager", help="On a GPU, launch kernels one by one instead of by CUDA graphs.")
    ] = False,
    sync_fetch: Annotated[
        bool,
        typer.Option(
            "--sync-fetch",
            help="On a GPU, fetch missing experts one by one and wait for each; to compare with, it is slow.",
        ),
    ] = False,
) -> None:
    """Attach to an expert store on this machine and serve clients until stopped.

    Waits for the store if it is not up yet; should it die later, decoding goes on from what is mapped.

    Example: gpu-worker start --slots 16
    """
    configure_process()
    config = WorkerConfig(
        store=Address.of_option(store, "store"),
        listen=Address.of_option(listen, "worker"),
        device=device,
        dtype=dtype,
        slots=int(slots) if slots and slots.isdecimal() else slots,
        vram=parse_size(vram) if vram and vram != AUTO else vram,
        policy=policy,
        prefetch=prefetch,
        dense_bits=dense_bits,
        expert_bits=expert_bits,
        max_context=max_context,
        max_sequences=max_sequences,
        max_queue=max_queue,
        eager=eager,
        sync_fetch=sync_fetch,
    )
    claim = AddressClaim(config.listen)
    try:
        # Imported here: help, client commands and a wrong option should not wait for PyTorch.
        from gpu_worker.server import Worker

        status = run_service(lambda: Worker(config, name=f"{socket.gethostname()}-{os.getpid()}"))
    finally:
        claim.release()
    raise typer.Exit(status)


WorkerOption = Annotated[str | None, typer.Option("--worker", help=_ADDRESS_HELP, metavar="ADDRESS")]


@app.command()
def wait(
    worker: WorkerOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait before failing.")] = 60.0,
) -> None:
    """Return as soon as the worker is ready to serve; fail after --timeout."""
    wait_until_serving(Address.of_option(worker, "worker"), timeout)


@app.command()
def stats(
    worker: WorkerOption = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show slots, cache hits and requests."""
    with WorkerClient(Address.of_option(worker, "worker")) as client:
        reply, info = client.stats(), client.model_info()
    if json:
        print_json(reply)
    else:
        Console().print(stats_table(reply, info))


@app.command()
def stop(worker: WorkerOption = None) -> None:
    """Stop the worker in good order."""
    with WorkerClient(Address.of_option(worker, "worker")) as client:
        client.stop()


def main() -> None:
    """Entry point of the console script."""
    raise SystemExit(run_command(lambda: app(standalone_mode=True)))
