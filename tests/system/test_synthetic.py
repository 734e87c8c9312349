"""A synthetic checkpoint served by real processes: text in, text out, and no figure without its mark."""

import json
from collections.abc import Iterator

import pytest

from tests.helpers.synth import make_synthetic
from tests.system.processes import Pair, pair_of_processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model = make_synthetic(tmp_path_factory.mktemp("model") / "random", dense_bits=8).directory
    with pair_of_processes(tmp_path_factory.mktemp("run"), model) as pair:
        pair.start_store()
        pair.start_worker()
        yield pair


def test_text_goes_in_and_comes_out(pair: Pair) -> None:
    for options in ((), ("--chat",)):
        command = ("gpu-worker", "generate", "A model", *options, "--max-new-tokens", "12", "--ignore-eos")
        result = json.loads(pair.run(*command, "--json").stdout)
        assert len(result["token_ids"]) == 12 and len(result["text"]) >= 12


def test_both_processes_say_that_it_is_synthetic(pair: Pair) -> None:
    assert "random (synthetic)" in " ".join(pair.run("expert-store", "stats").stdout.split())
    assert json.loads(pair.run("expert-store", "stats", "--json").stdout)["model"].endswith(" (synthetic)")
    stats = pair.run("gpu-worker", "stats").stdout
    assert "gpu worker: synthetic nemotron-cascade-2-30b-a3b" in " ".join(stats.split())
