"""`gpu-worker`: the command line of the worker. Parses and prints; the work is elsewhere."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from common import tracing
from common.addresses import Address, AddressClaim
from common.credentials import Credentials
from common.errors import ServingError, Unavailable
from common.grpc_client import wait_until_serving
from common.message_json import print_json
from common.options import configured_by
from common.process import configure_process, importing, run_command, run_service
from common.process_config import ADDRESS_HELP
from common.version import add_version
from gpu_worker import generate_cli, key_cli
from gpu_worker.client import WorkerClient
from gpu_worker.client.requests import SERVICE
from gpu_worker.config import WorkerConfig
from gpu_worker.gateway import cli as gateway_cli
from gpu_worker.printing import stats_table
from gpu_worker.top import command as top_command

app = typer.Typer(
    help="Runs a mixture-of-experts model whose experts live in an expert store, and serves clients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
add_version(app)
generate_cli.register(app)
app.add_typer(key_cli.app, name="key")
gateway_cli.register(app)
top_command.register(app)


@app.command()
@configured_by(WorkerConfig)
def start(config: WorkerConfig, reread: Callable[[], WorkerConfig]) -> None:
    """Attach to an expert store on this machine and serve clients until stopped.

    Waits for the store if it is not up yet; should it die later, decoding goes on from what is mapped.

    Example: gpu-worker start --slots 16
    """
    configure_process(config.log_level, config.log_format)
    claim = AddressClaim(config.listen)
    try:
        # Imported here: help, client commands and a wrong option should not wait for PyTorch.
        with importing():
            from gpu_worker.server import Worker

        with tracing.exporting("gpu-worker"):
            status = run_service(lambda: Worker(config, f"{socket.gethostname()}-{os.getpid()}"), reread)
    finally:
        claim.release()
    raise typer.Exit(status)


WorkerOption = Annotated[str | None, typer.Option("--worker", help=ADDRESS_HELP, metavar="ADDRESS")]


@app.command()
def wait(
    worker: WorkerOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait before failing.", min=0)] = 60.0,
) -> None:
    """Return as soon as the worker is ready to serve; fail after --timeout."""
    address = Address.of_option(worker, "worker")
    try:
        wait_until_serving(address, timeout, Credentials.of_environment(), SERVICE)
    except Unavailable:
        with WorkerClient(address, retry_for=0) as client:
            try:
                client.model_info()
            except Unavailable as told:  # by a worker that is starting, what it is at
                raise Unavailable(f"not ready within {timeout:g} s: {told}") from None
            except ServingError:  # such as for want of a key, which waiting takes none
                pass
        raise


@app.command()
def stats(
    worker: WorkerOption = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Show slots, cache hits and requests."""
    with WorkerClient(Address.of_option(worker, "worker"), retry_for=0) as client:
        reply, info = client.stats(), client.model_info()
    if json:
        print_json(reply)
    else:
        Console().print(stats_table(reply, info))


@app.command()
def stop(worker: WorkerOption = None) -> None:
    """Stop the worker in good order: requests in progress finish, within its --drain-timeout.

    Returns at once. SIGTERM or Ctrl-C do the same; a second signal ends the worker without further ado.
    """
    with WorkerClient(Address.of_option(worker, "worker"), retry_for=0) as client:
        reply = client.stop()
    if reply.calls:
        typer.echo(f"{reply.calls} requests in progress have at most {reply.drain_timeout:g} s", err=True)


def main() -> None:
    """Entry point of the console script."""
    raise SystemExit(run_command(lambda: app(standalone_mode=True)))
