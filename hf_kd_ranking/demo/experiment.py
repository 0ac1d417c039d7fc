"""The demo's question: does a student learn more from a teacher's scores than from the labels, on the same triples?

Conditions, as in the paper: no teacher (RankNet on the labels), T1 (Margin-MSE from one BERT_CAT), T2 (Margin-MSE from
the mean of two teachers). All see the same triples. The learning rate of each loss (Margin-MSE with T2) is chosen on
the development split from one grid, and so is each run's best epoch; the test split is scored once, with the chosen.
"""

import json
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
from ..ranker import Ranker
from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob
from .outcome import outcome_text
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
    announce("5/5 the test split, once")
    values = values_on_test(inputs, scores, chosen, seeds)
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
    typer.echo(outcome_text(results))
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


def values_on_test(
    inputs: Inputs, scores: dict[str, Path], chosen: dict[str, float], seeds: int
) -> dict[str, dict[str, float]]:
    """The measure per test query of BM25, teachers, untrained student and students, the last over their seeds."""
    evaluator = RerankingEvaluator(
        read_run(inputs.candidates("test")),
        read_qrels(inputs.qrels("test")),
        TextStore.from_tsv(inputs.queries),
        TextStore.from_tsv(inputs.collection),
        (MEASURE,),
    )
    job, _ = student(inputs, scores, "no teacher", LEARNING_RATES[0])
    rankers = {f"teacher {name}": ranker for name, ranker in teachers(inputs).items()}
    tokenizer = rankers["teacher MiniLM"].tokenizer
    rankers["untrained student"] = Ranker(job.load_model(), tokenizer)
    runs = {"BM25": [evaluator.candidates]}
    runs |= {name: [_rerank_once(inputs, evaluator, name, ranker)] for name, ranker in rankers.items()}
    for condition in TEACHER_OF:
        rate, runs[condition] = chosen[condition], []
        for seed in range(SEED, SEED + seeds):
            folder = Path(student(inputs, scores, condition, rate, seed)[1].output_dir)
            runs[condition].append(_rerank_once(inputs, evaluator, folder.name, Ranker.from_pretrained(folder)))
    values = {}
    for name, several in runs.items():
        by_seed = [evaluate_queries(run, evaluator.qrels, (MEASURE,))[MEASURE] for run in several]
        values[name] = {query_id: fmean(run[query_id] for run in by_seed) for query_id in evaluator.qrels}
    return values


def _rerank_once(inputs: Inputs, evaluator: RerankingEvaluator, name: str, ranker: Ranker) -> Run:
    path = inputs.output / "test_runs" / f"{name.replace(' ', '_')}.trec"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_run(evaluator.rerank(ranker), path, tag=path.stem)
    return read_run(path)
