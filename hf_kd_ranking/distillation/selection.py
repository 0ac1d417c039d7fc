"""The end of `distill`: the test, costs, cards and report of all students, and the best ranker within the budget."""

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ..artifacts import write_json
from ..data.runs import Run, write_run
from ..evaluation.metrics import evaluate_queries, evaluate_run
from ..evaluation.rerank import rerank_run
from ..evaluation.significance import compare_with_first_stage, holm, paired_t_test
from ..hub.manifest import read_manifest, save_manifest
from ..hub.model_card import select_efficiency, write_model_card
from ..ranker import Ranker
from ..reporting.efficiency import measure_efficiency
from ..reporting.report import write_report
from ..retrieval.fusion import fuse_runs
from .context import Context
from .job import NO_TEACHER, DistillJob
from .steps import grades, ranking
from .students import Recipe, Student, learning_rate, untrained_ranker, validation_value
from .work import Artifact

TIMED_QUERIES = 10
RETRIEVED = 1_000


# ---- Steps ----------------------------------------------------------------------------------------------------------


def rank_test(folder: Path, student: Student, candidates: Artifact, context: Context) -> None:
    """Rank the test candidates with a trained ranker."""
    ranker = Ranker.from_pretrained(student.checkpoint, device=context.device)
    run = rerank_run(ranker, ranking(candidates), context.queries, context.documents)
    write_run(run, folder / "run.trec", tag=folder.name.replace(" ", "_"))


def rank_untrained(folder: Path, recipe: Recipe, candidates: Artifact, context: Context) -> None:
    """Rank the test candidates with a student before its training."""
    run = rerank_run(untrained_ranker(recipe, context), ranking(candidates), context.queries, context.documents)
    write_run(run, folder / "run.trec", tag=folder.name.replace(" ", "_"))


def search_collection(folder: Path, student: Student, judgments: Artifact, measure: str, context: Context) -> None:
    """Search the whole collection for the test queries with a ranker that stores one vector per passage."""
    from ..evaluation.retrieve import RetrievalEvaluator  # needs faiss, an extra

    evaluator = RetrievalEvaluator(grades(judgments), context.queries, context.documents, (measure,), RETRIEVED)
    ranker = Ranker.from_pretrained(student.checkpoint, device=context.device)
    write_run(evaluator.retrieve(ranker), folder / "run.trec", tag=folder.name.replace(" ", "_"))


def time_students(
    folder: Path, students: Mapping[str, Student], query_ids: Sequence[str], k: int, device: str, context: Context
) -> None:
    """Measure latency, memory and storage of the students with as many passages as they re-rank."""
    rankers = {}
    for name, student in students.items():
        rankers[name] = partial(Ranker.from_pretrained, student.checkpoint, device=device)
    passages = context.documents.texts[:k].to_pylist()
    queries = context.queries[list(query_ids[:TIMED_QUERIES])]
    write_json(folder / "efficiency.json", measure_efficiency(rankers, queries, passages))


def write_outcome(
    folder: Path,
    rankings: Mapping[str, Sequence[Artifact]],
    searches: Mapping[str, Artifact],
    students: Mapping[str, Student],
    judgments: Artifact,
    candidates: Artifact,
    timing: Artifact,
    measure: str,
    data_name: str,
    context: Context,
) -> None:
    """Write the figures of all rankers into `outcome.json`, the cards of the students, and the report.

    Args:
        folder: folder of the step.
        rankings: ranker -> its rankings of the test queries, one per seed.
        searches: student -> its ranking of the whole collection.
        students: "architecture condition" -> the student with the chosen learning rate.
        judgments, candidates: of the test queries.
        timing: costs of the students.
        measure: the measure that decides.
        data_name: name of the collection, for the cards and the report.
        context: the job and its texts.
    """
    qrels, first_stage = grades(judgments), ranking(candidates)
    costs = json.loads((timing.path / "efficiency.json").read_text(encoding="utf-8"))
    figures = ("test", "dev", "fused", "retrieval", "latency_ms", "rates")
    outcome: dict[str, Any] = {name: {} for name in figures}
    values = {}
    shutil.copy(timing.path / "efficiency.json", folder)
    for name in ("runs", "training"):
        (folder / name).mkdir(exist_ok=True)
    for name, seeds in rankings.items():
        runs = [_select_queries(ranking(artifact), first_stage) for artifact in seeds]
        if not qrels.keys() & first_stage.keys() <= runs[0].keys():
            continue  # a teacher that ranked some of the queries only cannot be compared
        write_run(runs[0], folder / "runs" / f"{name}.trec", tag=name.replace(" ", "_"))
        by_seed = [evaluate_queries(run, qrels, (measure,))[measure] for run in runs]
        values[name] = {query_id: fmean(seed[query_id] for seed in by_seed) for query_id in by_seed[0]}
        outcome["test"][name] = fmean(values[name].values())
        if name != "BM25":
            hybrid = [fuse_runs([run, first_stage], "weighted_sum") for run in runs]
            outcome["fused"][name] = fmean(evaluate_run(run, qrels, (measure,))[measure] for run in hybrid)
        if name in students:
            results = compare_with_first_stage({measure: by_seed[0]}, {measure: values["BM25"]})
            _write_card(students[name].checkpoint, name, results, costs, data_name)
    for name, student in students.items():
        outcome["dev"][name] = validation_value(student.training, measure)
        outcome["latency_ms"][name] = costs["rankers"][name]["total_ms"]["p50"]
        outcome["rates"][name] = learning_rate(student.training)
        shutil.copy(student.checkpoint / "trainer_state.json", folder / "training" / f"{name}.json")
    for name, found in searches.items():
        outcome["retrieval"][name] = evaluate_run(ranking(found), qrels, (measure,))[measure]
    outcome["queries"] = {split: len(query_ids) for split, query_ids in context.splits.items()}
    outcome["tests"] = _compare_with_labels(values, students)
    files = {"queries": context.job.queries, "collection": context.job.collection}
    files |= {"qrels": judgments.path / "qrels.txt", "candidates": candidates.path / "run.trec"}
    arrows = [(test["control"], test["treatment"]) for test in outcome["tests"]]
    title = f"Distillation on {data_name}"
    write_report(folder, folder / "report.html", (measure,), arrows, title=title, files=files)
    write_json(folder / "outcome.json", outcome)


