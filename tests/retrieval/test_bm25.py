"""BM25 against its formula in plain Python, ties, saving, and a published figure."""

import os
import re
from collections import Counter
from math import log
from pathlib import Path

import pytest

import hf_kd_ranking as kd

DOCUMENTS = {"d9": "Cat dog", "d1": "cat dog", "d5": "Dog, CAT!", "d3": "bird", "d0": "", "d2": "cat cat fish x2"}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def plain_bm25(documents: dict[str, str], query: str, k1: float = 0.9, b: float = 0.4) -> dict[str, float]:
    """BM25 as Lucene scores it (without the constant k1 + 1): doc_id -> score of the documents with a common word."""
    counts = {doc_id: Counter(words(text)) for doc_id, text in documents.items()}
    average = sum(count.total() for count in counts.values()) / len(counts)
    scores: dict[str, float] = {}
    for word in words(query):
        containing = [doc_id for doc_id, count in counts.items() if word in count]
        idf = log(1 + (len(counts) - len(containing) + 0.5) / (len(containing) + 0.5))
        for doc_id in containing:
            tf, length = counts[doc_id][word], counts[doc_id].total()
            scores[doc_id] = scores.get(doc_id, 0) + idf * tf / (tf + k1 * (1 - b + b * length / average))
    return scores


@pytest.fixture
def store(tmp_path):
    """Build a text store of the documents given."""

    def make(documents: dict[str, str]) -> kd.TextStore:
        path = tmp_path / f"docs{len(documents)}.tsv"
        path.write_text("".join(f"{doc_id}\t{text}\n" for doc_id, text in documents.items()))
        return kd.TextStore.from_tsv(path)

    return make


@pytest.mark.parametrize("settings", [{}, {"k1": 1.5, "b": 0.75}, {"k1": 0.9, "b": 0.0}])
def test_scores_equal_the_formula_in_plain_python(toy, settings):
    documents = kd.TextStore.from_tsv(toy / "collection.tsv")
    queries = dict(kd.TextStore.from_tsv(toy / "queries.tsv").items()) | {
        "r": "cat cat of",
        "u": "The unheard-of IRON",
    }
    run = kd.BM25Index.build(documents, **settings).search(queries, k=40)
    assert list(run) == list(queries)
    for query_id, query in queries.items():
        expected = plain_bm25(dict(documents.items()), query, **settings)
        assert dict(run[query_id]) == pytest.approx(expected, rel=1e-5)
        scores = [score for _, score in run[query_id]]
        assert scores == sorted(scores, reverse=True)


def test_a_smaller_k_gives_the_start_of_the_ranking(toy):
    documents = kd.TextStore.from_tsv(toy / "collection.tsv")
    index = kd.BM25Index.build(documents)
    everything = index.search({"q": "apple cat river"}, k=40)["q"]
    assert len({score for _, score in everything[:6]}) == 6  # no tie at the cut
    assert index.search({"q": "apple cat river"}, k=5)["q"] == everything[:5]
    assert len(index.search({"q": "the of a and"})["q"]) <= 40  # no error where k is larger than the collection


def test_ties_keep_the_order_of_the_collection_and_case_and_punctuation_do_not_count(store):
    ranking = kd.BM25Index.build(store(DOCUMENTS)).search({"q": "dog"}, k=6)["q"]
    assert [doc_id for doc_id, _ in ranking] == ["d9", "d1", "d5"]
    assert len({score for _, score in ranking}) == 1


@pytest.mark.parametrize(
    ("query", "found"), [("zebra", []), ("", []), ("?!", []), ("zebra fish", ["d2"]), ("X2", ["d2"]), ("x", [])]
)
def test_documents_without_a_common_word_are_left_out(store, query, found):
    run = kd.BM25Index.build(store(DOCUMENTS)).search({"first": "cat", "q": query, "last": "bird"}, k=6)
    assert [doc_id for doc_id, _ in run["q"]] == found
    assert (len(run["first"]), [doc_id for doc_id, _ in run["last"]]) == (4, ["d3"])


