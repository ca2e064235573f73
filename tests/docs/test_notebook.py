"""The notebook runs from top to bottom, in a kernel of its own, with fewer pictures and steps."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.docs_commands import ROOT
from tests.helpers.docs_stand_ins import SMALL

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_output(notebook):
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)


def test_it_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    smaller = nbformat.v4.new_code_cell(f"config.update_from_flattened_dict({SMALL!r})")
    cells = []
    for cell in notebook.cells:
        cells += [cell, smaller] if "config.run_name" in cell.source else [cell]
    assert len(cells) == len(notebook.cells) + 2
    notebook.cells = cells
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    printed = "".join(output.text for output in shown if output.get("name") == "stdout")
    assert "clip:" in printed and "->" in printed
    assert list((tmp_path / "logs").iterdir())
