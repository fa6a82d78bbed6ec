"""Every notebook runs from its first cell to its last, and says what it says in the repository."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"

#: What a cell must print, whoever runs it: figures of seeded data do not move.
STEADY = {"training_set.ipynb": ["6,766 rows, 998 of them frauds", "the same bytes: True"]}


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_and_prints_what_it_shows(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    shown = _printed(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    printed = _printed(notebook)
    for line in STEADY[path.name]:
        assert line in printed
        assert line in shown, f"{path.name} was saved with other outputs; run it and save it again"


def _printed(notebook: nbformat.NotebookNode) -> str:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_there_is_a_notebook() -> None:
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(STEADY)
