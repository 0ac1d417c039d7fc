"""The demo's question: does a student learn more from a teacher's scores than from the labels, on the same triples?

Conditions, as in the paper: no teacher (RankNet on the labels), T1 (Margin-MSE from one BERT_CAT), T2 (Margin-MSE from
the mean of two teachers). All see the same triples. The learning rate of each loss (Margin-MSE with T2) is chosen on
the development split from one grid, and so is each run's best epoch; the test split is scored once, with the chosen.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import typer
from transformers.utils.logging import disable_progress_bar

from ..data.formats import writing
from ..data.texts import TextStore
from ..data.trec import Run, read_qrels, read_run, write_run
from ..evaluation.metrics import evaluate_queries
from ..evaluation.rerank import RerankingEvaluator
from ..evaluation.significance import paired_t_test
from ..ranker import Ranker, load_tokenizer
from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob
from .outcome import outcome_text
from .report import write_demo_report
from .stages import MEASURE, SEED, Inputs, prepare, run_once, score_triples, teachers, train_teacher, training

LEARNING_RATES = (5e-5, 1.5e-4)
EPOCHS = 2
# BERT_DOT on three of the backbone's six layers; the backbone was trained with mean pooling.
STUDENT = {"architecture": "bert_dot", "layers": [0, 1, 5], "config_overrides": {"pooling": "mean"}}
TEACHER_OF = {
    "no teacher": "the labels of the triples",
    "T1": "BERT_CAT trained on the same triples",
    "T2": "the mean of BERT_CAT trained on the same triples and all-MiniLM-L6-v2",
}


def run_demo(output: Path, seeds: int = 1) -> dict:
    """Run every stage that is not done, print the outcome, write `results.json`.

    Args:
        output: folder of all stages.
        seeds: training seeds of each chosen student; test figures are their mean per query.

    Returns:
        What `results.json` holds.
    """
    output.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of loading and saving weights, dozens of which would hide the others
    announce("1/5 collection, BM25 candidates, triples")
    inputs = prepare(output)
    announce("2/5 teacher: BERT_CAT on the triples' labels")
    teacher = train_teacher(inputs)
    announce("3/5 teacher scores of the triples")
    scores = score_triples(inputs)
    announce("4/5 students: the same triples without a teacher, with T1, with T2")
    tuning = {
        condition: {rate: run_once(*student(inputs, scores, condition, rate)) for rate in LEARNING_RATES}
        for condition in ("no teacher", "T2")
    }
    chosen = {
        condition: max(runs, key=lambda rate: runs[rate]["after"][f"eval_{MEASURE}"])
        for condition, runs in tuning.items()
    }
    chosen["T1"] = chosen["T2"]  # the same loss
    for condition, seed in product(TEACHER_OF, range(SEED, SEED + seeds)):
        run_once(*student(inputs, scores, condition, chosen[condition], seed))
    announce("5/5 the test split, once; latencies and the report")
    rankers = rankers_on_test(inputs, scores, chosen, seeds)
    runs = runs_on_test(inputs, rankers)
    values = values_on_test(inputs, runs)
    results = {
        "collection": inputs.stats,
        "queries": {split: len(read_qrels(inputs.qrels(split))) for split in ("train", "dev", "test")},
        "triples": sum(1 for _ in inputs.labels.open(encoding="utf-8")),
        "teacher_dev": teacher["after"],
        "tuning_dev": {c: {str(rate): run["after"] for rate, run in runs.items()} for c, runs in tuning.items()},
        "chosen_learning_rate": chosen,
        "epochs_offered": EPOCHS,
        "seeds": seeds,
        "measure": MEASURE,
        "test": {name: fmean(by_query.values()) for name, by_query in values.items()},
        "against_no_teacher": {name: paired_t_test(values[name], values["no teacher"]) for name in ("T1", "T2")},
    }
    with writing(output / "results.json") as file:
        json.dump(results, file, indent=2)
    trained = {name: student_folder(inputs, scores, name, chosen[name]) for name in TEACHER_OF}
    page = write_demo_report(inputs, runs, {name: loads[0] for name, loads in rankers.items()}, trained)
    typer.echo(outcome_text(results))
    typer.echo(f"Report with tests, latencies, curves and single queries: {page}")
    return results


def announce(stage: str) -> None:
    """Say on standard error which stage begins; finished ones pass in a moment."""
    typer.echo(f"--- {stage}", err=True)


def student_job(output: str | Path) -> tuple[TrainingJob, RankingTrainingArguments]:
    """The demo's student under T2, ready for `train_ranker`; runs the stages before it that are not done."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    inputs = prepare(output)
    train_teacher(inputs)
    job, args = student(inputs, score_triples(inputs), "T2", LEARNING_RATES[0])
    args.output_dir = str(output / "student")
    return job, args


