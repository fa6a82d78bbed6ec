"""Throw-away Feast repositories over the generated data: one set of definitions, Isochron's stores or Feast's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_ISOCHRON = {
    "offline_store": {"type": "feature_store.adapters.feast.IsochronOfflineStore"},
    "online_store": {"type": "feature_store.adapters.feast.IsochronOnlineStore", "path": "online.lmdb"},
    "batch_engine": {"type": "feature_store.adapters.feast.IsochronEngine"},
}
_FEAST = {"online_store": {"type": "sqlite", "path": "online.db"}}

#: What each kind of repository adds to `feature_store.yaml`.
STORES: dict[str, dict[str, Any]] = {
    "isochron": _ISOCHRON,
    "isochron_4gb": _ISOCHRON | {"offline_store": {**_ISOCHRON["offline_store"], "memory_limit": "4GB"}},
    "feast_duckdb": _FEAST | {"offline_store": {"type": "duckdb"}},
    "feast_file": _FEAST | {"offline_store": {"type": "file"}},
}


def make_repo(data: Path, kind: str) -> Path:
    """A new applied repository of that kind, in a folder of `data` of its name."""
    return apply_repo(data / kind, STORES[kind], ["definitions.py"], by_isochron=kind.startswith("isochron"))


def apply_repo(repo: Path, stores: Mapping[str, Any], definitions: Sequence[str], by_isochron: bool) -> Path:
    """A new applied repository in that folder, with those stores, of definitions that lie beside this file.

    Raises RuntimeError with what the command said when it is refused.
    """
    shutil.rmtree(repo, ignore_errors=True)
    repo.mkdir(parents=True)
    config = {"project": "bench", "provider": "local", "registry": "registry.db", **stores}
    (repo / "feature_store.yaml").write_text(yaml.safe_dump(config | {"entity_key_serialization_version": 3}))
    for name in definitions:
        shutil.copy(Path(__file__).with_name(name), repo)
    command = ["isochron", "apply", "--repo", "."] if by_isochron else ["feast", "apply", "--skip-source-validation"]
    program = str(Path(sys.executable).with_name(command[0]))
    applied = subprocess.run([program, *command[1:]], cwd=repo, capture_output=True, text=True, check=False)
    if applied.returncode:
        raise RuntimeError(f"{repo.name}: apply failed: {(applied.stdout + applied.stderr).strip()}")
    return repo
