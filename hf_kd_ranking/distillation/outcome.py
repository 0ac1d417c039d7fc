"""The end of `distill`: the test, the costs, the report, the best ranker within the budget, and what was found."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import set_seed

from ..artifacts import building, writing
from ..data.runs import Run, read_qrels, read_run, write_run
from ..evaluation.metrics import evaluate_queries, evaluate_run
from ..evaluation.rerank import rerank_run
from ..evaluation.significance import against, holm, paired_t_test
from ..hub.manifest import read_manifest, save_manifest
from ..hub.model_card import select_efficiency, write_model_card
from ..ranker import Ranker, load_tokenizer
from ..reporting.efficiency import measure_efficiency
from ..reporting.report import write_report
from ..retrieval.fusion import fuse_runs
from .job import BM25, NO_TEACHER, DistillJob
from .stage import run_stage
from .stages import Student
from .students import SEED, Distillation

TIMED_QUERIES = 10
RETRIEVED = 1_000


def distill(job: DistillJob) -> dict[str, Any]:
    """Distil a teacher into every architecture of a job, and choose the best ranker within the latency budget.

    Every stage has a folder in the job's output and is done once: the same call after an interruption goes on, a call
    with another option repeats what depends on it.

    Returns:
        `test` and `dev` (name -> mean of the measure), `tests` (of every condition against no teacher: `treatment`,
        `control`, `difference`, `p_value`, `p_corrected`), `fused` (name -> mean of the measure on test when BM25's
        scores are added, see `fuse_runs`), `retrieval` (name -> the measure in the whole collection),
        `latency_ms` (name -> median of a query), `rates` (name -> learning rate), `folders`, `queries` and `triples`
        (their numbers), `page` (the report), `best` (the chosen name) and `ranker`, its folder, ready to push.

    Raises:
        ValueError, FileNotFoundError, KeyError: for bad input, as far as possible before any work.
    """
    parts = Distillation(job)
    _ = parts.scores  # first, so that a weak teacher stops the job before anything is trained on labels
    outcome = measure(parts, parts.train_students())
    best = choose(outcome, job.budget_ms)
    ranker = parts.folder("best")
    if ranker.exists() and not (ranker / "manifest.json").is_file():
        raise ValueError(f"{ranker} holds something else than a ranker; take another output folder.")
    with building(ranker) as temporary:
        shutil.copytree(outcome["folders"][best], temporary, dirs_exist_ok=True)
        shutil.rmtree(ranker, ignore_errors=True)
    return outcome | {"best": best, "ranker": str(ranker)}


# ---- The test -------------------------------------------------------------------------------------------------------


def measure(parts: Distillation, chosen: Mapping[str, list[Student]]) -> dict[str, Any]:
    """Rank the test split with every student, once; time the students; write the report and the cards' costs.

    Args:
        chosen: "architecture condition" -> students, one a seed.

    Returns:
        See `distill`.
    """
    students = {name: [student.digest for student in of_seeds] for name, of_seeds in chosen.items()}
    inputs = {"students": students, "candidates": parts.candidates, "triples": parts.triples, "teacher": parts.scores}
    inputs |= {"options": parts.job.inputs("measure", "retrieve", "device", "data_name")}
    run_stage(parts.folder("report"), inputs, partial(_measure, parts, chosen))
    outcome = json.loads((parts.folder("report") / "outcome.json").read_text(encoding="utf-8"))
    folders = {name: str(parts.folder(folder)) for name, folder in outcome["folders"].items()}
    return outcome | {"folders": folders, "page": str(parts.folder("report.html"))}


def _measure(parts: Distillation, chosen: Mapping[str, list[Student]], folder: Path) -> None:
    job, firsts = parts.job, {name: students[0] for name, students in chosen.items()}
    qrels, candidates = read_qrels(parts.judgments("test")), read_run(parts.run("test"))
    values, of_first, fused = {}, {}, {}
    for name, runs in _test_runs(parts, chosen, folder):
        by_seed = [evaluate_queries(run, qrels, (job.measure,))[job.measure] for run in runs]
        values[name], of_first[name] = _means(by_seed), by_seed[0]
        if name != "BM25":
            hybrids = [fuse_runs([run, candidates], "weighted_sum") for run in runs]
            fused[name] = fmean(evaluate_run(run, qrels, (job.measure,))[job.measure] for run in hybrids)
    retrieval = dict(_retrieval(parts, firsts, folder)) if job.retrieve else {}
    costs = _costs(parts, firsts, folder)
    (folder / "training").mkdir(exist_ok=True)
    for name, student in firsts.items():
        tested = against({job.measure: of_first[name]}, {job.measure: values["BM25"]})
        described = {"results": tested, "data": job.data_name or Path(job.collection).name}
        save_manifest(student.folder, read_manifest(student.folder) | described)
        write_model_card(student.folder, name.replace(" ", "-"), select_efficiency(costs, name))
        shutil.copy(student.folder / "trainer_state.json", folder / "training" / f"{name}.json")
    arrows = [
        (_control_of(name), name) for name in chosen if name != _control_of(name) and _control_of(name) in chosen
    ]
    tests = [
        {"control": control, "treatment": treatment} | paired_t_test(values[treatment], values[control])
        for control, treatment in arrows
    ]
    corrected = holm([test["p_value"] for test in tests])
    files = {"qrels": parts.judgments("test"), "candidates": parts.run("test")}
    files |= {"queries": job.queries, "collection": job.collection}
    page = parts.folder("report.html")
    write_report(
        folder, page, (job.measure,), arrows, title=f"Distillation on {job.data_name or job.collection}", files=files
    )
    outcome = {
        "test": {name: fmean(of_queries.values()) for name, of_queries in values.items()},
        "dev": {name: student.dev for name, student in firsts.items()},
        "tests": [test | {"p_corrected": p_value} for test, p_value in zip(tests, corrected, strict=True)],
        "fused": fused,
        "retrieval": retrieval,
        "latency_ms": {name: of["total_ms"]["p50"] for name, of in costs["rankers"].items()},
        "rates": {name: student.rate for name, student in firsts.items()},
        "folders": {name: str(student.folder.relative_to(job.output)) for name, student in firsts.items()},
        "queries": {split: len(found) for split, found in parts.splits.items()},
        "triples": sum(1 for _ in parts.folder("triples", "labels.tsv").open(encoding="utf-8")),
    }
    with writing(folder / "outcome.json") as file:
        json.dump(outcome, file, indent=1)


def _means(by_seed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {query_id: fmean(run[query_id] for run in by_seed) for query_id in by_seed[0]}


def _control_of(name: str) -> str:
    return f"{name.split()[0]} {NO_TEACHER}"


def _test_runs(
    parts: Distillation, chosen: Mapping[str, list[Student]], folder: Path
) -> Iterator[tuple[str, list[Run]]]:
    """The test candidates in the order of BM25, the teachers, and every ranker; an interrupted call's are read."""
    candidates = read_run(parts.run("test"))
    for sub in ("runs", "seeds"):
        (folder / sub).mkdir(exist_ok=True)

    def ranked(name: str, ranker: partial, seed: int = 0) -> Run:
        path = folder / "runs" / f"{name}.trec" if seed == 0 else folder / "seeds" / f"{name}-{seed}.trec"
        if not path.is_file():
            write_run(
                rerank_run(ranker(), candidates, parts.queries, parts.documents), path, tag=name.replace(" ", "_")
            )
        return read_run(path)

    known = {"BM25": candidates}
    if not parts.job.brings_rows:
        known["teacher"] = parts.teacher_run("test")
        if len(parts.sources) > 1:
            others = [name for name, source in parts.sources.items() if source != BM25]
            known |= {f"teacher {name}": parts.teacher_run("test", name) for name in others}
    judged = {query_id for query_id in read_qrels(parts.judgments("test")) if query_id in candidates}
    for name, run in known.items():
        run = Run((query_id, run[query_id]) for query_id in candidates if query_id in run)
        if judged <= run.keys():  # what ranked some of the queries only does not compare
            write_run(run, folder / "runs" / f"{name}.trec", tag=name.replace(" ", "_"))
            yield name, [run]
    for architecture in parts.job.architectures:
        name = f"{architecture} untrained"
        yield name, [ranked(name, partial(_untrained, parts, architecture))]
    for name, students in chosen.items():
        loads = [partial(Ranker.from_pretrained, student.folder, device=parts.device) for student in students]
        yield name, [ranked(name, load, seed) for seed, load in enumerate(loads)]


