"""Python clients of a GPU worker: what the command line and the gateway use, and anyone may.

    with WorkerClient() as client:
        for event in client.generate("def fibonacci(", max_new_tokens=64):
            print(event.delta.text, end="")

`AsyncWorkerClient` is the same for asyncio. Errors come out as `common.errors`; nothing here imports PyTorch.
Results that stream are the protocol's own messages; `Answers` and `Generated` put them together.
"""

from gpu_worker.client.aio import AsyncWorkerClient
from gpu_worker.client.requests import Prompt, chat
from gpu_worker.client.results import Answers, Generated
from gpu_worker.client.sync import WorkerClient

__all__ = ["Answers", "AsyncWorkerClient", "Generated", "Prompt", "WorkerClient", "chat"]
