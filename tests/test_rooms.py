"""The rooms keep their walls: `common` imports neither process, and the processes never import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "common": {"expert_store", "gpu_worker"},
    "expert_store": {"gpu_worker"},
    "gpu_worker": {"expert_store"},
}


def imported_rooms(path: Path) -> set[str]:
    """First parts of every module that `path` imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import hides which room it reaches"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not imported_rooms(path) & FORBIDDEN[room], f"{path} reaches into another room"


@pytest.mark.parametrize("room", FORBIDDEN)
def test_every_file_says_what_it_owns(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        if "_pb2" not in path.name:
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a docstring"