def _untrained(parts: Distillation, architecture: str) -> Ranker:
    """The student before training: what the encoder gives by itself."""
    set_seed(SEED)
    job, _ = parts.training_of(architecture, NO_TEACHER, 0.0, 0, parts.folder("report"))
    return Ranker(job.load_model().to(parts.device), load_tokenizer(job.model_name))


def _retrieval(parts: Distillation, students: Mapping[str, Student], folder: Path) -> Iterator[tuple[str, float]]:
    """What rankers with one vector a passage find in the whole collection."""
    from ..evaluation.retrieve import RetrievalEvaluator  # needs faiss, an extra

    (folder / "retrieved").mkdir(exist_ok=True)
    qrels = read_qrels(parts.judgments("test"))
    evaluator = RetrievalEvaluator(qrels, parts.queries, parts.documents, (parts.job.measure,), RETRIEVED)
    for name, student in students.items():
        if name.split()[0] == "bert_dot":
            path = folder / "retrieved" / f"{name}.trec"
            if not path.is_file():
                ranker = Ranker.from_pretrained(student.folder, device=parts.device)
                write_run(evaluator.retrieve(ranker), path, tag=name.replace(" ", "_"))
            found = evaluate_queries(read_run(path), qrels, (parts.job.measure,))[parts.job.measure]
            yield name, fmean(found.values())


