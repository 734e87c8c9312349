"""One tiny model, unpacked and packed, for the file commands."""

from pathlib import Path

import pytest

from tests.helpers.models import make_hf_model, pack_model


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it; not to be changed."""
    return make_hf_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pristine_packed(pristine: Path) -> Path:
    """The same packed at 5 bits; not to be changed."""
    return pack_model(pristine, pristine.with_name("tiny-q5")).directory
