"""Calibration against transformers: the same hidden states, and moments of what its modules get."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from common.checkpoint import open_checkpoint
from common.checkpoint.names import packable_dense
from common.checkpoint.plan import BitPlan, make_plan
from common.errors import CheckpointError, ConfigError, Exhausted
from common.expert_key import ExpertKey
from common.hlwq.calibrated import Moment
from expert_store.block_forward import forward
from expert_store.calibration import MOST_TOKENS, WINDOW, Scratch, Text, calibrated, read_text
from tests.expert_store.test_files_cli import run
from tests.helpers.models import edited_tensors, make_hf_model

DEMO = Path(__file__).parents[2] / "expert_store" / "demo"


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def text() -> Text:
    """Random tokens for the tiny model; the last window is shorter."""
    generator = torch.Generator().manual_seed(0)
    return Text([torch.randint(96, (count,), generator=generator) for count in (70, 70, 33)], "random")


@pytest.fixture(scope="module")
def reference(pristine: Path) -> Any:
    return NemotronHForCausalLM.from_pretrained(pristine, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def seen(reference: Any, text: Text) -> dict[str, list[Any]]:
    """What transformers' modules get of the text, by canonical name; experts: inputs, choices, weights."""
    inputs: dict[str, list[Any]] = {}

    def listener(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, given: inputs.setdefault(name, []).append(given)

    hooks = []
    for name, module in reference.named_modules():
        if isinstance(module, nn.Linear) or name.endswith(".experts"):
            name = name.replace("model.", "backbone.", 1) + (
                ".weight" if isinstance(module, nn.Linear) else ""
            )
            hooks.append(module.register_forward_pre_hook(listener(name)))
    with torch.inference_mode():
        for window in text.windows:
            reference(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


def everything(source: Any) -> BitPlan:
    return make_plan(source, bits=4, dense_bits=5)


def assert_close(moment: Moment, inputs: Tensor, rounding: float = 1e-4) -> None:
    expected = inputs.double().T @ inputs.double()
    assert float((moment.total - expected).norm()) < rounding * float(expected.norm())


class Nobody:
    """Keeps nothing."""

    def dense(self, name: str, inputs: Tensor) -> None: ...

    def routed(self, layer: int, inputs: Tensor, choices: Tensor, weights: Tensor) -> None: ...

    def block_done(self) -> None: ...


def test_blocks_compute_what_transformers_computes(pristine: Path, reference: Any, text: Text) -> None:
    source, progress = open_checkpoint(pristine), []
    final = forward(source, text.windows, Nobody(), lambda done, total: progress.append((done, total)))
    with torch.inference_mode():
        for window, hidden in zip(text.windows, final, strict=True):
            expected = reference.model(window[None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    assert len(progress) == 6 and progress[-1][0] == progress[-1][1]


def test_moments_of_dense_matrices(pristine: Path, text: Text, seen: Any, tmp_path: Path) -> None:
    source = open_checkpoint(pristine)
    with calibrated(source, everything(source), text, tmp_path / "packed", silent) as calibration:
        for name in packable_dense(source.config):
            moment = calibration.dense(name)
            assert moment.count == 173
            assert_close(moment, torch.cat([given[0].flatten(0, -2) for given in seen[name]]))


def test_moments_of_experts(pristine: Path, text: Text, seen: Any, tmp_path: Path) -> None:
    source = open_checkpoint(pristine)
    with calibrated(source, everything(source), text, tmp_path / "packed", silent) as calibration:
        for layer, block in enumerate((1, 3)):
            given = [
                torch.cat(parts)
                for parts in zip(*seen[f"backbone.layers.{block}.mixer.experts"], strict=True)
            ]
            inputs, choices, weights = (part.double() for part in given)
            for expert in range(8):
                up = source.expert(ExpertKey(layer, expert))[0]
                assert isinstance(up, Tensor)
                moments = calibration.expert(ExpertKey(layer, expert), up)
                weight = (weights * (choices == expert)).sum(1)
                weight = weight[weight > 0] / weight[weight > 0].square().mean().sqrt()
                mine = inputs[(choices == expert).any(1)]
                inner = torch.relu(mine @ up.double().T) ** 2
                average = math.sqrt(64 / 173) * inputs
                assert (moments[0].count, moments[1].count) == (len(mine) + 64, len(mine))
                # Inputs are kept in bfloat16.
                assert_close(moments[0], torch.cat([mine * weight[:, None], average]), 3e-3)
                assert_close(moments[1], inner * weight[:, None], 1e-2)


def test_an_expert_that_saw_nothing(pristine: Path, tmp_path: Path) -> None:
    source, text = open_checkpoint(pristine), Text([torch.tensor([5])], "one token")
    with calibrated(source, everything(source), text, tmp_path / "packed", silent) as calibration:
        counts = []
        for expert in range(8):
            up = source.expert(ExpertKey(0, expert))[0]
            assert isinstance(up, Tensor)
            moments = calibration.expert(ExpertKey(0, expert), up)
            assert bool(torch.isfinite(moments[0].total).all()) and float(moments[0].total.norm()) > 0
            counts.append(int(moments[1].count))
            assert (float(moments[1].total.norm()) > 0) == (moments[1].count > 0)
    assert sorted(counts) == [0] * 6 + [1] * 2


def test_nothing_is_kept_that_is_not_asked_for(
    pristine: Path, pristine_packed: Path, text: Text, tmp_path: Path
) -> None:
    source, kept = open_checkpoint(pristine), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scratch, "put", lambda self, name, tensor: kept.append(name))
        recipe = {"*.experts.*": 16, "*.layers.3.mixer.experts.*.up_proj": 4, "*.q_proj": 5}
        with calibrated(source, make_plan(source, recipe=recipe), text, tmp_path / "packed", silent):
            assert sorted(kept) == ["backbone.layers.2.mixer.q_proj.weight", "inputs 1", "moment 1"]
    for directory, bits in ((pristine, 16), (pristine_packed, 5)):
        source = open_checkpoint(directory)
        with (
            pytest.raises(ConfigError, match="nothing to calibrate"),
            calibrated(source, make_plan(source, bits), text, tmp_path / "packed", silent),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_overflows_is_named(text: Text, tmp_path: Path) -> None:
    directory = make_hf_model(tmp_path / "model", dtype=torch.float32)
    with edited_tensors(directory / "model.safetensors") as tensors:
        tensors["backbone.layers.3.mixer.experts.2.down_proj.weight"] *= 1e38
    source = open_checkpoint(directory)
    with (
        pytest.raises(CheckpointError, match="values are not finite after block 3"),
        calibrated(source, make_plan(source), text, tmp_path / "packed", silent),
    ):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    """/dev/full is no directory, but its driver says what a full disk says."""
    scratch = Scratch(tmp_path / "packed")
    scratch._file.close()
    with (
        Path("/dev/full").open("wb", buffering=0) as scratch._file,
        pytest.raises(Exhausted, match=r"cannot write .*/packed: no room"),
    ):
        scratch.put("inputs", torch.zeros(5000))


def test_reads_windows_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.py"
    path.write_text("import os\n" * 1000)
    text = read_text(path, DEMO)
    assert text.name == "text.py" and [len(window) for window in text.windows[:-1]] == [WINDOW] * (
        len(text.windows) - 1
    )
    path.write_text("import os\n" * 100_000)
    assert read_text(path, DEMO).tokens == MOST_TOKENS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"print('short')", "has [0-9]+ tokens; give at least 512"), (b"\xff" * 5000, "codec can't decode")],
)
def test_texts_that_cannot_be_used(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot calibrate on {path}: .*{complaint}"):
        read_text(path, DEMO)


def test_a_model_without_tokenizer(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("text " * 1000)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded"):
        read_text(path, pristine)


def test_command(tmp_path: Path) -> None:
    """The packed copy says what it is rounded for, and is another than without: worse weight by weight."""
    model = make_hf_model(tmp_path / "model", vocab_size=2048)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, model)
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 100)
    reports = []
    for name, words in {"plain": (), "calibrated": ("--calibrate", text)}.items():
        printed = run("pack", model, tmp_path / name, "--bits", "4", "--dense-bits", "5", *words)
        assert ("rounded for " in printed) == (name == "calibrated")
        reports.append(json.loads(run("inspect", tmp_path / name, "--errors", "--json")))
    assert reports[0]["calibration"] is None
    assert re.fullmatch(r"[0-9]+ tokens of text\.py", reports[1]["calibration"])
    for plain, rounded in zip(*(report["errors"]["kinds"] for report in reports), strict=True):
        if not plain["kind"].endswith("down_proj"):  # there padding takes part of the errors
            assert plain["relative_error"] < rounded["relative_error"] < 1.5 * plain["relative_error"]
    with pytest.raises(CheckpointError, match="exists already"):
        run("pack", model, tmp_path / "calibrated", "--calibrate", text)
    run("pack", model, tmp_path / "other", "--calibrate", tmp_path / "missing", status=2)
