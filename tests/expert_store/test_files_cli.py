"""`expert-store pack | inspect | verify` as a user types them: output, exit status, help."""

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.checkpoint import PackedCheckpoint
from common.checkpoint.packed import layer_file
from common.checkpoint.packing import CODEBOOKS
from common.errors import CheckpointError, ConfigError
from common.record import ExpertBits
from expert_store import files_cli
from tests.helpers.models import unpack_model

app = typer.Typer()
files_cli.register(app)


def run(*words: str | Path, status: int = 0) -> str:
    """Standard output of a command that must end with `status`; a ServingError is raised as it is."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


def test_pack_inspect_verify(pristine: Path, tmp_path: Path) -> None:
    destination = tmp_path / "packed"
    assert "16 experts at 4 bits" in run("pack", pristine, destination, "--bits", "4")
    assert PackedCheckpoint.open(destination).layout.bits == (ExpertBits(4, 4),) * 2
    assert "record stride" in run("inspect", destination)
    lines = run("inspect", destination, "--json").splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["bits"] == {"up_proj": 4, "down_proj": 4, "dense": None}
    assert run("verify", destination).splitlines()[-1].startswith("OK: 5 files")


def test_the_demo_is_known_by_its_name_and_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    assert json.loads(run("inspect", "demo", "--json"))["directory"].endswith("expert_store/demo")
    for missing in (tmp_path / "nowhere", Path(__file__)):
        told = run("inspect", missing, status=2).replace("│", "")  # in a box, wrapped
        assert "is no directory" in " ".join(told.split())


def test_packs_at_five_bits_by_default(pristine: Path, pristine_packed: Path, tmp_path: Path) -> None:
    run("pack", pristine, tmp_path / "packed")
    packed, expected = PackedCheckpoint.open(tmp_path / "packed"), PackedCheckpoint.open(pristine_packed)
    assert packed.fingerprint == expected.fingerprint


def test_verify_lists_damaged_files(pristine: Path, tmp_path: Path) -> None:
    destination = tmp_path / "packed"
    run("pack", pristine, destination)
    content = bytearray((destination / "experts-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (destination / "experts-00000.safetensors").write_bytes(content)
    os.truncate(destination / "dense.safetensors", 0)
    output = run("verify", destination, status=1)
    assert "experts-00000.safetensors differs from its checksum" in output
    assert "dense.safetensors has 0 bytes" in output and "OK" not in output


def test_verify_checks_that_the_files_fit_each_other(pristine_packed: Path, tmp_path: Path) -> None:
    """Checksums may agree while the manifest speaks of another record layout."""
    for path in pristine_packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "packed.json").read_text()) | {"layout": "0" * 32}
    (tmp_path / "packed.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="another layout"):
        run("verify", tmp_path)


def test_repacking_carries_codes_over(pristine_packed: Path, tmp_path: Path) -> None:
    run("pack", pristine_packed, tmp_path / "again", "--dense-bits", "8")
    before, after = (PackedCheckpoint.open(path) for path in (pristine_packed, tmp_path / "again"))
    assert after.plan.experts == before.plan.experts and set(after.plan.dense.values()) == {8}
    for layer in range(2):
        name = layer_file(layer)
        assert (before.directory / name).read_bytes() == (after.directory / name).read_bytes()


def test_the_command_line_names_all_codebooks() -> None:
    assert [codebook.value for codebook in files_cli.Codebook] == list(CODEBOOKS)


def test_a_pack_under_the_published_codebook(pristine: Path, tmp_path: Path) -> None:
    run("pack", pristine, tmp_path / "packed", "--codebook", "published")
    assert json.loads(run("inspect", tmp_path / "packed", "--json"))["codebook"] == "published"
    unpack_model(tmp_path / "packed", tmp_path / "plain", "hlwq-q5")


def test_a_codebook_that_no_matrix_would_get(pristine_packed: Path, tmp_path: Path) -> None:
    """Codes are carried over with theirs: whoever asks for another one must not be left to find out."""
    for bits in ("5", "16"):
        with pytest.raises(ConfigError, match="nothing to choose a codebook for"):
            run("pack", pristine_packed, tmp_path / "again", "--bits", bits, "--codebook", "published")
    run("pack", pristine_packed, tmp_path / "again", "--dense-bits", "8", "--codebook", "published")
    assert PackedCheckpoint.open(tmp_path / "again").manifest.codebook == "mixed"


@pytest.mark.parametrize(
    "words",
    [
        ["pack", ".", "x", "--bits", "7"],
        ["pack", ".", "x", "--codebook", "best"],
        ["pack", "."],
        ["inspect", "/no/such/directory"],
        ["verify"],
        ["unpack"],
    ],
)
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    run(*words, status=2)


@pytest.mark.parametrize("command", ["pack", "inspect", "verify"])
def test_help_shows_an_example(command: str) -> None:
    assert f"Example: expert-store {command} " in run(command, "--help")
