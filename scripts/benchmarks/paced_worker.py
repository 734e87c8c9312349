"""A worker without a model: it streams tokens at a steady pace, each with the time at which it was sent.

Run as a process of its own: `python paced_worker.py ADDRESS`. `max_new_tokens` says how many tokens, and
`top_k` how many microseconds are between two.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from common.addresses import Address
from common.grpc_server import RpcServer
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerServicer, add_GpuWorkerServicer_to_server


class PacedWorker(GpuWorkerServicer):
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvent]:
        count, pause = request.sampling.max_new_tokens, request.sampling.top_k / 1e6
        due = time.monotonic()
        for _ in range(count):
            due += pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            yield pb.GenerateEvent(delta=pb.Delta(text=f"{time.monotonic_ns()} ", tokens=[pb.Token(id=1)]))
        usage = pb.Usage(prompt_tokens=1, completion_tokens=count)
        yield pb.GenerateEvent(finish=pb.Finish(reason="length", usage=usage))

    async def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoReply:
        return pb.ModelInfoReply(model="paced", max_context=1 << 20, has_tokenizer=True)


async def serve(address: Address) -> None:
    """Until it is killed."""
    server = RpcServer(address, on_fatal=lambda error: sys.exit(str(error)))
    add_GpuWorkerServicer_to_server(PacedWorker(), server.server)
    await server.start(pb.DESCRIPTOR.services_by_name["GpuWorker"].full_name)
    await server.set_serving(True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(Address.parse(sys.argv[1])))
