"""The demo model that ships: small enough to carry, and every block type of the real architecture."""

import json

from common.model_config import ATTENTION, MAMBA, ModelConfig
from expert_store.config import DEMO
from expert_store.models import locate_model


def test_the_shipped_model_is_what_its_purpose_asks_for() -> None:
    directory = locate_model(DEMO).directory
    config = ModelConfig.from_directory(directory)
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 20_000_000
    assert config.num_layers >= 4
    assert config.n_routed_experts >= 32
    assert config.num_experts_per_tok >= 4
    assert config.moe_intermediate_size % 128
    assert {MAMBA, ATTENTION} <= set(config.pattern)
    card = (directory / "README.md").read_text()
    for word in ("perplexity", "entropy", "Apache", "none of which was trained on"):
        assert word in card, f"the model card says nothing of {word}"


def test_its_router_is_balanced_by_the_correction_bias() -> None:
    from safetensors import safe_open

    directory = locate_model(DEMO).directory
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    names = [name for name in index if name.endswith("e_score_correction_bias")]
    assert len(names) == ModelConfig.from_directory(directory).num_layers
    for name in names:
        with safe_open(directory / index[name], "pt") as file:
            assert file.get_tensor(name).std() > 0.01, f"{name} was never moved"
