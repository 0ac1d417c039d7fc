"""Re-ranking: run and measures of the evaluator equal those of scoring every pair separately."""

import numpy as np
import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.evaluation.rerank import depth_curve, rerank_run
from hf_kd_ranking.models import RankingProcessor


class FixedRanker:
    """Looks up scores by the text of the document, and keeps the pairs that it scored."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores
        self.pairs: list[tuple[str, str]] = []

    def score(self, queries: list[str], documents: list[str]) -> np.ndarray:
        self.pairs += zip(queries, documents, strict=True)
        return np.array([self.scores[document] for document in documents], dtype=np.float32)


CANDIDATES = kd.Run(
    {"8": [("c", 4.0), ("a", 3.0), ("b", 2.0), ("d", 1.0)], "7": [("d", 2.0), ("b", 1.0)], "x": [("a", 1.0)]}
)
QRELS = {"7": {"b": 1}, "8": {"b": 2, "d": 1}, "9": {"a": 1}}


@pytest.fixture
def texts(tmp_path):
    """Queries and documents; query `x` of the candidates has no judgments and no text."""
    (tmp_path / "queries.tsv").write_text("7\tseven\n8\teight\n9\tnine\n")
    (tmp_path / "docs.tsv").write_text("".join(f"{doc_id}\ttext {doc_id}\n" for doc_id in "abcd"))
    return [kd.TextStore.from_tsv(tmp_path / name) for name in ("queries.tsv", "docs.tsv")]


def ranker(**scores: float) -> FixedRanker:
    return FixedRanker({f"text {doc_id}": score for doc_id, score in scores.items()})


def test_rerank_sorts_candidates_within_each_query(texts):
    evaluator = kd.RerankingEvaluator(CANDIDATES, QRELS, *texts)
    assert evaluator.rerank(ranker(a=0.5, b=2.0, c=-1.0, d=1.0)) == {
        "8": [("b", 2.0), ("d", 1.0), ("a", 0.5), ("c", -1.0)],
        "7": [("b", 2.0), ("d", 1.0)],
    }


def test_rerank_scores_each_pair_once(texts):
    fixed = ranker(a=0, b=0, c=0, d=0)
    kd.RerankingEvaluator(CANDIDATES, QRELS, *texts).rerank(fixed)
    assert fixed.pairs == [("eight", f"text {i}") for i in "cabd"] + [("seven", f"text {i}") for i in "db"]


def test_rerank_keeps_first_stage_order_of_ties(texts):
    reranked = kd.RerankingEvaluator(CANDIDATES, QRELS, *texts).rerank(ranker(a=1, b=1, c=0, d=1))
    assert [doc_id for doc_id, _ in reranked["8"]] == ["a", "b", "d", "c"]
    assert [doc_id for doc_id, _ in reranked["7"]] == ["d", "b"]


def test_evaluator_matches_hand_computed_values(texts):
    evaluator = kd.RerankingEvaluator(CANDIDATES, QRELS, *texts, measures=["RR@10", "P@1"])
    assert evaluator(ranker(a=3, b=2, c=1, d=4)) == pytest.approx({"RR@10": (1 / 2 + 1 + 0) / 3, "P@1": 1 / 3})
    assert evaluator.first_stage() == pytest.approx({"RR@10": (1 / 2 + 1 / 3 + 0) / 3, "P@1": 0.0})
    assert evaluator.measure(evaluator.candidates) == evaluator.first_stage()


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, "c"), (2, "ac"), (3, "bac"), (4, "bdac"), (9, "bdac"), (None, "bdac")]
)
def test_evaluator_scores_candidates_up_to_depth(texts, depth, expected):
    evaluator = kd.RerankingEvaluator(CANDIDATES, QRELS, *texts, depth=depth)
    reranked = evaluator.rerank(ranker(a=2, b=4, c=1, d=3))
    assert "".join(doc_id for doc_id, _ in reranked["8"]) == expected
    assert evaluator.first_stage() == kd.evaluate_run(CANDIDATES.top(depth or 9), QRELS)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"7": [("b", 1.0), ("gone", 0.5)]}, "1 of 2 ids are not among the 4 texts of .*docs.tsv: 'gone'"),
        ({"7": [("b", 1.0)], "10": [("b", 1.0)]}, "1 of 2 ids are not among the 3 texts of .*queries.tsv: '10'"),
    ],
)
def test_rerank_names_candidate_without_text(texts, candidates, message):
    evaluator = kd.RerankingEvaluator(kd.Run(candidates), QRELS | {"10": {"b": 1}}, *texts)
    with pytest.raises(KeyError, match=message):
        evaluator.rerank(ranker(b=1))


def test_rerank_refuses_run_without_candidates(texts):
    with pytest.raises(ValueError, match="None of the 2 queries has a candidate to re-rank"):
        rerank_run(ranker(b=1), kd.Run({"7": [], "9": []}), *texts)


def test_evaluator_refuses_what_cannot_be_measured(texts):
    with pytest.raises(ValueError, match="have no query in common"):
        kd.RerankingEvaluator(CANDIDATES, {"other": {"a": 1}}, *texts)
    with pytest.raises(ValueError, match="Unknown measure"):
        kd.RerankingEvaluator(CANDIDATES, QRELS, *texts, measures=["best"])


def test_rerank_equals_scoring_pairs_one_by_one(model, tokenizer, toy):
    queries, documents = (kd.TextStore.from_tsv(toy / name) for name in ("queries.tsv", "collection.tsv"))
    candidates, qrels = kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt")
    evaluator = kd.RerankingEvaluator(candidates, qrels, queries, documents)
    reranked = evaluator.rerank(kd.Ranker(model, tokenizer, batch_size=7))

    def score_by_hand(query: str, document: str) -> float:
        return model(**RankingProcessor.from_config(tokenizer, model.config)([query], [document])).scores.item()

    with torch.no_grad():
        expected = {
            query_id: sorted(
                ((doc_id, score_by_hand(queries[query_id], documents[doc_id])) for doc_id, _ in ranking),
                key=lambda scored: -scored[1],
            )
            for query_id, ranking in candidates.items()
        }
    assert reranked.keys() == expected.keys()
    for query_id, ranking in expected.items():
        assert [doc_id for doc_id, _ in reranked[query_id]] == [doc_id for doc_id, _ in ranking]
        scores = [score for _, score in ranking]
        assert [score for _, score in reranked[query_id]] == pytest.approx(scores, rel=1e-4, abs=1e-5)
        assert len(set(scores)) == 10  # no ties
    assert evaluator(kd.Ranker(model, tokenizer)) == pytest.approx(kd.evaluate_run(kd.Run(expected), qrels))


def random_data(rng: np.random.Generator) -> tuple[kd.Run, dict[str, dict[str, int]], dict[str, float]]:
    """Candidates of 6 queries (3 to 25 of 40 documents), qrels of 7, and tied scores of every document."""
    ids = [f"d{i}" for i in range(40)]
    candidates = kd.Run(
        {
            f"q{i}": [(str(doc), float(-place)) for place, doc in enumerate(rng.choice(ids, length, replace=False))]
            for i, length in enumerate((3, 8, 12, 20, 25, 25))
        }
    )
    qrels = {f"q{i}": {str(doc): int(rng.integers(3)) for doc in rng.choice(ids, 15)} for i in range(1, 8)}
    return candidates, qrels, {f"text {doc}": float(rng.integers(12)) for doc in ids}


@pytest.mark.parametrize("seed", range(3))
def test_depth_curve_equals_reranking_at_each_depth(tmp_path, seed):
    candidates, qrels, scores = random_data(np.random.default_rng(seed))
    (tmp_path / "queries.tsv").write_text("".join(f"{query}\ttext\n" for query in candidates))
    (tmp_path / "docs.tsv").write_text("".join(f"{text.split()[1]}\t{text}\n" for text in scores))
    stores = [kd.TextStore.from_tsv(tmp_path / name) for name in ("queries.tsv", "docs.tsv")]
    run = rerank_run(FixedRanker(scores), candidates, *stores)
    for query_id, ranking in run.items():  # other documents are ignored
        run[query_id] = [("other", 99.0), *ranking]
    measures = ("nDCG@10", "RR@10", "R@20")
    curve = depth_curve(run, candidates, qrels, measures, depths=(20, 3, 10, 50, 100))
    assert list(curve) == [3, 10, 20, 50]  # 50 covers the longest list, of 25
    for depth, values in curve.items():
        anew = rerank_run(FixedRanker(scores), candidates.top(depth), *stores)
        assert values == pytest.approx(kd.evaluate_run(anew, qrels, measures), abs=1e-12)
    assert curve[3]["R@20"] < curve[50]["R@20"]


def test_depth_curve_ends_at_longest_list():
    assert list(depth_curve(CANDIDATES, CANDIDATES, QRELS, ["RR@10"])) == [10]
    assert list(depth_curve(CANDIDATES, CANDIDATES, QRELS, ["RR@10"], (1, 2, 4, 8))) == [1, 2, 4]
    assert list(depth_curve(CANDIDATES, CANDIDATES, {"7": {"b": 1}}, ["RR@10"], (1, 2, 4, 8))) == [1, 2]
    assert list(depth_curve(CANDIDATES, CANDIDATES, QRELS, ["RR@10"], (1, 2))) == [1, 2]


def test_depth_curve_refuses_run_without_all_candidates():
    with pytest.raises(KeyError, match="lacks 2 of 4 candidates of query '8', for example 'b'"):
        depth_curve(CANDIDATES.top(2), CANDIDATES, QRELS)
