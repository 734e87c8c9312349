"""One tiny model for the whole room, and copies of it to damage."""

import shutil
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


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def packed(pristine_packed: Path, tmp_path: Path) -> Path:
    """A copy of the packed model."""
    return Path(shutil.copytree(pristine_packed, tmp_path / "packed"))
