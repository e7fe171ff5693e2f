"""The notebooks of examples/: each runs from its first cell to its last, with few rollouts, in one kernel that all share."""

import json
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from jupyter_client.manager import start_new_kernel  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
FEW = {"rollouts": 1, "prompts_per_rollout": 2, "evaluation_images": 6}
LARGEST = 200_000
"""Bytes of a notebook with its pictures."""


@pytest.fixture(scope="module")
def kernel():
    """A kernel, whose imports all notebooks share."""
    manager, client = start_new_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


def read(path):
    return nbformat.read(path, as_version=4)


def parameters(notebook):
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, kernel, tmp_path):
    notebook = read(path)
    cell = parameters(notebook)
    cell.source += "\n" + "\n".join(f"{name} = {value}" for name, value in FEW.items())
    start = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(tmp_path)!r})")
    notebook.cells.insert(0, start)
    NotebookClient(notebook, km=kernel, timeout=300).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output["text"] for output in outputs if output.get("name") == "stderr" and "Warning" in output["text"]]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "few_steps", "own_objective", "own_reward", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_with_pictures_and_is_small(path):
    assert path.stat().st_size < LARGEST
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    text = json.dumps(notebook)
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text
    assert "flowtilt-*.whl" in text and notebook.metadata.kernelspec.name == "python3"  # Colab's form
