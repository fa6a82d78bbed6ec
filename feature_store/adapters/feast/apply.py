"""`isochron apply`: Feast's own plan and apply, with the checks that Feast gives plug-ins only under plan."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click
from feast.cli.cli import cli as feast_cli

from feature_store.adapters.feast.compile import without_feasts_warnings
from feature_store.adapters.feast.registry import compile_repository
from feature_store.config import load_config
from feature_store.definitions.repository import Definitions
from feature_store.errors import DefinitionRefused


def apply(repo: Path) -> Definitions:
    """Checks a repository's views, services and on-demand views, applies it with Feast, and compiles its definitions.

    Raises DefinitionRefused, with the registry as it was, when the contract or Feast refuses something.
    """
    config = load_config(repo)
    config.registry.parent.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    try:
        with without_feasts_warnings():
            for command in ("plan", "apply"):
                _feast(config.root, command)
    except click.ClickException as error:
        raise DefinitionRefused(error.format_message()) from error
    finally:
        os.chdir(before)
    return compile_repository(config)


def _feast(root: Path, command: str) -> None:
    with contextlib.redirect_stdout(None):
        arguments = ["--chdir", str(root), "--log-level", "error", command, "--skip-source-validation"]
        feast_cli.main(arguments, standalone_mode=False)
