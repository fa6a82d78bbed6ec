"""What the integration tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def repo(fraud_repo: Path, tmp_path: Path) -> Path:
    """A copy of the applied repository, to write into."""
    return Path(shutil.copytree(fraud_repo, tmp_path / "feature_repo"))