def _select_queries(run: Run, first_stage: Run) -> Run:
    """Return a run with the queries of the first stage, in its order."""
    return Run((query_id, run[query_id]) for query_id in first_stage if query_id in run)


def _write_card(ranker: Path, name: str, results: dict, costs: dict, data_name: str) -> None:
    manifest = read_manifest(ranker)
    manifest["results"] = results
    manifest["data"] = data_name
    save_manifest(ranker, manifest)
    write_model_card(ranker, name.replace(" ", "-"), select_efficiency(costs, name))


def _compare_with_labels(
    values: Mapping[str, Mapping[str, float]], students: Mapping[str, Student]
) -> list[dict[str, Any]]:
    """Test every student with a teacher against the same architecture without one, corrected by Holm's method."""
    tests = []
    for treatment, student in students.items():
        control = f"{student.recipe.architecture} {NO_TEACHER}"
        if treatment != control and control in students:
            test = paired_t_test(values[treatment], values[control])
            tests.append({"control": control, "treatment": treatment, **test})
    corrected = holm([test["p_value"] for test in tests])
    for test, p_value in zip(tests, corrected, strict=True):
        test["p_corrected"] = p_value
    return tests


# ---- The choice -----------------------------------------------------------------------------------------------------


def choose(outcome: Mapping[str, Any], budget_ms: float | None) -> str:
    """Return the ranker that is best on the validation queries, among those within the budget.

    Raises:
        ValueError: if no ranker is within the budget; it names the fastest.
    """
    dev, latency = outcome["dev"], outcome["latency_ms"]
    within = [name for name in dev if budget_ms is None or latency[name] <= budget_ms]
    if not within:
        fastest = min(latency, key=latency.get)
        raise ValueError(
            f"No ranker is within {budget_ms:g} ms per query; the fastest, {fastest}, takes {latency[fastest]:.1f} "
            "ms: raise --budget-ms, lower --k, or add a faster architecture."
        )
    return max(within, key=dev.get)


def outcome_text(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """Return the outcome as text: what was compared, a Markdown table, the gain by the teacher, and the choice."""
    queries = ", ".join(f"{split} {count:,}" for split, count in outcome["queries"].items())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in outcome["rates"].items())
    heading = f"{job.measure}, test"
    if job.qrels is None:
        heading += " (agreement with the teacher, not relevance)"
    columns = {"with BM25": ("fused", ".4f"), "dev": ("dev", ".4f"), "ms per query": ("latency_ms", ".1f")}
    if outcome["retrieval"]:
        columns["in the whole collection"] = ("retrieval", ".4f")
    lines = [
        f"Queries: {queries}. All students see the same {outcome['triples']:,} triples; learning rates were chosen on "
        f"dev from one grid for all conditions ({rates}); {job.seeds} seed(s).",
        "",
        f"| ranker | {heading} | {' | '.join(columns)} |",
        "| --- | ---" + " | ---" * len(columns) + " |",
    ]
    for name, value in outcome["test"].items():
        cells = [name, f"{value:.4f}"]
        for key, form in columns.values():
            cells.append(format(outcome[key][name], form) if name in outcome[key] else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *map(_finding_text, outcome["tests"])]
    budget = "" if job.budget_ms is None else f" within {job.budget_ms:g} ms per query"
    lines.append(f"\nChosen on dev{budget}: {outcome['best']}, in {outcome['ranker']}. Report: {outcome['page']}")
    return "\n".join(lines)


def _finding_text(test: Mapping[str, Any]) -> str:
    if test["p_corrected"] >= 0.05:
        verdict = f"no difference found ({test['difference']:+.4f})"
    elif test["difference"] > 0:
        verdict = f"{test['difference']:.4f} more"
    else:
        verdict = f"{-test['difference']:.4f} less"
    return (
        f"{test['treatment']} against {test['control']}: {verdict} (paired t-test over {test['queries']:,} queries, "
        f"p = {test['p_value']:.2g}, corrected {test['p_corrected']:.2g})."
    )
