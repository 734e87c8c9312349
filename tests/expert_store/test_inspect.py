"""What `inspect` says of a checkpoint, against what is in its files."""

from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file

from common.checkpoint import PackedCheckpoint
from expert_store.inspect import as_table, describe


def test_unpacked(pristine: Path) -> None:
    described = describe(pristine)
    tensors = load_file(pristine / "model.safetensors")
    routed = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    dense = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    assert described["kind"] == "huggingface" and described["bits"] is None
    for kind, part in (("routed", routed), ("dense", dense)):
        assert described["parameters"][kind] == sum(tensor.numel() for tensor in part.values())
        assert described["bytes"][kind] == sum(tensor.nbytes for tensor in part.values())
    assert described["blocks"] == {"mamba": 2, "moe": 2, "attention": 1, "mlp": 1}
    assert (described["layers"], described["experts_per_layer"], described["experts_per_token"]) == (2, 8, 2)


def test_packed(pristine: Path, pristine_packed: Path) -> None:
    described, unpacked = describe(pristine_packed), describe(pristine)
    checkpoint = PackedCheckpoint.open(pristine_packed)
    assert described.keys() == unpacked.keys()
    assert described["parameters"] == unpacked["parameters"]
    assert described["kind"] == "packed" and described["bits"] == {
        "up_proj": 5,
        "down_proj": 5,
        "dense": None,
    }
    assert described["record_stride"] == checkpoint.layout.stride
    assert described["bytes"]["routed"] == 16 * checkpoint.layout.stride
    assert described["bytes"]["dense"] == unpacked["bytes"]["dense"]
    assert (described["codebook"], described["source"], described["synthetic"]) == (
        "converged",
        "tiny",
        False,
    )
    assert described["fingerprint"] == checkpoint.fingerprint


def test_table_shows_every_value(pristine_packed: Path) -> None:
    described = describe(pristine_packed) | {"directory": "/models/[q5]"}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(as_table(described))
    text = capture.get()
    for word in (
        "/models/[q5]",
        "mamba 2, moe 2",
        "up_proj 5",
        "routed 294,912",
        "20.5 kB",
        "converged",
        "no",
    ):
        assert word in text
    assert len(text.splitlines()) == len(described)
