"""Which matrix gets how many bits: options, recipes, what the source has; and that such a mixture serves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHForCausalLM
from typer import Typer
from typer.testing import CliRunner

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.names import canonical, packable_dense
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import BitPlan, make_plan, read_recipe
from common.checkpoint.source import Matrix
from common.errors import ConfigError, ServingError
from common.expert_key import ExpertKey
from common.record import ExpertBits
from expert_store import files_cli
from tests.helpers.engines import full_arena, load, prompt_logits

UP_OF_LAYER_1 = "backbone.layers.3.mixer.experts.*.up_proj"
IN_PROJ = "backbone.layers.0.mixer.in_proj"
MIXED = {
    "*.experts.*": 4,
    "*.layers.1.mixer.experts.*.down_proj": 16,
    UP_OF_LAYER_1: 3,
    "*.shared_experts.*": 8,
    "*.in_proj": 6,
    "lm_head": 5,
}


@pytest.fixture(scope="module")
def mixed(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    source = open_checkpoint(pristine)
    plan = make_plan(source, recipe=MIXED)
    return pack(source, tmp_path_factory.mktemp("mixed") / "packed", plan, lambda *_: None)


def plan_of(source: Path, *options: Any, **named: Any) -> BitPlan:
    return make_plan(open_checkpoint(source), *options, **named)


def test_five_bits_and_unpacked_dense_weights_by_default(pristine: Path) -> None:
    assert plan_of(pristine) == BitPlan((ExpertBits(5, 5),) * 2, {})


def test_bits_are_for_experts_and_dense_bits_for_the_rest(pristine: Path) -> None:
    plan = plan_of(pristine, 3, 8)
    assert plan.experts == (ExpertBits(3, 3),) * 2
    assert plan.dense == dict.fromkeys(packable_dense(open_checkpoint(pristine).config), 8)
    kinds = {name.split(".")[-2] for name in plan.dense}
    assert kinds == {*(f"{kind}_proj" for kind in ("in", "out", "q", "k", "v", "o", "up", "down")), "lm_head"}
    assert plan_of(pristine, 16, 16) == BitPlan((ExpertBits(16, 16),) * 2, {})


def test_the_last_pattern_that_fits_counts(pristine: Path) -> None:
    general, special = {"*.experts.*.up_proj": 6, "*_proj": 6}, {UP_OF_LAYER_1: 2, IN_PROJ: 8}
    plan = plan_of(pristine, recipe=general | special)
    assert plan.experts == (ExpertBits(6, 6), ExpertBits(2, 6)) and plan.dense[f"{IN_PROJ}.weight"] == 8
    plan = plan_of(pristine, recipe=special | general)
    assert plan.experts == (ExpertBits(6, 6),) * 2 and plan.dense[f"{IN_PROJ}.weight"] == 6
    assert "lm_head.weight" not in plan.dense


def test_a_recipe_comes_before_the_options(pristine: Path) -> None:
    plan = plan_of(pristine, 4, 8, {UP_OF_LAYER_1: 3, IN_PROJ: 16, "lm_head": 6})
    assert plan.experts == (ExpertBits(4, 4), ExpertBits(3, 4))
    assert f"{IN_PROJ}.weight" not in plan.dense and plan.dense["lm_head.weight"] == 6
    assert set(plan.dense.values()) == {6, 8}


def test_patterns_are_matched_whole_and_with_case(pristine: Path) -> None:
    for pattern in ("experts", "LM_HEAD", "lm_head.weight", "proj", "lm_hea"):
        with pytest.raises(ConfigError, match=f"names no matrix of this model.*'{pattern}'"):
            plan_of(pristine, recipe={pattern: 4})
    assert plan_of(pristine, recipe={"lm_hea?": 4, "*.experts.[0-7].*": 4}).dense == {"lm_head.weight": 4}


@pytest.mark.parametrize(
    "name", ["backbone.embeddings", "*.norm", "*.gate", "*.conv1d", "*.A_log", "backbone.layers.9.*", "mtp.*"]
)
def test_names_that_cannot_be_packed_are_refused(pristine: Path, name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(pristine, recipe={"*_proj": 4, name: 8})
    assert f"can be packed: {name!r} (" in str(refusal.value)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 32, -5])
@pytest.mark.parametrize("option", ["bits", "dense_bits"])
def test_bits_that_cannot_be_are_refused(pristine: Path, option: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=f"bits {bits}; one of 2, 3, 4, 5, 6, 8, 16"):
        plan_of(pristine, **{option: bits})


def test_experts_of_one_layer_cannot_differ(pristine: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"different bits \(backbone\.layers\.3\.mixer\.experts\.0\.up_proj"
    ):
        plan_of(pristine, recipe={"*.experts.*": 4, "*.layers.3.mixer.experts.5.up_proj": 3})
    with pytest.raises(ConfigError, match="different bits"):
        plan_of(pristine, recipe={"*.experts.0.*": 5})
    one_by_one = {f"*.experts.{expert}.*": 3 for expert in range(8)}
    assert plan_of(pristine, recipe=one_by_one).experts == (ExpertBits(3, 3),) * 2


def test_a_source_keeps_its_bits_unless_asked(mixed: PackedCheckpoint) -> None:
    source = mixed.directory
    assert plan_of(source) == mixed.plan
    assert mixed.plan.experts == (ExpertBits(4, 16), ExpertBits(3, 4))
    assert plan_of(source, 5) == BitPlan((ExpertBits(5, 5),) * 2, mixed.plan.dense)
    assert plan_of(source, dense_bits=16) == BitPlan(mixed.plan.experts, {})
    other = plan_of(source, recipe={"*.experts.*.down_proj": 8, "lm_head": 16})
    assert other.experts == (ExpertBits(4, 8), ExpertBits(3, 8))
    assert other.dense == {name: bits for name, bits in mixed.plan.dense.items() if name != "lm_head.weight"}


def test_a_plan_in_words(pristine: Path) -> None:
    assert plan_of(pristine).describe() == "5 bits"
    assert plan_of(pristine, recipe=MIXED).describe() == "3 and 4 and 16 bits, dense 5 and 6 and 8"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not a recipe: Expecting"),
        ("[]", "must be an object like"),
        ("{}", "must be an object like"),
        ('"*"', "must be an object like"),
        ('{"*": 3, "lm_head": 4, "*": 5}', "a pattern is there twice"),
        ('{"*": 7}', r"'\*': unsupported number of bits 7; one of 2, 3"),
        ('{"*": "5"}', r"the bits of '\*' must be a number, not '5'"),
        ('{"*": 5.0}', "must be a number, not 5.0"),
        ('{"*": true}', "must be a number, not True"),
        ('{"*": {"bits": 5}}', "must be a number"),
        (b"\xff", "is not a recipe: 'utf-8'"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"{path}.*{complaint}"):
        read_recipe(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.json is not a recipe: .*No such file"):
        read_recipe(tmp_path / "recipe.json")


@pytest.fixture
def command() -> Callable[..., str]:
    """Runs a command that must succeed; its standard output."""
    app = Typer()
    files_cli.register(app)

    def run(*words: str | Path) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(result.exception, ServingError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_a_recipe_on_the_command_line(
    pristine: Path, mixed: PackedCheckpoint, tmp_path: Path, command: Callable[..., str]
) -> None:
    recipe, packed = tmp_path / "recipe.json", tmp_path / "packed"
    recipe.write_text(json.dumps(MIXED))
    said = command("pack", pristine, packed, "--recipe", recipe)
    assert "16 experts at 3 and 4 and 16 bits, dense 5 and 6 and 8" in said
    assert PackedCheckpoint.open(packed).fingerprint == mixed.fingerprint
    assert command("verify", packed).startswith("OK")
    described = json.loads(command("inspect", packed, "--json"))
    assert (described["bits"]["up_proj"], described["bits"]["down_proj"]) == ([4, 3], [16, 4])
    assert (described["bits"]["in_proj"], described["bits"]["lm_head"]) == (6, 5)
    assert described["record_stride"] == mixed.layout.stride
    recipe.write_text(json.dumps({"*.experts.0.*": 3}))
    with pytest.raises(ConfigError, match="different bits"):
        command("pack", pristine, tmp_path / "other", "--recipe", recipe)
    assert not (tmp_path / "other").exists()


def test_layers_of_different_bits_serve(pristine: Path, mixed: PackedCheckpoint) -> None:
    """Against transformers on the decoded weights, in float32: records of both layers have one stride."""
    sizes = [layout.size for layout in mixed.layout.layers]
    assert sizes[0] > sizes[1] and mixed.layout.stride == sizes[0]
    reference = NemotronHForCausalLM.from_pretrained(pristine, dtype=torch.float32).eval()
    set_weights(reference, mixed)
    tokens = [(7 * i * i + 3 * i) % 96 for i in range(40)]
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens])).logits[0]
    with full_arena(mixed) as link:
        ours = prompt_logits(load(link, slots=3).engine, tokens)
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-4


@torch.no_grad()
def set_weights(reference: NemotronHForCausalLM, packed: PackedCheckpoint) -> None:
    """Give transformers' model the decoded weights of a packed checkpoint."""
    layers = {block: layer for layer, block in enumerate(packed.config.blocks_of("E"))}
    for name, tensor in reference.state_dict().items():
        if ".experts." not in name:
            tensor.copy_(decoded(packed.dense_matrix(canonical(name))))
            continue
        layer, which = layers[int(name.split(".")[2])], int(name.endswith("down_proj"))
        for expert in range(packed.config.n_routed_experts):
            tensor[expert].copy_(decoded(packed.expert(ExpertKey(layer, expert))[which]))


def decoded(matrix: Matrix) -> torch.Tensor:
    """In full precision, unlike what `unpack` writes."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.decode(torch.float32)
