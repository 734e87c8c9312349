"""What a generation streams: the same where the engine only launches a step as where it waits for it."""

from collections.abc import Iterator
from typing import Any

import pytest

from common.checkpoint import open_checkpoint
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.rpc import gpu_worker_pb2 as pb
from gpu_worker.engine import Engine
from gpu_worker.jobs import Generation
from gpu_worker.sampling import SamplingParams
from tests.helpers.engines import full_arena, load
from tests.helpers.models import make_hf_model

PROMPT = [5, 3, 80, 2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = make_hf_model(tmp_path_factory.mktemp("model") / "hf")
    checkpoint = open_checkpoint(model)
    plan = make_plan(checkpoint, 5, None)
    with full_arena(pack(checkpoint, model.with_name("packed"), plan, lambda done, total: None)) as link:
        yield load(link).engine


class Decodes:
    """Notes in what order steps are decoded and tokens streamed."""

    def __init__(self, engine: Engine, launches_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        decode = engine.decode

        def noted(*args: Any) -> Any:
            self.events.append("decode")
            return decode(*args)

        monkeypatch.setattr(engine, "decode", noted)
        monkeypatch.setattr(engine, "launches_only", launches_only)

    def run(self, engine: Engine, **sampling: Any) -> list[int]:
        job = Generation(PROMPT, SamplingParams(**sampling), (), None, self.events.append)
        job.begin(engine)
        while not job.step(engine):
            pass
        job.end(engine)
        return job.output


def kinds(events: list[Any]) -> str:
    """d: a step was launched, t: a token streamed, f: the end."""
    return "".join("d" if e == "decode" else "f" if e.HasField("finish") else "t" for e in events)


def test_a_token_is_streamed_while_the_next_is_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, streamed = [], []
    for launches_only, order in ((False, "tdtdtdtf"), (True, "dtdtdttf")):
        with monkeypatch.context() as patch:
            noted = Decodes(engine, launches_only, patch)
            outputs.append(noted.run(engine, max_new_tokens=4))
        assert kinds(noted.events) == order
        deltas = [event for event in noted.events if isinstance(event, pb.GenerateEvent)]
        streamed.append([token.id for event in deltas for token in event.delta.tokens])
    assert outputs[0] == outputs[1] == streamed[0] == streamed[1]


def test_a_stop_string_is_looked_for_before_the_next_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Decodes(engine, True, monkeypatch)
    noted.run(engine, max_new_tokens=3, stop=("never",))
    assert kinds(noted.events) == "tdtdtf"