def test_results_are_a_run_that_files_and_evaluation_take(store, tmp_path):
    run = kd.BM25Index.build(store(DOCUMENTS)).search({"q": "fish cat"})
    assert isinstance(run, kd.Run)
    kd.write_run(run, tmp_path / "run.trec")
    assert kd.read_run(tmp_path / "run.trec") == run
    assert kd.evaluate_run(run, {"q": {"d2": 1}}) == {"nDCG@10": 1.0, "RR@10": 1.0}


@pytest.mark.parametrize("ids", ["integers", "strings with blanks"])
def test_a_saved_and_opened_index_gives_the_same_results(store, tmp_path, ids):
    names = range(6) if ids == "integers" else [f"d ü {i}" for i in range(6)]
    documents = dict(zip(map(str, names), DOCUMENTS.values(), strict=True))
    queries = {"q1": "cat dog", "q2": "fish bird", "q3": "nothing"}
    index = kd.BM25Index.build(store(documents), k1=1.2)
    index.save(tmp_path / "indexes" / "mine")
    expected = index.search(queries)
    assert kd.BM25Index.open(tmp_path / "indexes" / "mine").search(queries) == expected
    assert {doc_id for doc_id, _ in expected["q1"]} <= set(documents)
    assert len(expected["q1"]) == 4


def test_english_drops_stop_words_and_takes_stems_before_and_after_saving(store, tmp_path):
    documents = store({"a": "The running of the dogs", "b": "It is the of", "c": "a dog runs"})
    index = kd.BM25Index.build(documents, tokenization="english")
    index.save(tmp_path / "mine")
    for opened in (index, kd.BM25Index.open(tmp_path / "mine")):
        run = opened.search({"stem": "Dog", "verb": "run", "stop": "of the"})
        assert {query_id: {doc_id for doc_id, _ in ranking} for query_id, ranking in run.items()} == {
            "stem": {"a", "c"},
            "verb": {"a", "c"},
            "stop": set(),
        }
    assert {doc_id for doc_id, _ in kd.BM25Index.build(documents).search({"q": "of the"})["q"]} == {"a", "b"}
    with pytest.raises(ValueError, match="one of plain, english, got 'klingon'"):
        kd.BM25Index.build(documents, tokenization="klingon")


def test_an_existing_folder_is_refused_and_left_alone(store, tmp_path):
    index = kd.BM25Index.build(store(DOCUMENTS))
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'mine'} exists; give a new folder")):
        index.save(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="to replace a BM25 index"):
        index.save(tmp_path / "mine", overwrite=True)  # it is none
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_index_is_replaced_where_that_is_asked_for(store, tmp_path):
    old, documents = kd.BM25Index.build(store(DOCUMENTS)), {"new": "entirely other words"}
    old.save(tmp_path / "index")
    opened = kd.BM25Index.open(tmp_path / "index")
    with pytest.raises(FileExistsError):
        old.save(tmp_path / "index")
    kd.BM25Index.build(store(documents)).save(tmp_path / "index", overwrite=True)
    assert [doc_id for doc_id, _ in kd.BM25Index.open(tmp_path / "index").search({"q": "entirely"})["q"]] == ["new"]
    assert opened.search({"q": "entirely"}) == {"q": []}  # a reader of the old one


def test_opening_what_is_no_index_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "doc_ids.json"))):
        kd.BM25Index.open(tmp_path)


@pytest.mark.data
@pytest.mark.skipif("HF_KD_RANKING_DATA" not in os.environ, reason="needs the folder that HF_KD_RANKING_DATA names")
def test_scifact_reaches_the_published_ndcg():
    folder = Path(os.environ["HF_KD_RANKING_DATA"]) / "scifact"
    documents, queries = (kd.TextStore.from_jsonl(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    qrels = kd.read_qrels(folder / "qrels" / "test.tsv")
    assert (len(documents), len(qrels)) == (5183, 300)
    run = kd.BM25Index.build(documents).search({query_id: queries[query_id] for query_id in qrels})
    assert kd.evaluate_run(run, qrels)["nDCG@10"] == pytest.approx(0.6611, abs=0.005)
