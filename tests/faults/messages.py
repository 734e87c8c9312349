"""Messages of the data plane that do not arrive as they were sent, and clients that do not read."""

from __future__ import annotations

import random
import time

import grpc

from common.grpc_client import OPTIONS
from common.messages import PROTOCOL_VERSION
from common.rpc import gpu_worker_pb2 as pb
from common.rpc.gpu_worker_pb2_grpc import GpuWorkerStub
from tests.faults.case import Case
from tests.faults.rig import Rig
from tests.faults.wire import FATES, Wire

_SHARE = 3  # of a hundred messages


class Messages(Case):
    recovery = 20.0  # what was lost is asked for again after 2 s, and may be lost again

    def __init__(self, *fates: str, seconds: float = 3.0) -> None:
        self.fates, self._seconds = fates, seconds
        self.name = f"ZeroMQ messages {fates[0] if len(fates) == 1 else 'any of these'}"
        self.expected = "every request is right, late where something was lost"

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        wire = Wire(rig.pair.store_address.beside(".data"), draw.randrange(1 << 30))
        try:
            with rig.leases() as end_all:
                end_all()  # whoever attaches anew connects to the wire
            time.sleep(0.5)
            wire.shares = dict.fromkeys(self.fates, _SHARE)
            time.sleep(self._seconds)
            wire.shares = {}
            rig.recover(self.recovery)
            assert any(wire.met[fate] for fate in self.fates), f"nothing happened on the wire: {wire.met}"
        finally:
            wire.close()
        return set()


class StalledClient(Case):
    name = "a client that stops reading its stream"
    expected = "all others are right; nothing is left of it once it is gone"

    def strike(self, rig: Rig, draw: random.Random) -> set[int]:
        with grpc.insecure_channel(str(rig.addresses[0]), options=OPTIONS) as channel:
            sampling = pb.SamplingParams(max_new_tokens=400, ignore_eos=True, logprobs=20)
            request = pb.GenerateRequest(
                protocol_version=PROTOCOL_VERSION, token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=sampling
            )
            stream = GpuWorkerStub(channel).Generate(request)
            next(stream)
            time.sleep(draw.uniform(1, 5))
            stream.cancel()
        return set()


CASES = [*map(Messages, FATES), Messages(*FATES), StalledClient()]