def _costs(parts: Distillation, students: Mapping[str, Student], folder: Path) -> dict[str, Any]:
    """What rankers cost against as many passages as they re-rank."""
    path = folder / "efficiency.json"
    if not path.is_file():
        passages = parts.documents.texts[: parts.job.candidates].to_pylist()
        queries = parts.queries[parts.splits["test"][:TIMED_QUERIES]]
        loads = {
            name: partial(Ranker.from_pretrained, student.folder, device=parts.device)
            for name, student in students.items()
        }
        with writing(path) as file:
            json.dump(measure_efficiency(loads, queries, passages), file, indent=1)
    return json.loads(path.read_text(encoding="utf-8"))


# ---- The choice -----------------------------------------------------------------------------------------------------


def choose(outcome: Mapping[str, Any], budget_ms: float | None) -> str:
    """The ranker that is best on the queries for choosing, among those within the budget.

    Raises:
        ValueError: if none is; it names the fastest.
    """
    latency = outcome["latency_ms"]
    within = [name for name in outcome["dev"] if budget_ms is None or latency[name] <= budget_ms]
    if not within:
        fastest = min(latency, key=latency.get)
        raise ValueError(
            f"No ranker is within {budget_ms:g} ms a query; the fastest, {fastest}, takes {latency[fastest]:.1f} ms: "
            "raise --budget-ms, lower --candidates, or add a faster architecture."
        )
    return max(within, key=lambda name: outcome["dev"][name])


def outcome_text(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """The outcome as text: what was compared, a Markdown table, what the teacher brought, and the choice."""
    queries = ", ".join(f"{split} {count:,}" for split, count in outcome["queries"].items())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in outcome["rates"].items())
    what = (
        f"{job.measure}, test"
        if job.qrels is not None
        else f"{job.measure}, test (agreement with the teacher, not relevance)"
    )
    columns = {"with BM25": ("fused", ".4f"), "dev": ("dev", ".4f"), "ms a query": ("latency_ms", ".1f")}
    columns |= {"in the whole collection": ("retrieval", ".4f")} if outcome["retrieval"] else {}
    lines = [
        f"Queries: {queries}. All students see the same {outcome['triples']:,} triples; learning rates were chosen on "
        f"dev from one grid for all conditions ({rates}); {job.seeds} seed(s).",
        "",
        f"| {' | '.join(['ranker', what, *columns])} |",
        "| --- | ---" + " | ---" * len(columns) + " |",
    ]
    for name, value in outcome["test"].items():
        others = ((outcome[key].get(name), form) for key, form in columns.values())
        cells = ["" if other is None else format(other, form) for other, form in others]
        lines.append(f"| {' | '.join([name, f'{value:.4f}', *cells])} |")
    lines += ["", *map(_finding, outcome["tests"])]
    budget = "" if job.budget_ms is None else f" within {job.budget_ms:g} ms a query"
    lines.append(f"\nChosen on dev{budget}: {outcome['best']}, in {outcome['ranker']}. Report: {outcome['page']}")
    return "\n".join(lines)


def _finding(test: Mapping[str, Any]) -> str:
    is_found = test["p_corrected"] < 0.05
    kind = "more" if test["difference"] > 0 else "less"
    verdict = (
        f"{abs(test['difference']):.4f} {kind}" if is_found else f"no difference found ({test['difference']:+.4f})"
    )
    return (
        f"{test['treatment']} against {test['control']}: {verdict} (paired t-test over {test['queries']:,} queries, "
        f"p = {test['p_value']:.2g}, corrected {test['p_corrected']:.2g})."
    )
