"""`expert-store`: the command line of the store. Parses and prints; the work is elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common import tracing
from common.addresses import Address, AddressClaim
from common.grpc_client import channel_to, wait_until_serving
from common.message_json import print_json
from common.options import configured_by
from common.process import configure_process, importing, run_command, run_service
from common.process_config import ADDRESS_HELP
from common.rpc import expert_store_pb2 as pb
from common.rpc.expert_store_pb2_grpc import ExpertStoreStub
from common.units import format_bytes
from common.version import add_version
from expert_store import files_cli, synth_cli, unpack_cli
from expert_store.config import StoreConfig

app = typer.Typer(
    help="Keeps every routed expert of a mixture-of-experts model, packed, in page-locked shared memory, "
    "and hands them to GPU workers on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
add_version(app)
files_cli.register(app)
unpack_cli.register(app)
synth_cli.register(app)

StoreOption = Annotated[str | None, typer.Option("--store", help=ADDRESS_HELP, metavar="ADDRESS")]


@app.command()
@configured_by(StoreConfig)
def start(config: StoreConfig, reread: Callable[[], StoreConfig]) -> None:
    """Load MODEL's experts and serve them until stopped (Ctrl-C, SIGTERM, or `expert-store stop`).

    Workers can attach as soon as it says "ready", before the last expert is loaded.

    Example: expert-store start demo
    """
    configure_process(config.log_level, config.log_format)
    console = Console(stderr=True)
    claim = AddressClaim(config.listen)
    try:
        # Imported here: help, stats and a wrong option should not wait for PyTorch.
        with importing():
            from expert_store.models import resolve_model
            from expert_store.server import Store

        checkpoint = resolve_model(config.model, config.bits, console)
        with tracing.exporting("expert-store"):
            status = run_service(lambda: Store(config, checkpoint, claim.data_path, console), reread)
    finally:
        claim.release()
    raise typer.Exit(status)


@app.command()
def wait(
    store: StoreOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait before failing.", min=0)] = 60.0,
) -> None:
    """Return as soon as the store is ready to serve; fail after --timeout."""
    service = pb.DESCRIPTOR.services_by_name["ExpertStore"].full_name
    wait_until_serving(Address.of_option(store, "store"), timeout, service=service)


@app.command()
def stats(
    store: StoreOption = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show frames, staging and attached workers."""
    with channel_to(Address.of_option(store, "store")) as channel:
        reply = ExpertStoreStub(channel).Stats(pb.StoreStatsRequest(), timeout=10)
    if json:
        print_json(reply)
        return
    Console().print(_stats_table(reply))


@app.command()
def stop(store: StoreOption = None) -> None:
    """Stop the store in good order. Attached workers go on with what they have mapped."""
    with channel_to(Address.of_option(store, "store")) as channel:
        ExpertStoreStub(channel).Stop(pb.StopStoreRequest(), timeout=10)


def _stats_table(reply: pb.StoreStats) -> Table:
    speed = format_bytes(reply.staged_bytes / reply.staging_seconds if reply.staging_seconds else 0)
    table = Table(title=f"expert store: {reply.model}", show_header=False, title_justify="left")
    for name, value in (
        ("experts", f"{reply.layers} layers x {reply.experts_per_layer}"),
        ("record", format_bytes(reply.record_bytes)),
        ("frames", f"{reply.ready_frames} ready, {reply.pinned_frames} pinned, of {reply.frames}"),
        ("arena", format_bytes(reply.arena_bytes) + (" page-locked" if reply.page_locked else "")),
        ("staged", f"{reply.staged_records}, {format_bytes(reply.staged_bytes)}, {speed}/s a reader"),
        ("disk", f"{reply.preload_seconds:.1f} s of reading before anybody asked, "
                 f"{reply.staging_seconds - reply.preload_seconds:.1f} s since, a reader"),
        ("demands", f"{reply.demands}, {reply.demands_ready} of them ready"),
        ("hints", str(reply.hints)),
        ("evictions", str(reply.evictions)),
        ("up", f"{reply.uptime_seconds:.0f} s"),
    ):  # fmt: skip
        table.add_row(name, value)
    for lease in reply.leases:
        table.add_row("worker", f"{lease.worker} (pid {lease.pid}), {lease.pinned_frames} frames pinned")
    return table


def main() -> None:
    """Entry point of the console script."""
    raise SystemExit(run_command(lambda: app(standalone_mode=True)))
