"""The outcome of a job in words."""

from types import SimpleNamespace

from hf_kd_ranking.distillation.wording import outcome_text, verdict

INTERVAL = {"mean": 0.6, "low": 0.5, "high": 0.7}


def words(chosen: str, tests: list[dict], **changes) -> str:
    """The verdict on an outcome."""
    outcome = {"chosen": chosen, "test": {chosen: 0.6, "teacher": 0.8, "BM25": 0.5}, "interval": INTERVAL}
    outcome["synthetic"] = []
    outcome |= {"latency_ms": {chosen: 12.34}, "queries": {"dev": 300, "test": 1200}, "tests": tests, "seeds": {}}
    outcome |= {"rivals": ["BM25", "dot untrained"], "pipeline": {"system": "dot", "seed": 1}, "is_trained": True}
    return verdict(outcome | changes, SimpleNamespace(measure="RR@10", budget_ms=None, candidates=None))


def finding(treatment: str, control: str, difference: float, p_corrected: float) -> dict:
    test = {"treatment": treatment, "control": control, "difference": difference, "interval": [-0.01, 0.2]}
    return test | {"p_value": p_corrected / 2, "p_corrected": p_corrected, "queries": 1200}


def test_verdict_says_whether_the_choice_beats_the_first_stage():
    text = words("dot teacher", [finding("dot teacher", "BM25", 0.1, 0.002)])
    assert text.splitlines() == [
        "Chosen on dev: dot teacher, 12.3 ms per query (median). On the 1,200 test queries: RR@10 0.6000 (95 % "
        "interval 0.5000 to 0.7000), 75 % of the teacher's 0.8000.",
        "On the test queries it is significantly better than BM25.",
        "dot teacher against BM25: 0.1000 more, 95 % interval -0.0100 to +0.2000, p = 0.001, corrected 0.002, 1,200 "
        "queries.",
    ]
    tests = [finding("dot teacher", "BM25", 0.1, 0.2), finding("dot teacher", "dot untrained", -0.1, 0.01)]
    text = words("dot teacher", tests)
    assert "against BM25: no difference found (+0.1000)" in text and "against dot untrained: 0.1000 less" in text
    conclusion = "On the test queries it is not shown to be better than what a user has without distilling."
    assert text.splitlines()[1] == conclusion
    tests = [finding("dot teacher", "BM25", 0.1, 0.2), finding("dot teacher", "dot untrained", 0.1, 0.01)]
    conclusion = "significantly better than dot untrained, but not shown to be better than BM25."
    assert words("dot teacher", tests).splitlines()[1].endswith(conclusion)
    # A comparison of conditions is no comparison with what a user has.
    assert "no_teacher" not in words("dot teacher", [finding("dot teacher", "dot no_teacher", 0.1, 0.001)])


def test_verdict_says_if_nothing_trained_was_chosen():
    text = words("BM25", [finding("BM25", "dot untrained", 0.3, 0.001)], pipeline={"system": None})
    conclusion = "No ranker was better than this first stage on dev, so it is delivered without one."
    assert text.splitlines()[1] == conclusion
    tests = [finding("dot untrained + BM25", "BM25", 0.3, 0.001)]
    text = words("dot untrained + BM25", tests, is_trained=False)
    assert text.splitlines()[1] == "No trained student was better on dev than this one, which is not trained."


def test_verdict_names_the_seed_that_is_delivered():
    text = words("dot teacher", [], seeds={"dot teacher": [0.5, 0.7]})
    assert "That is the mean of 2 seeds; delivered is seed 1, the best on dev, with 0.7000 on test." in text


def test_verdict_warns_of_few_dev_queries():
    assert "few" not in words("dot teacher", [], queries={"dev": 50, "test": 1200})
    text = words("dot teacher", [], queries={"dev": 49, "test": 1200})
    assert text.splitlines()[-1] == (
        "The choice rests on 49 dev queries, which are few: another sample may choose otherwise. Judge at least 50."
    )


def test_text_has_all_tables(make_job):
    names = ["BM25", "dot teacher", "dot teacher + BM25"]
    outcome = {"chosen": "dot teacher", "test": dict(zip(names, (0.5, 0.6, 0.55), strict=True)), "verdict": "Verdict."}
    outcome |= {"queries": {"train": 1000, "dev": 20, "test": 30}, "rates": {"dot teacher": 1e-4}}
    outcome |= {"synthetic": [], "agreement": [], "cuts": {}}
    outcome |= {"lists": {"teacher": 2000}, "overlaps": {"queries left out": 3, "positives of train and test": 0}}
    outcome |= {"fused": {"dot teacher": 0.55}, "dev": {"BM25": 0.4, "dot teacher": 0.7}, "latency_ms": {"BM25": 1.0}}
    outcome |= {"pipeline": {"first_stage": "BM25"}, "sums": {"dot teacher": "dot teacher + BM25"}, "folder": "best"}
    outcome |= {"seeds": {"dot teacher": [0.5, 0.7]}, "frontier": [["BM25", 0.4, 1.0]], "family": "Holm", "tests": []}
    lines = outcome_text(outcome | {"page": "report.html"}, make_job()).splitlines()
    assert lines[:2] == [
        "Queries: train 1,000, dev 20, test 30. Training lists: teacher 2,000. Learning rates were chosen on dev from "
        "one grid for all conditions (dot teacher 0.0001); 1 seed(s).",
        "3 queries left out.",
    ]
    table = [line for line in lines if line.startswith("|")]
    assert table[:4] == [
        "| ranker | RR@10, test | with BM25 | dev | ms per query, p50 |",
        "| --- | --- | --- | --- | --- |",
        "| BM25 | 0.5000 |  | 0.4000 | 1.0 |",
        "| dot teacher | 0.6000 | 0.5500 | 0.7000 |  |",
    ]
    assert table[4] == "| pipeline | RR@10, dev | ms per query, p50 |" and "Verdict." in lines
    assert "Seeds of dot teacher: 0.5000, 0.7000." in lines
    unjudged = outcome_text(outcome | {"page": "report.html", "agreement": ["test"]}, make_job(qrels=None))
    assert "RR@10, test (agreement with the teacher, not relevance)" in unjudged
