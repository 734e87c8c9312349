"""What a worker makes of a synthetic checkpoint: activations of sensible size, and text."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from common.checkpoint import PackedCheckpoint
from expert_store.synth.tokenizer import LEAST_VOCABULARY, write_tokenizer
from gpu_worker.engine import Engine
from gpu_worker.tokenizer import Tokenizer
from tests.helpers.engines import full_arena, greedy, load, prompt_logits
from tests.helpers.synth import make_synthetic

TOKENS = torch.randint(512, (96,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    """All 52 blocks at tiny widths, skewed; not to be changed."""
    return make_synthetic(tmp_path_factory.mktemp("synth") / "deep", pattern=None, dense_bits=8, skew=1.0)


@pytest.fixture(scope="module")
def engine(deep: PackedCheckpoint) -> Iterator[Engine]:
    with full_arena(deep) as link:
        yield load(link).engine


def root_mean_square(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def recorded(engine: Engine, run: Callable[[], object]) -> list[Tensor]:
    """What every mixer adds to the residual stream, in order, while `run` runs."""
    outputs: list[Tensor] = []
    blocks = engine.model.blocks

    def watched(mixer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object) -> Tensor:
            outputs.append(mixer(*args))
            return outputs[-1]

        return call

    engine.model.blocks = [(block, watched(mixer)) for block, mixer in blocks]
    try:
        run()
    finally:
        engine.model.blocks = blocks
    return outputs


def test_the_residual_stream_neither_explodes_nor_vanishes(engine: Engine) -> None:
    """It starts at 1 and every block adds about 1 / 104 to its variance, attention less: it averages."""
    outputs = recorded(engine, lambda: prompt_logits(engine, TOKENS))
    hidden = F.embedding(torch.tensor(TOKENS), engine.model.weights.embeddings)
    assert root_mean_square(hidden) == pytest.approx(1, rel=0.05)
    assert len(outputs) == 52
    for block, (letter, output) in enumerate(zip(engine.model.config.pattern, outputs, strict=True)):
        hidden = hidden + output
        assert bool(torch.isfinite(hidden).all()), f"block {block}"
        assert 0.9 < root_mean_square(hidden) < 1.4, f"block {block}"
        share = root_mean_square(output) * math.sqrt(104)
        assert (0.1 if letter == "*" else 0.8) < share < 1.2, f"block {block} ({letter}) adds {share}"


def test_it_stays_so_while_decoding(engine: Engine) -> None:
    outputs = recorded(engine, lambda: greedy(engine, TOKENS[:8], 7))
    steps = [outputs[start : start + 52] for start in range(52, len(outputs), 52)]
    assert len(steps) == 6
    for step in steps:
        added = torch.stack(step).sum(0)
        assert bool(torch.isfinite(added).all()) and 0.3 < root_mean_square(added) < 1.5


def test_logits_tell_tokens_apart(engine: Engine) -> None:
    logits = prompt_logits(engine, TOKENS)
    assert logits.std().item() == pytest.approx(1, rel=0.2)
    assert len(set(logits.argmax(1).tolist())) > 48, "the same tokens again and again"


def test_the_tokenizer_is_the_one_that_transformers_loads(deep: PackedCheckpoint) -> None:
    text = "def read(path):\n    return Path(path).read_text()  # naïve ✓\n"
    ours, theirs = tokenizer_of(deep), AutoTokenizer.from_pretrained(deep.directory)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert len(theirs) == deep.config.vocab_size
    assert len(ours.encode(text)) < len(text.encode()), "nothing was learned"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert deep.config.eos_token_ids == (2,)


def test_chats_are_rendered(deep: PackedCheckpoint) -> None:
    tokenizer = tokenizer_of(deep)
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    assert tokenizer.decode(ids) == "user\nHello\nassistant\n"
    assert ids[0] in tokenizer.special_ids


def test_every_other_token_has_a_text(deep: PackedCheckpoint) -> None:
    tokenizer = tokenizer_of(deep)
    for token in set(range(deep.config.vocab_size)) - tokenizer.special_ids:
        assert tokenizer.decode([token])


def test_text_goes_in_and_comes_out(deep: PackedCheckpoint, engine: Engine) -> None:
    tokenizer = tokenizer_of(deep)
    ids, _ = greedy(engine, tokenizer.encode("A genuine model"), 6)
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in ids) + stream.flush()
    assert text.strip() and text == tokenizer.decode(ids)


@pytest.mark.parametrize("size", [LEAST_VOCABULARY, 4096])
def test_vocabularies_of_any_size(size: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, size, 1024)
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == size


def tokenizer_of(checkpoint: PackedCheckpoint) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    assert tokenizer is not None
    return tokenizer
