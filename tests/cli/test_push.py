"""`push` as the command line calls it; what the Hub receives is tested with the library."""

import json
from pathlib import Path

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.hub.manifest import write_manifest
from hf_kd_ranking.hub.model_card import write_model_card
from hf_kd_ranking.searcher import Pipeline, save_pipeline


@pytest.fixture
def folder(encoder, tokenizer, tmp_path):
    """A saved BERT_DOT with manifest and card, and what `benchmark` measured of it."""
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    ranker, folder = kd.Ranker(model, tokenizer), tmp_path / "ranker"
    ranker.save_pretrained(folder)
    write_manifest(folder, kd.RankingTrainingArguments(str(folder), use_cpu=True).to_dict(), 7, {"after": {}}, {})
    write_model_card(folder)
    measured = kd.measure_efficiency({"fast": lambda: ranker}, ["a b"], ["c", "d e"])
    (tmp_path / "efficiency.json").write_text(json.dumps(measured))
    return folder


def test_a_dry_run_lists_every_file_with_its_size(call, folder):
    status, out, _ = call(f"push {folder} me/ranker --private --dry-run")
    *files, total = out.splitlines()
    shown = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in files}
    assert (status, shown["model.safetensors"]) == (0, (folder / "model.safetensors").stat().st_size)
    assert {"model.safetensors", "README.md", "manifest.json", "bert_dot.py", "tokenizer.json"} <= shown.keys()
    assert total.split() == [f"{sum(shown.values()):,}", *"bytes would go to private repository me/ranker".split()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path)] = (path.read_bytes(), path.stat().st_mtime_ns)
    return files


@pytest.mark.parametrize("kind", ["ranker", "best"])
def test_a_dry_run_changes_no_file_at_all(call, folder, toy, tmp_path, kind):
    if kind == "best":
        documents = kd.TextStore.from_tsv(toy / "collection.tsv")
        save_pipeline(
            tmp_path / "best",
            Pipeline(documents, kd.BM25Index.build(documents), kd.Ranker.from_pretrained(folder)),
            folder,
        )
    before = contents(tmp_path)
    for options in ("", f"--efficiency {tmp_path}/efficiency.json --name fast"):
        status, _, err = call(f"push {tmp_path / kind} org/other-name {options} --dry-run")
        assert (status, contents(tmp_path) == before) == (0, True), err


def test_measured_efficiency_goes_into_the_card_of_a_push(call, folder, tmp_path):
    before = (folder / "README.md").read_bytes()
    sizes = []
    for options in ("", f"--efficiency {tmp_path}/efficiency.json --name fast"):
        status, out, _ = call(f"push {folder} me/r {options} --dry-run --json")
        assert status == 0 and (folder / "README.md").read_bytes() == before
        sizes.append(json.loads(out)["files"]["README.md"])
    assert sizes[1] > sizes[0]


def test_push_of_a_pipeline_lists_all_its_parts(call, folder, toy, tmp_path):
    documents = kd.TextStore.from_tsv(toy / "collection.tsv")
    pipeline = Pipeline(documents, kd.BM25Index.build(documents), kd.Ranker.from_pretrained(folder))
    save_pipeline(tmp_path / "best", pipeline, folder)
    status, out, _ = call(f"push {tmp_path}/best me/best --dry-run")
    shown = {line.split()[1] for line in out.splitlines()[:-1]}
    assert status == 0 and not (tmp_path / "best" / "README.md").exists()
    assert {"pipeline.json", "README.md", "ranker/model.safetensors", "documents/texts.bin"} <= shown
    assert {"first_stage/artifact.json", "first_stage/v1/data.csc.index.npy"} <= shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{tmp} me/r", "is not a checkpoint"),
        ("{folder} ranker", "owner/name"),
        (
            "{folder} me/r --efficiency {tmp}/efficiency.json",
            "'ranker' was not measured; the measured rankers are fast",
        ),
        ("{folder} me/r --efficiency {tmp}/none.json", "none.json"),
    ],
)
def test_push_refuses_bad_input_in_one_line(call, folder, tmp_path, capsys, options, words):
    capsys.readouterr()  # what making the folder printed
    status, _, err = call(f"push {options.format(tmp=tmp_path, folder=folder)} --dry-run")
    assert status == 2
    assert words in err and len(err.splitlines()) == 1
