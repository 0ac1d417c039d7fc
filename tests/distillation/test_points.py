"""A choice is made from values on dev, latencies, weights, depths and seeds."""

import json
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.distillation import points
from hf_kd_ranking.distillation.job import TargetNotMetError
from hf_kd_ranking.distillation.points import Point, System, choose, find_points, frontier, fuse, read_points

BM25 = {"q": [("a", 4.0), ("b", 3.0), ("c", 2.0), ("d", 1.0)]}
DOT = {"q": [("d", 9.0), ("a", 5.0), ("b", 4.0), ("c", 0.0)]}
SETTINGS = {"measure": "RR@10", "depths": [2, 4], "fusion": True, "purpose": "rerank"}


@pytest.fixture
def find(tmp_path, make_artifact):
    """find(runs of the ranker "dot", options): its points; only d is relevant, a search with BM25 takes 2 ms."""

    def run(*runs: dict, first: dict | None = None, **options) -> list[Point]:
        timing = make_artifact("timing")
        by_depth = {"2": {"p50": 5.0}, "4": {"p50": 9.0}}
        timed = {"first_stages": {"BM25": {"total_ms": {"p50": 2.0}}}}
        timed["rankers"] = {"dot": {"total_ms_by_depth": by_depth}}
        (timing.path / "efficiency.json").write_text(json.dumps(timed))
        rankings = {"dot": [make_artifact(f"dot-{seed}", run) for seed, run in enumerate(runs)]}
        judgments = make_artifact("judgments", qrels={"q": {"d": 1}})
        stages = {}
        for name, ranked in (first or {"BM25": BM25}).items():
            stages[name] = make_artifact(f"first-{name}", ranked)
        found = make_artifact("points")
        arguments = ([System("dot", (), "dot")], rankings, stages, judgments, timing, SETTINGS | options)
        find_points(found.path, *arguments)
        return read_points(found)

    return run


def test_every_depth_is_tried_with_the_weight_that_was_fitted_at_the_full_depth(find):
    # At depth 4 the ranker puts d first; with BM25's scores it stays there for weights below 4 / 13. At depth 2 d is
    # not re-ranked and stays last.
    assert find(DOT) == [
        Point("BM25", None, 0, 4, 0.0, "float32", 0.25, 2.0),
        Point("BM25", "dot", 0, 2, 0.0, "float32", 0.25, 7.0),
        Point("BM25", "dot", 0, 2, 0.1, "float32", 0.25, 7.0),
        Point("BM25", "dot", 0, 4, 0.0, "float32", 1.0, 11.0),
        Point("BM25", "dot", 0, 4, 0.1, "float32", 1.0, 11.0),
    ]


def test_seed_that_is_best_on_dev_is_taken(find):
    found = find(BM25, DOT, BM25, fusion=False, depths=[4])
    assert found[1:] == [Point("BM25", "dot", 1, 4, 0.0, "float32", 1.0, 11.0)]


def test_search_pays_for_bm25_only_with_its_scores(find):
    found = find({"q": [("x", 3.0), ("d", 1.0)]}, purpose="search", depths=[4])
    assert [(point.weight, point.dev, point.latency_ms) for point in found] == [
        (0.0, 0.25, 2.0),
        (0.0, 0.5, 9.0),
        (0.1, 0.2, 11.0),  # a, b and c, which BM25 alone has, come before d: all weights do this
    ]


def test_ranker_that_finds_nothing_relevant_counts_as_zero(find):
    found = find({"q": [("x", 3.0), ("y", 1.0)]}, purpose="search", depths=[4], fusion=False)
    assert [point.dev for point in found] == [0.25, 0.0]


