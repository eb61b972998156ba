"""Pictures that every room's tests can use, drawn here; real ones come through $VICINAL_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)  # a red test must be red for the next person too
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests keep embeddings to themselves."""
    os.environ["VICINAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The shared real data, or a skip that says so."""
    folder = os.environ.get("VICINAL_DATA")
    if not folder:
        pytest.skip("VICINAL_DATA is not set: the real data are not here")
    return Path(folder)