def student(
    inputs: Inputs, scores: dict[str, Path], condition: str, learning_rate: float, seed: int = SEED
) -> tuple[TrainingJob, RankingTrainingArguments]:
    """The training of a student under one condition."""
    name = f"student-{condition.replace(' ', '_')}-{learning_rate:g}-seed{seed}"
    job = STUDENT | {"teacher_scores": str(scores.get(condition, inputs.labels))}
    loss = "margin_mse" if condition in scores else "ranknet"
    # A teacher's margins are on its own scale; matched, the student need not change its scale before it learns ranks.
    settings = {"teacher_scale": "match"} if condition in scores else {}
    settings |= {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": f"eval_{MEASURE}"}
    return training(
        inputs, name, job, loss, learning_rate, EPOCHS, seed, teacher_name=TEACHER_OF[condition], **settings
    )


def student_folder(inputs: Inputs, scores: dict[str, Path], condition: str, rate: float, seed: int = SEED) -> Path:
    """Where a student is, or will be."""
    return Path(student(inputs, scores, condition, rate, seed)[1].output_dir)


def rankers_on_test(
    inputs: Inputs, scores: dict[str, Path], chosen: dict[str, float], seeds: int
) -> dict[str, list[Callable[[], Ranker]]]:
    """What loads each ranker that the test split compares, the trained students for every seed."""
    job, _ = student(inputs, scores, "no teacher", LEARNING_RATES[0])
    of_teachers = teachers(inputs)
    rankers = {f"teacher {name}": [partial(of_teachers.get, name)] for name in of_teachers}
    rankers["untrained student"] = [lambda: Ranker(job.load_model(), load_tokenizer(job.model_name))]
    for condition in TEACHER_OF:
        folders = [student_folder(inputs, scores, condition, chosen[condition], SEED + i) for i in range(seeds)]
        rankers[condition] = [partial(Ranker.from_pretrained, folder) for folder in folders]
    return rankers


def runs_on_test(inputs: Inputs, rankers: Mapping[str, Sequence[Callable[[], Ranker]]]) -> dict[str, list[Run]]:
    """The test candidates in the order of BM25 and of each ranker, for every seed; what was scored before is read."""
    candidates, qrels = read_run(inputs.candidates("test")), read_qrels(inputs.qrels("test"))
    stores = TextStore.from_tsv(inputs.queries), TextStore.from_tsv(inputs.collection)
    evaluator, runs = RerankingEvaluator(candidates, qrels, *stores, (MEASURE,)), {"BM25": [candidates]}
    (inputs.output / "test_runs").mkdir(exist_ok=True)
    for name, loads in rankers.items():
        for seed, load in enumerate(loads, start=SEED):
            path = inputs.output / "test_runs" / f"{name.replace(' ', '_')}-seed{seed}.trec"
            if not path.is_file():
                write_run(evaluator.rerank(load()), path, tag=path.stem)
            runs.setdefault(name, []).append(read_run(path))
    return runs


def values_on_test(inputs: Inputs, runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, float]]:
    """The measure per test query, the mean over seeds."""
    qrels, values = read_qrels(inputs.qrels("test")), {}
    for name, several in runs.items():
        by_seed = [evaluate_queries(run, qrels, (MEASURE,))[MEASURE] for run in several]
        values[name] = {query_id: fmean(run[query_id] for run in by_seed) for query_id in qrels}
    return values