def test_pipelines_return_what_their_weights_say():
    run, candidates = kd.Run(DOT), kd.Run(BM25)
    orders = {}
    for depth, weight in ((4, 0.0), (4, 0.5), (2, 0.0)):
        orders[depth, weight] = [doc_id for doc_id, _ in fuse(candidates, run, "rerank", depth, weight)["q"]]
    # With equal weights: a (0.556 + 1) / 2, b (0.444 + 0.667) / 2, c 0.333 / 2, d 1 / 2.
    assert orders == {(4, 0.0): ["d", "a", "b", "c"], (4, 0.5): ["a", "b", "d", "c"], (2, 0.0): ["a", "b", "c", "d"]}
    assert fuse(candidates, run, "search", 2, 0.0) == {"q": DOT["q"][:2]}
    assert fuse(candidates, kd.Run(), "search", 2, 0.5)["q"][0][0] == "a"  # a query that only BM25 has


def test_best_point_within_the_budget_is_chosen():
    found = [
        Point("BM25", None, 0, 20, 0.0, "float32", 0.5, 1.0),
        Point("BM25", "slow", 0, 20, 0.3, "float32", 0.9, 50.0),
    ]
    found += [
        Point("BM25", "quick", 0, 10, 0.0, "float32", 0.7, 9.0),
        Point("BM25", "worse", 0, 20, 0.0, "float32", 0.6, 10.0),
    ]
    assert [point.system for point in frontier(found)] == [None, "quick", "slow"]
    assert [choose(found, budget).system for budget in (None, 50, 10, 2)] == ["slow", "slow", "quick", None]
    assert [point.name(20) for point in found] == ["BM25", "slow + BM25", "quick, depth 10", "worse"]
    with pytest.raises(TargetNotMetError, match=r"within 0\.5 ms.*fastest, BM25 at depth 20, takes 1\.0 ms"):
        choose(found, 0.5)


def test_engine_of_the_user_is_not_timed_and_gives_sums_its_name(find):
    found = find(DOT, first={"candidates": BM25, "BM25": BM25}, depths=[4])
    assert [point.name(4) for point in found] == ["candidates", "BM25", "dot", "dot + candidates"]
    assert [point.latency_ms for point in found] == [0.0, 2.0, 9.0, 9.0]


def test_of_equal_points_the_fastest_is_chosen():
    found = [
        Point("BM25", "late", 0, 9, 0.0, "float32", 0.5, 3.0),
        Point("BM25", "early", 0, 9, 0.0, "float32", 0.5, 2.0),
    ]
    assert choose(found, None).system == "early"


def test_candidates_of_the_timed_queries_are_timed(tmp_path, make_artifact, monkeypatch):
    seen = {}

    def measure(rankers, queries, documents, depths, first_stages, counts):
        seen.update(rankers=list(rankers), queries=queries, documents=documents, first_stages=list(first_stages))
        return {}

    monkeypatch.setattr(points, "measure_efficiency", measure)
    monkeypatch.setattr(points, "BM25Index", SimpleNamespace(open=lambda folder: None))
    (tmp_path / "texts.tsv").write_text("".join(f"{name}\ttext {name}\n" for name in "abcdqrs"))
    store = kd.TextStore.from_tsv(tmp_path / "texts.tsv")
    context = SimpleNamespace(queries=store, documents=store, job=SimpleNamespace(scores=[]))
    candidates = make_artifact("candidates", {"q": [("d", 2.0), ("b", 1.0), ("a", 0.0)], "r": [("c", 1.0)]})
    teachers = {"bm25": "bm25", "slow": tmp_path}
    arguments = (
        [System("dot", (None,), "dot")],
        teachers,
        candidates,
        make_artifact("index"),
        {},
        [1, 2],
        "cpu",
        context,
    )
    points.time_rankers(tmp_path, *arguments)
    assert seen["queries"] == ["text q", "text r"]
    assert seen["documents"] == [["text d", "text b"], ["text c"]]  # as many as the largest depth
    assert (seen["rankers"], seen["first_stages"]) == (["dot", "teacher slow"], ["BM25"])
    context.job.scores = ["one.trec"]  # their teachers are files
    points.time_rankers(tmp_path, *arguments)
    assert seen["rankers"] == ["dot"]
