"""Nothing that a checkpoint, a peer or a client sends is run as code, or taken for a path to open."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor

from common.rpc import gpu_worker_pb2

ROOT = Path(__file__).parent.parent
FILES = [path for room in ("common", "expert_store", "gpu_worker") for path in (ROOT / room).rglob("*.py")]
RUN_WHAT_THEY_READ = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "imp",
    "runpy",
}


def test_no_module_loads_code_from_data() -> None:
    """Beyond what ruff's S rules see: torch.load, remote code of Hugging Face, unpickling by numpy."""
    assert len(FILES) > 100
    bad = [
        f"{path}:{line}: {what}"
        for path in FILES
        for line, what in loads_of_code(ast.parse(path.read_text()))
    ]
    assert bad == []


def test_that_test() -> None:
    text = "import pickle\nfrom shelve import open\ntorch.load(f)\nnp.load(f, allow_pickle=True)\n"
    text += "AutoModel.from_pretrained(d)\nAutoModel.from_pretrained(d, trust_remote_code=x)\n"
    assert {line for line, _ in loads_of_code(ast.parse(text))} == {1, 2, 3, 4, 5, 6}
    assert not list(
        loads_of_code(ast.parse("json.load(f)\nAutoModel.from_pretrained(d, trust_remote_code=False)"))
    )


def loads_of_code(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines, and what they do that is not done here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            )
            if {name.split(".")[0] for name in modules} & RUN_WHAT_THEY_READ:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            trusted = given.get("trust_remote_code", "" if re.match(r"Auto\w+\.from_", called) else "False")
            if called in ("torch.load", "numpy.load", "np.load") or trusted != "False":
                yield node.lineno, ast.unparse(node)


def test_no_request_of_a_client_has_a_place_for_a_path() -> None:
    service = gpu_worker_pb2.DESCRIPTOR.services_by_name["GpuWorker"]
    names = {name for method in service.methods for name in fields_of(method.input_type, set())}
    assert {"text", "token_ids", "tools_json"} <= names
    assert not [name for name in names if re.search("path|file|dir|url|uri|endpoint|address", name)]


def fields_of(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """Names of the fields of a message and of those inside it."""
    seen.add(message.full_name)
    for field in message.fields:
        yield field.name
        if field.message_type is not None and field.message_type.full_name not in seen:
            yield from fields_of(field.message_type, seen)
