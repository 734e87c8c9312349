"""The packed pipeline against transformers' NemotronHForCausalLM on the same weights, in float32.

Raw 16-bit records through frames and slots: what is compared is everything from checkpoint to logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import NemotronHForCausalLM

from expert_store.config import DEMO
from expert_store.models import locate_model
from tests.helpers.engines import FixedLink, full_arena, greedy, load, packed, prompt_logits
from tests.helpers.models import make_hf_model

TOLERANCE = 1e-4  # relative error of logits, ||ours - theirs|| / ||theirs||
SHAPES = {
    "all block types": {},
    "grouped routing": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "no convolution bias, one group": {"use_conv_bias": False, "n_groups": 1},
    "time step floor": {"time_step_min": 0.05},  # the median time step
}
Pair = tuple[FixedLink, NemotronHForCausalLM]


@contextmanager
def both(source: Path, directory: Path) -> Iterator[Pair]:
    reference = NemotronHForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with full_arena(packed(source, directory / "packed", 16)) as link:
        yield link, reference


def random_prompt(reference: NemotronHForCausalLM, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, reference.config.vocab_size, (length,), generator=generator).tolist()


def check_logits(pair: Pair, length: int) -> None:
    link, reference = pair
    tokens = random_prompt(reference, length)
    ours = prompt_logits(load(link, slots=3).engine, tokens)
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).norm() / theirs.norm()) <= TOLERANCE


def check_greedy(pair: Pair, prompt: list[int]) -> None:
    link, reference = pair
    ours, _ = greedy(load(link, slots=3).engine, prompt, 200)
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=SHAPES)
def random_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("model")
    with both(make_hf_model(directory / "hf", seed=3, **SHAPES[request.param]), directory) as pair:
        yield pair


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with both(locate_model(DEMO).directory, tmp_path_factory.mktemp("demo")) as pair:
        yield pair


@pytest.mark.parametrize("length", [1, 16, 37, 300])
def test_logits_of_random_models(random_pair: Pair, length: int) -> None:
    """Chunk size is 16, so these are less than a chunk, one, several and a piece, and many."""
    check_logits(random_pair, length)


@pytest.mark.parametrize("random_pair", ["all block types", "grouped routing"], indirect=True)
def test_greedy_continuation_of_random_models(random_pair: Pair) -> None:
    check_greedy(random_pair, [5, 17, 80, 3, 42])


@pytest.mark.parametrize("length", [7, 700])
def test_logits_of_the_demo_model(demo_pair: Pair, length: int) -> None:
    """700 is more than one chunk of the worker's prefill and no multiple of the scan's."""
    check_logits(demo_pair, length)


def test_greedy_continuation_of_the_demo_model(demo_pair: Pair) -> None:
    check_greedy(demo_pair, random_prompt(demo_pair[1], 20))
