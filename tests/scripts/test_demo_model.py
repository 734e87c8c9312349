"""The parts of the demo model's training: its forward pass against transformers', its split, its tokenizer.

Training itself is not run here.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from demo_model import corpus, network, optimizer

SIZES = network.Sizes(
    pattern="ME*E",
    hidden=32,
    vocab=300,
    experts=8,
    top_k=3,
    expert_size=12,
    shared_size=24,
    mamba_heads=4,
    state=8,
)
SOURCE = 'def area(width, height):\n    """Return the area of a rectangle."""\n    return width * height\n'


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return network.build_model(SIZES, end_of_text=0, turn_end=2).eval()


@torch.no_grad()
def test_training_forward_equals_transformers(model):
    for gate in network.gates(model):
        gate.e_score_correction_bias.normal_(std=0.1)  # so that choice and weight differ
    ids = torch.randint(SIZES.vocab, (2, 150), generator=torch.Generator().manual_seed(1))
    counts = []
    ours = network.logits(model, ids, counts=counts)
    assert (ours - model(ids, use_cache=False).logits).abs().max() < 1e-4
    assert [count.sum().item() for count in counts] == [2 * 150 * 3] * 2


def test_balance_lowers_the_bias_of_busy_experts(model):
    gate = network.gates(model)[0]
    gate.e_score_correction_bias.zero_()
    network.balance(model, [torch.tensor([9, 1, 1, 1, 1, 1, 1, 1])] * 2, rate=0.1)
    assert gate.e_score_correction_bias.argmin() == 0
    assert gate.e_score_correction_bias.sum().abs() < 1e-6


def test_time_steps_start_in_the_usual_range(model):
    dt = torch.nn.functional.softplus(model.model.layers[0].mixer.dt_bias)
    low, high = network.TIME_STEP_RANGE
    assert low * 0.99 < dt.min() and dt.max() < high * 1.01
    assert model.config.time_step_min == 0.0


def test_test_modules_are_held_out(tmp_path):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    (tmp_path / "pkg" / "shapes.py").write_text(SOURCE)
    long = "x = 1\n" * (corpus.EVALUATION_BYTES // 6 + 1)
    for i in range(2):
        (tmp_path / "pkg" / "tests" / f"test_{i}.py").write_text(f"{long}# {i}")
    found = corpus.read_corpus(tmp_path)
    assert found.train == [SOURCE]
    assert len(found.evaluation) == len(found.validation) == 1 and found.evaluation != found.validation
    (chat,) = found.chats
    assert (
        "user\nReturn the area of a rectangle.<|im_end|>" in chat
        and "return width * height<|im_end|>" in chat
    )


def test_tokenizer_loses_nothing():
    tokenizer = corpus.train_tokenizer([SOURCE], vocab_size=300, max_length=64)
    text = "def é_1(__x):\r\n\t\n        return  [x . y]\x00 # 本\n\n"
    (ids,) = corpus.encode(tokenizer, [text])
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == tokenizer.eos_token_id
    assert corpus.bytes_per_token(tokenizer)[ids].sum() == len(text.encode())


def test_batches_are_windows_of_the_stream():
    documents = [np.arange(10 * i, 10 * i + 10) for i in range(5)]
    batch = next(corpus.shuffled_batches(documents, length=4, batch=3, rng=np.random.default_rng(0)))
    assert batch.shape == (3, 5)
    assert ((np.diff(batch) == 1).sum(1) >= 3).all()  # a window of 5 crosses at most one document's end


@pytest.mark.parametrize("shape", [(2, 12, 32), (2, 32, 12)])
def test_orthogonalised_singular_values_are_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    singular = torch.linalg.svdvals(optimizer.orthogonalised(matrices))
    assert singular.min() > 0.5 and singular.max() < 1.5
