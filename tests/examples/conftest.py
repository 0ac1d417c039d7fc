"""Run the files of examples/ in this process, on toy files."""

import random
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_kd_ranking as kd

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river".split()
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys) -> Callable[..., str]:
    """run_example("rank.py", "--model", folder): run a script as a program, and return what it prints."""

    def run(script: str, *arguments: object) -> str:
        path = EXAMPLES / script
        monkeypatch.setattr("sys.argv", [str(path), *(str(argument) for argument in arguments)])
        monkeypatch.syspath_prepend(path.parent)  # as Python does for a program
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Paths of 60 documents, 60 queries whose words are from one document, and a judgment each, by option."""
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)
    documents = [rng.choices(WORDS, k=8) for _ in range(60)]
    lines = {"collection": [], "queries": [], "qrels": []}
    for number, words in enumerate(documents):
        lines["collection"].append(f"{number}\t{' '.join(words)}\n")
        lines["queries"].append(f"{100 + number}\t{' '.join(rng.sample(words, 3))}\n")
        lines["qrels"].append(f"{100 + number} 0 {number} 1\n")
    paths = {}
    for name, content in lines.items():
        paths[f"--{name}"] = folder / f"{name}.tsv"
        paths[f"--{name}"].write_text("".join(content))
    return paths


@pytest.fixture
def save_ranker(tmp_path, encoder, tokenizer) -> Callable[[str], Path]:
    """save_ranker("bert_dot"): folder of a tiny ranker."""

    def save(architecture: str) -> Path:
        model = kd.load_ranker(encoder, architecture, max_query_length=8, max_document_length=16)
        kd.Ranker(model, tokenizer).save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return save
