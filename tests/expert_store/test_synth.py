"""`expert-store synth` and the checkpoints it writes: same bytes for the same seed, marked, complete."""

from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from common.checkpoint import PackedCheckpoint, open_checkpoint
from common.checkpoint.names import packable_dense
from common.checkpoint.packed import layer_file
from common.checkpoint.packed_writer import pack
from common.checkpoint.plan import make_plan
from common.errors import CheckpointError, ConfigError
from common.expert_key import ExpertKey
from common.hlwq.codebook import packing_codebook
from common.hlwq.matrix import PackedMatrix
from expert_store import synth_cli
from expert_store.inspect import describe
from tests.helpers.synth import make_synthetic

app = typer.Typer()
synth_cli.register(app)
ROWS_OF_THREE_BLOCKS = {"hidden_size": 384, "moe_intermediate_size": 300}
SMALL = ("--pattern", "ME", "--experts", "6", "--vocab", "300", "--bits", "2", "--dense-bits", "2")


def run(*words: str | Path, status: int = 0) -> str:
    """Output of a command that must end with `status`; a ServingError is raised as it is."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    """Five blocks at tiny widths; not to be changed."""
    return make_synthetic(tmp_path_factory.mktemp("synth") / "tiny", skew=1.0, **ROWS_OF_THREE_BLOCKS)


def test_the_command_makes_the_real_widths(tmp_path: Path) -> None:
    destination = tmp_path / "small"
    output = run(destination, *SMALL, "--seed", "3", "--skew", "0.5")
    name = "synthetic nemotron-cascade-2-30b-a3b, 2 blocks, seed 3, skew 0.5"
    assert name in output and "6 experts at 2 bits, dense 2" in output
    checkpoint = PackedCheckpoint.open(destination)
    config = checkpoint.config
    assert (config.pattern, config.n_routed_experts, config.vocab_size) == ("ME", 6, 300)
    assert (config.hidden_size, config.moe_intermediate_size, config.mamba_num_heads) == (2688, 1856, 64)
    assert checkpoint.plan.experts == ((2, 2),)
    assert checkpoint.plan.dense == dict.fromkeys(packable_dense(config), 2)
    assert not checkpoint.manifest.damaged_files(destination, lambda done, total: None)
    assert [path.name for path in tmp_path.iterdir()] == ["small"], "something is left beside it"


def test_it_is_marked_synthetic(synthetic: PackedCheckpoint, tmp_path: Path) -> None:
    described = describe(synthetic.directory)
    assert described["synthetic"] is True
    assert described["source"] == "synthetic nemotron-cascade-2-30b-a3b, 5 blocks, seed 0, skew 1"
    source = synthetic.manifest.source
    assert (source["shape"], source["seed"], source["skew"]) == ("nemotron-cascade-2-30b-a3b", "0", "1")
    opened = open_checkpoint(synthetic.directory)
    again = pack(opened, tmp_path / "again", make_plan(opened, 4), lambda done, total: None)
    assert again.synthetic and again.name == "tiny (synthetic)"


def test_the_same_seed_gives_the_same_bytes(synthetic: PackedCheckpoint, tmp_path: Path) -> None:
    """Also with another number of threads, and another seed gives others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = make_synthetic(tmp_path / "again", skew=1.0, **ROWS_OF_THREE_BLOCKS)
    finally:
        torch.set_num_threads(threads)
    assert again.manifest == synthetic.manifest
    other = make_synthetic(tmp_path / "other", skew=1.0, seed=1, **ROWS_OF_THREE_BLOCKS)
    assert other.manifest.source["identity"] != synthetic.manifest.source["identity"]
    same = {name for name, entry in other.manifest.files.items() if entry == synthetic.manifest.files[name]}
    assert not same & {"dense.safetensors", layer_file(0), layer_file(1)}


def test_no_two_rows_of_experts_are_equal(synthetic: PackedCheckpoint) -> None:
    """Codes alone, without norms, over all experts of all layers."""
    keys = [ExpertKey(layer, expert) for layer in range(2) for expert in range(16)]
    for matrices in zip(*map(synthetic.expert, keys), strict=True):
        codes = torch.cat([matrix.codes() for matrix in matrices if isinstance(matrix, PackedMatrix)])
        assert codes.shape in {(32 * 300, 384), (32 * 384, 384)}
        assert len({row.numpy().tobytes() for row in codes}) == len(codes)


def test_records_carry_the_codebook_of_packing(synthetic: PackedCheckpoint) -> None:
    for matrix in synthetic.expert(ExpertKey(1, 7)):
        assert isinstance(matrix, PackedMatrix) and matrix.codebook is not None
        assert torch.equal(matrix.codebook, packing_codebook(5))


def test_dense_weights_are_in_the_ranges_of_the_real_model(synthetic: PackedCheckpoint) -> None:
    tensors = load_file(synthetic.directory / "dense.safetensors")
    mamba = "backbone.layers.0.mixer."
    steps = torch.nn.functional.softplus(tensors[mamba + "dt_bias"].double())
    assert float(steps.min()) * 1.001 >= 0.001 and float(steps.max()) <= 0.1001
    decays = tensors[mamba + "A_log"].exp()
    assert float(decays.min()) >= 1 and float(decays.max()) <= 16.001 and float(decays.std()) > 1
    assert bool((tensors[mamba + "D"] == 1).all())
    assert float(tensors[mamba + "conv1d.weight"].float().std()) == pytest.approx(0.5, rel=0.1)
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "norm_f.weight")):
            assert float(tensor.float().mean()) == pytest.approx(1, abs=0.05)
    assert tensors["backbone.embeddings.weight"].dtype == torch.bfloat16


def test_raw_records(tmp_path: Path) -> None:
    checkpoint = make_synthetic(tmp_path / "raw", bits=16, dense_bits=8)
    up, down = checkpoint.expert(ExpertKey(0, 0))
    assert isinstance(up, PackedMatrix) and isinstance(down, PackedMatrix)
    assert up.decode().std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert set(checkpoint.plan.dense.values()) == {8}
    assert isinstance(checkpoint.dense_matrix("backbone.embeddings.weight"), torch.Tensor)


def test_an_existing_destination_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        run(tmp_path, *SMALL)


def test_impossible_models_are_refused(tmp_path: Path) -> None:
    for words in (["--blocks", "53"], ["--pattern", "MM"], ["--experts", "5"], ["--vocab", "100"]):
        with pytest.raises(ConfigError):
            run(tmp_path / "x", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "gpt-2"],
        ["--blocks", "5", "--pattern", "ME"],
        ["--bits", "7"],
        ["--dense-bits", "1"],
        ["--skew", "-1"],
        ["--skew", "nan"],
        ["--seed", "-1"],
    ],
)
def test_usage_errors_exit_with_2(words: list[str], tmp_path: Path) -> None:
    run(tmp_path / "x", *words, status=2)
    assert not list(tmp_path.iterdir())
