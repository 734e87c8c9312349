"""`gpu-worker gateway`: the command that serves OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import Callable

import typer

from common import tracing
from common.addresses import AddressClaim
from common.options import configured_by
from common.process import configure_process, run_service
from gpu_worker.gateway.config import GatewayConfig


def register(app: typer.Typer) -> None:
    """Add the command to the worker's command line."""
    app.command()(configured_by(GatewayConfig)(gateway))


def gateway(config: GatewayConfig, reread: Callable[[], GatewayConfig]) -> None:
    """Serve OpenAI's endpoints over HTTP, for the model of a worker.

    Starts without the worker and answers 503 while it is not there.

    Example: gpu-worker gateway --listen 127.0.0.1:8000
    """
    configure_process(config.log_level, config.log_format)
    claim = AddressClaim(config.listen)
    try:
        from gpu_worker.gateway.server import GatewayServer  # FastAPI comes with it, for this command alone

        with tracing.exporting("gpu-worker-gateway"):
            status = run_service(lambda: GatewayServer(config), reread)
    finally:
        claim.release()
    raise typer.Exit(status)
