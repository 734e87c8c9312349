"""What transformers computes with an unpacked model is what our engine computes, both on the same weights.

The decoded weights are rounded to bfloat16 when they are unpacked, so our side packs the unpacked model at 16
bits, which keeps those very weights.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from expert_store.config import DEMO
from expert_store.models import locate_model
from gpu_worker.engine import Engine
from tests.helpers.engines import full_arena, greedy, load, packed, prompt_logits
from tests.helpers.models import make_hf_model, unpack_model

TOLERANCE = 1e-4  # relative error of logits, ||ours - theirs|| / ||theirs||
Pair = tuple[PreTrainedModel, Engine]


def both(source: Path, directory: Path) -> Iterator[Pair]:
    """`source` at 5 bits, unpacked: as transformers loads it, and as we do."""
    plain = unpack_model(packed(source, directory / "q5", 5).directory, directory / "plain")
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with full_arena(packed(plain, directory / "raw", 16)) as link:
        yield reference, load(link, slots=3).engine


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp("random")
    yield from both(make_hf_model(directory / "hf", seed=3), directory)


@pytest.fixture(scope="module")
def demo_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from both(locate_model(DEMO).directory, tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("length", [5, 80])
def test_logits(random_pair: Pair, length: int) -> None:
    reference, engine = random_pair
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, reference.config.vocab_size, (length,), generator=generator).tolist()
    ours = prompt_logits(engine, tokens)
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).norm() / theirs.norm()) <= TOLERANCE


def test_the_demo_model_says_the_same(demo_pair: Pair) -> None:
    """With the tokenizer that was carried along."""
    reference, engine = demo_pair
    tokenizer = AutoTokenizer.from_pretrained(reference.config.name_or_path)
    prompt = tokenizer("def read_lines(path):\n    ")["input_ids"]
    ours, _ = greedy(engine, prompt, 40)
    theirs = reference.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours == theirs[0, len(prompt) :].tolist()
