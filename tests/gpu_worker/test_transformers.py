"""The packed pipeline against transformers' NemotronHForCausalLM on the same weights, in float32.

Raw 16-bit records through frames and slots: what is compared is everything from checkpoint to logits.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import NemotronHForCausalLM

from tests.helpers.engines import FixedLink, full_arena, greedy, load, packed, prompt_logits
from tests.helpers.models import make_hf_model

TOLERANCE = 1e-4  # relative error of logits, ||ours - theirs|| / ||theirs||
SHAPES = {
    "all block types": {},
    "grouped routing": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "no convolution bias, one group": {"use_conv_bias": False, "n_groups": 1},
    "time step floor": {"time_step_min": 0.001},
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def pair(request, tmp_path_factory) -> Iterator[tuple[FixedLink, NemotronHForCausalLM]]:
    directory: Path = tmp_path_factory.mktemp("model")
    source = make_hf_model(directory / "hf", seed=3, **request.param)
    reference = NemotronHForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with full_arena(packed(source, directory / "packed", 16)) as link:
        yield link, reference


@pytest.mark.parametrize("length", [1, 16, 37, 300])
def test_logits(pair, length: int) -> None:
    """Chunk size is 16, so these are less than a chunk, one, several and a piece, and many."""
    link, reference = pair
    tokens = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    ours = prompt_logits(load(link, slots=3).engine, tokens)
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).norm() / theirs.norm()) <= TOLERANCE


def test_greedy_continuations(pair, request) -> None:
    """transformers clamps the time step in prefill alone, so with a floor its own decode differs from it."""
    if "floor" in request.node.name:
        return
    link, reference = pair
    tokens = [5, 17, 80, 3, 42]
    ours, _ = greedy(load(link, slots=3).engine, tokens, 200)
    theirs = reference.generate(
        torch.tensor([tokens]), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(tokens) :].tolist()
