"""What tests of whole workers share: one tiny model, whole in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.engines import full_arena
from tests.helpers.models import make_hf_model, pack_model
from tests.helpers.workers import QuietLink


@pytest.fixture(scope="session")
def quiet_link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuietLink]:
    """As to a store that has loaded every expert. Tests leave it as they find it."""
    directory = tmp_path_factory.mktemp("model")
    checkpoint = pack_model(make_hf_model(directory / "hf"), directory / "packed")
    with full_arena(checkpoint) as link:
        yield QuietLink(link.attachment)
