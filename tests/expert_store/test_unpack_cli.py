"""`expert-store unpack` as a user types it: output, exit status, help."""

from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from common.checkpoint.unpack_layouts import LAYOUTS
from common.errors import ConfigError
from common.units import format_bytes
from expert_store import unpack_cli
from tests.helpers.models import pack_model

app = typer.Typer()
unpack_cli.register(app)
app.callback()(lambda: None)  # with a single command, typer would leave its name away


def run(*words: str | Path, status: int = 0) -> str:
    """Output of a command that must end with `status`; a ServingError is raised as it is."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


def test_the_command_line_names_all_layouts() -> None:
    assert [layout.value for layout in unpack_cli.Layout] == list(LAYOUTS)


def test_unpacks_to_bf16_by_default(pristine: Path, tmp_path: Path) -> None:
    packed = pack_model(pristine, tmp_path / "packed", 16, 16).directory
    expected = load_file(pristine / "model.safetensors")
    size = format_bytes(sum(tensor.nbytes for tensor in expected.values()))
    output = run("unpack", packed, tmp_path / "plain")
    assert output == f"{tmp_path / 'plain'}: {len(expected)} tensors as bf16, {size} in one file\n"
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == expected.keys()


@pytest.mark.parametrize("layout", ["polar_engine_v5", "hlwq-q5"])
def test_layouts_by_name(pristine: Path, tmp_path: Path, layout: str) -> None:
    packed = pack_model(pristine, tmp_path / "packed", 16, 16).directory
    assert f"as {layout}," in run("unpack", packed, tmp_path / "plain", "--layout", layout)
    assert (tmp_path / "plain" / "polar_config.json").is_file()


def test_what_a_layout_cannot_carry_is_an_error(pristine_packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hlwq-q5"):
        run("unpack", pristine_packed, tmp_path / "plain", "--layout", "hlwq-q5")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("words", [["unpack"], ["unpack", "."], ["unpack", ".", "x", "--layout", "gguf"]])
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    run(*words, status=2)


def test_help_shows_an_example() -> None:
    assert "Example: expert-store unpack " in run("unpack", "--help")
