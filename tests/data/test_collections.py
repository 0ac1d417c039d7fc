"""Collections by name: two layouts of folders, the data folder, the Hub's form, ir_datasets."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import datasets
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data import collections

QUERIES, DOCUMENTS = (
    {"q1": "moon", "q2": "bread", "q3": "not judged"},
    {"d 1": "the moon", "d2": "a loaf", "d3": "jam"},
)
QRELS = {"q1": {"d 1": 1}, "q2": {"d2": 2, "d3": 1}}


def write_beir(folder) -> None:
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": id_, "title": "", "text": text}) for id_, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"{query}\t{doc}\t{grade}" for query, grades in QRELS.items() for doc, grade in grades.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")


def check(collection) -> None:
    assert dict(collection.queries.items()) == QUERIES
    assert dict(collection.documents.items()) == DOCUMENTS
    assert collection.qrels == QRELS
    assert collection.judged_queries() == {"q1": "moon", "q2": "bread"}


@pytest.fixture(autouse=True)
def caches(private_cache, monkeypatch, tmp_path):
    monkeypatch.setenv(collections.DATA_FOLDER, str(tmp_path))


def test_beir_folder_opens_by_path_and_by_name(tmp_path):
    write_beir(tmp_path / "ours")
    for name in (str(tmp_path / "ours"), "ours"):
        collection = kd.load_collection(name)
        check(collection)
        assert collection.candidates is None


def test_a_folder_of_trec_has_splits_and_a_first_stage(tmp_path):
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "collection.tsv").write_text("1\tthe moon\n2\tjam\n")
    (folder / "queries.tsv").write_text("7\tmoon\n")
    (folder / "queries.dev.tsv").write_text("8\tjam\n")
    for split, query in (("test", 7), ("dev", 8)):
        (folder / f"qrels.{split}.txt").write_text(f"{query} 0 1 1\n")
    kd.write_run({"8": [("2", 1.0)]}, folder / "candidates.dev.trec")
    test, dev = kd.load_collection(str(folder)), kd.load_collection(str(folder), "dev")
    assert (dict(test.queries.items()), test.candidates) == ({"7": "moon"}, None)
    assert (dict(dev.queries.items()), dev.candidates) == ({"8": "jam"}, {"8": [("2", 1.0)]})
    other = kd.load_collection(str(folder), parts={"qrels": lambda: {"7": {"2": 3}}})
    assert other.qrels == {"7": {"2": 3}}


def test_a_folder_that_lacks_files_names_them(tmp_path):
    write_beir(tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match=r"lacks .*/qrels/train.tsv: a collection has"):
        kd.load_collection("ours", "train")


@pytest.mark.parametrize(
    ("card", "language"),
    [
        (None, None),
        ("no metadata", None),
        ("---\nlanguage: de\n---\n", "de"),
        ("---\nlanguage: [th]\n---\n", "th"),
        ("---\nlanguage: [de, fr]\n---\n", None),
        ("---\nlanguage: [\n---\n", None),
    ],
)
def test_the_card_of_a_folder_names_its_language(tmp_path, card, language):
    write_beir(tmp_path / "ours")
    if card is not None:
        (tmp_path / "ours" / "README.md").write_text(card)
    assert kd.load_collection("ours").language == language


@pytest.mark.parametrize(("owner", "has_grades"), [("owner", True), ("owner", False), ("mteb", True)])
def test_the_hubs_form_with_and_without_grades(tmp_path, monkeypatch, owner, has_grades):
    rows = [{"query-id": q, "corpus-id": d, "score": grade} for q, of in QRELS.items() for d, grade in of.items()]
    sides = (("queries", QUERIES), ("corpus", DOCUMENTS))
    parts = {name: [{"_id": id_, "text": text} for id_, text in texts.items()] for name, texts in sides}
    qrels = "default" if owner == "mteb" else "qrels"  # the name of the config
    parts[qrels] = rows if has_grades else [{name: row[name] for name in ("query-id", "corpus-id")} for row in rows]
    for name, content in parts.items():
        datasets.Dataset.from_list(content).to_parquet(tmp_path / f"{name}.parquet")
    load = datasets.load_dataset

    def local(name, config):
        assert name == f"{owner}/Nano"
        return load("parquet", data_files={"train": str(tmp_path / f"{config}.parquet")})

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setitem(sys.modules, "ir_datasets", None)  # not installed
    collection = kd.load_collection(f"{owner}/Nano")
    assert dict(collection.documents.items()) == DOCUMENTS
    assert dict(kd.load_collection(f"{owner}/Nano").queries.items()) == QUERIES
    assert collection.qrels == (QRELS if has_grades else {q: dict.fromkeys(of, 1) for q, of in QRELS.items()})


def test_hub_split_is_the_one_asked_for(monkeypatch):
    rows = {"query-id": ["q1"], "corpus-id": ["d2"], "score": [3]}
    splits = datasets.DatasetDict(dev=datasets.Dataset.from_dict(rows), train=datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    assert kd.load_collection("owner/Nano", "dev").qrels == {"q1": {"d2": 3}}
    with pytest.raises(ValueError, match="The qrels of owner/Nano have the splits dev, train, not 'test'"):
        kd.load_collection("owner/Nano").qrels  # noqa: B018


class Text(NamedTuple):
    """A record as ir_datasets has them."""

    id: str
    text: str

    def default_text(self) -> str:
        return self.text


def test_ir_datasets_opens_by_its_names_and_short_ones(monkeypatch):
    module, opened = ModuleType("ir_datasets"), []

    def load(name):
        opened.append(name)
        qrels = [SimpleNamespace(query_id=q, doc_id=d, relevance=g) for q, of in QRELS.items() for d, g in of.items()]
        scored = [
            SimpleNamespace(query_id="q1", doc_id=doc, score=score) for doc, score in (("d2", 1.0), ("d 1", 2.0))
        ]
        return SimpleNamespace(
            docs_iter=lambda: iter([Text(*item) for item in DOCUMENTS.items()]),
            queries_iter=lambda: iter([Text(*item) for item in QUERIES.items()]),
            qrels_iter=lambda: iter(qrels),
            scoreddocs_iter=lambda: iter(scored),
            has_scoreddocs=lambda: True,
        )

    module.load = load
    monkeypatch.setitem(sys.modules, "ir_datasets", module)
    for name in ("trec-dl-2019", "beir/scifact/test"):
        collection = kd.load_collection(name)
        check(collection)
        assert collection.candidates == {"q1": [("d 1", 2.0), ("d2", 1.0)]}
    check(kd.load_collection("trec-dl-2019"))  # from the cache
    assert opened == [
        "msmarco-passage/trec-dl-2019/judged",
        "beir/scifact/test",
        "msmarco-passage/trec-dl-2019/judged",
    ]


def test_an_unknown_name_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(FileNotFoundError, match=r"No collection 'owner/gone': no folder of this name, none"):
        kd.load_collection("owner/gone").qrels  # noqa: B018


@pytest.mark.data
def test_the_folders_of_the_reference_data(monkeypatch):
    monkeypatch.undo()
    collection = kd.load_collection("scifact")
    assert (len(collection.documents), len(collection.qrels), len(collection.judged_queries())) == (5_183, 300, 300)
