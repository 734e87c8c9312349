"""The gateway's metrics: what happens between HTTP clients and the worker. The worker has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import Counter
from prometheus_client.core import Metric

from common.metrics import PREFIX, gauge, new_registry, seconds


class GatewayMetrics:
    """Owns the registry."""

    def __init__(self, running: Callable[[], int]) -> None:
        def figures() -> Iterator[Metric]:
            yield gauge("gateway_requests_running", "Requests that the worker is answering.", running())

        self.registry = registry = new_registry(figures)
        self.requests = Counter(
            f"{PREFIX}_gateway_requests",
            "Requests that have ended, by route and HTTP status; 499: the client went away.",
            ("route", "status"),
            registry=registry,
        )
        self.duration = seconds(registry, "gateway_request_duration", "From request to end.", ("route",))
        self.first_token = seconds(
            registry, "gateway_time_to_first_token", "From request to the first piece of text.", ("route",)
        )
        self.prompt_tokens = Counter(
            f"{PREFIX}_gateway_prompt_tokens", "Tokens of answered prompts.", registry=registry
        )
        self.completion_tokens = Counter(
            f"{PREFIX}_gateway_completion_tokens", "Tokens of complete answers.", registry=registry
        )
