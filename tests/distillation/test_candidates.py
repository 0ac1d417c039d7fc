"""The steps that find candidates, and judgments."""

from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import candidates
from hf_kd_ranking.distillation.candidates import ranking


def doc_ids(folder) -> dict[str, list[str]]:
    return {query_id: [doc_id for doc_id, _ in found] for query_id, found in kd.read_run(folder / "run.trec").items()}


def test_bm25_searches_the_collection(tmp_path, make_artifact):
    (tmp_path / "collection.tsv").write_text("a\tapple pie\nb\tapple\nc\tbread\n")
    index = make_artifact("index")
    documents = kd.TextStore.from_tsv(tmp_path / "collection.tsv")
    candidates.index_collection(index.path, None, SimpleNamespace(documents=documents))
    candidates.search_bm25(tmp_path, index, {"q": "apple", "r": "bread", "s": "zebra"}, 2, False)
    assert doc_ids(tmp_path) == {"q": ["b", "a"], "r": ["c"]}  # nothing has the word of the last one
    candidates.search_bm25(tmp_path, index, {"b": "apple"}, 1, True)
    assert doc_ids(tmp_path) == {"b": ["a"]}


def test_own_run_gives_the_first_k_of_the_queries_of_a_split(tmp_path):
    kd.write_run({q: [("a", 3.0), ("b", 2.0), ("c", 1.0)] for q in "qrs"}, tmp_path / "mine.trec")
    candidates.select_candidates(tmp_path, tmp_path / "mine.trec", ["r", "q", "missing"], 2, False)
    assert doc_ids(tmp_path) == {"r": ["a", "b"], "q": ["a", "b"]}
    kd.write_run({"a": [("a", 3.0), ("b", 2.0), ("c", 1.0)]}, tmp_path / "mine.trec")
    candidates.select_candidates(tmp_path, tmp_path / "mine.trec", ["a"], 2, True)
    assert doc_ids(tmp_path) == {"a": ["b", "c"]}


def test_sources_give_their_shares_and_positives_are_added(tmp_path, make_artifact):
    sources = {
        "bm25": make_artifact("bm25", {"q": [(doc_id, -float(i)) for i, doc_id in enumerate("abcd")]}),
        "dense": make_artifact("dense", {q: [(doc_id, -float(i)) for i, doc_id in enumerate("baefg")] for q in "qr"}),
    }
    positives = {"q": {"f": 1, "h": 2, "i": 0}}
    candidates.mix_candidates(tmp_path, sources, {"bm25": 0.5, "dense": 0.5}, 4, positives)
    # Each gives two, spread over its ranks; f and h are positives, i is none.
    assert doc_ids(tmp_path) == {"q": ["a", "c", "b", "e", "f", "h"], "r": ["b", "e"]}
    assert [score for _, score in kd.read_run(tmp_path / "run.trec")["q"]] == [0, -1, -2, -3, -4, -5]
    candidates.mix_candidates(tmp_path, sources, {"bm25": 0.25, "dense": 0.75}, 4, {"q": {"b": 1}})
    assert doc_ids(tmp_path)["q"] == ["a", "b", "f"]  # the dense one gives b, a and f
    candidates.mix_candidates(tmp_path, {"bm25": sources["bm25"]}, {"bm25": 1.0}, 9, {})
    assert doc_ids(tmp_path) == {"q": ["a", "b", "c", "d"]}


def test_vectors_find_what_the_ranker_scores_highest(tmp_path, make_artifact, encoder, tokenizer, make_job, stores):
    ranker = kd.Ranker(kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16), tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    found = make_artifact("found")
    context = SimpleNamespace(device="cpu", documents=stores[1], is_main_process=True)
    text = stores[0]["q5"]
    candidates.search_vectors(found.path, tmp_path / "model", {"q5": text}, 3, False, context)
    every = [f"d{i}" for i in range(60)]
    scores = dict(zip(every, ranker.score([text] * 60, stores[1][every]).tolist(), strict=True))
    best = sorted(every, key=scores.get, reverse=True)[:3]
    assert doc_ids(found.path)["q5"] == best
    assert dict(ranking(found)["q5"]) == pytest.approx({doc_id: scores[doc_id] for doc_id in best}, abs=1e-3)
    assert (found.path / "vectors").is_dir()
    candidates.search_vectors(found.path, tmp_path / "model", {best[0]: text}, 2, True, context)
    assert doc_ids(found.path) == {best[0]: best[1:]}


def test_best_candidates_of_a_teacher_count_as_relevant(tmp_path, make_artifact):
    scored = {"q": [(name, -float(i)) for i, name in enumerate("vwxyz")], "r": [("a", 1.0)]}
    candidates.judge_by_agreement(tmp_path, make_artifact("teacher", scored))
    assert kd.read_qrels(tmp_path / "qrels.txt") == {"q": {"v": 3, "w": 2, "x": 1}, "r": {"a": 3}}


def test_empty_files_are_read_as_nothing(tmp_path, make_artifact):
    candidates.write_judgments(tmp_path, {})
    empty = make_artifact("empty", {}, {})
    assert (candidates.ranking(empty), candidates.grades(empty)) == ({}, {})
