"""The question of the demo: how close does a fast student come to its teacher, and what does the teacher add?

The teacher is all-MiniLM-L6-v2 as it is, which has seen none of these labels. Students keep half of its layers; those
without a teacher learn from the labels of the same queries.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import typer

from ..artifacts import locked, read_json, writing
from ..data.runs import read_qrels, write_qrels
from ..data.texts import TextStore
from ..distillation.context import Context
from ..distillation.costs import plan_text
from ..distillation.job import TEACHER, DistillJob
from ..distillation.material import prepare
from ..distillation.pipeline import distill, make_plan, subject, train_teacher
from ..distillation.students import Recipe, training
from ..distillation.teaching import rows_file
from ..distillation.wording import outcome_text
from ..distillation.work import Workspace
from ..models import ARCHITECTURES
from ..reporting.efficiency import CPU
from ..retrieval.bm25 import BM25Index
from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob
from .backbone import NAME, find_backbone
from .pydocs import SPLITS, PyDocs, build_pydocs

QUERIES = {"train": 1_200, "dev": 150, "test": 400}  # chosen for the time: 13 minutes on 2 idle cores
CANDIDATES = 20
SEARCHED = 4  # times as many queries are searched for, since the positive of half of them is no candidate
LEARNING_RATES = [5e-5, 1.5e-4]
SETTINGS = {"max_query_length": 20, "max_document_length": 48, "measure": "RR@10", "candidates_per_query": 10}
# Half the layers make a student fast; rankers that read both texts at once learn little with fewer than all six.
HALF = [0, 1, 5]
OVERRIDES = {
    "bert_dot": {"layers": HALF, "pooling": "mean"},  # as the encoder was trained
    "colbert": {"layers": HALF},
    "bert_cat": {"learning_rates": [2e-4]},
    "prettr": {"learning_rates": [2e-4], "join_layer_idx": 1},
    "tk": {"epochs": 4},
    "tkl": {"epochs": 4},
}


def demo_job(
    output: Path, seeds: int = 1, is_complete: bool = False, queries: Mapping[str, int] | None = None
) -> DistillJob:
    """Build the collection, choose the queries, and return the job.

    `queries` are split -> largest number of queries, None is QUERIES; the rest as for `run_demo`.
    """
    docs = build_pydocs(output / "collection")
    qrels = {split: output / f"qrels.{split}.txt" for split in SPLITS}
    if not (output / "queries.tsv").is_file():
        _choose_queries(docs, output, qrels, queries or QUERIES)
    model_name, backbone = find_backbone(), output / "all-MiniLM-L6-v2"  # a name for cards and tables
    if not backbone.is_symlink() and Path(model_name).is_dir():
        backbone.symlink_to(model_name)
    if backbone.is_symlink():
        model_name = str(backbone)
    has_bf16 = _has_fast_bfloat16()
    return DistillJob(
        str(docs.collection),
        str(output / "queries.tsv"),
        output=str(output),
        teachers=[model_name],
        qrels=str(qrels["train"]),
        dev_qrels=str(qrels["dev"]),
        test_qrels=str(qrels["test"]),
        model_name=model_name,
        architectures=list(ARCHITECTURES) if is_complete else ["bert_dot", "colbert"],
        k=CANDIDATES,
        learning_rates=LEARNING_RATES,
        seeds=seeds,
        bf16=has_bf16,
        teacher_bf16=has_bf16,
        overrides=OVERRIDES,
        base_model=NAME,
        data_name="PyDocs, docstrings of installed Python packages",
        **SETTINGS,
    )


def _has_fast_bfloat16() -> bool:
    """Return whether bfloat16 saves time here: a GPU, or a CPU with instructions for it; on others it is slower."""
    if torch.cuda.is_available():
        return True
    return CPU.is_file() and "avx512_bf16" in CPU.read_text(encoding="utf-8")


def _choose_queries(docs: PyDocs, output: Path, qrels: dict[str, Path], queries: Mapping[str, int]) -> None:
    """Take the first queries of each split; those of dev and test have their passage among BM25's candidates."""
    index, chosen = BM25Index.build(TextStore.from_tsv(docs.collection)), {}
    for split in SPLITS:
        grades = read_qrels(docs.qrels[split])
        texts = dict(list(TextStore.from_tsv(docs.queries[split]).items())[: SEARCHED * queries[split]])
        run = {} if split == "train" else index.search(texts, CANDIDATES)
        kept: dict[str, dict[str, int]] = {}
        for query_id, text in texts.items():
            is_found = split == "train" or not grades[query_id].keys().isdisjoint(dict(run[query_id]))
            if is_found and len(kept) < queries[split]:
                kept[query_id] = grades[query_id]
                chosen[query_id] = text
        write_qrels(kept, qrels[split])
    with writing(output / "queries.tsv") as file:  # written last: if it exists, the others do
        for query_id, text in chosen.items():
            file.write(f"{query_id}\t{text}\n")


def student_job(output: str | Path) -> tuple[TrainingJob, RankingTrainingArguments]:
    """Return the training of the demo's BERT_DOT with a teacher, after the steps before it."""
    output = Path(output)
    context, work = Context(demo_job(output)), Workspace(output)
    with locked(output):
        work.claim(subject(context.job))
        material = prepare(work, context, partial(train_teacher, work, context))
    recipe = Recipe.of_job(context.job, "bert_dot", TEACHER, context.live_teacher)
    dev = material.candidates["dev"], material.judgments["dev"]
    return training(recipe, LEARNING_RATES[0], rows_file(material.rows[TEACHER]), *dev, context, output / "student")


def run_demo(output: Path, seeds: int = 1, is_complete: bool = False) -> dict:
    """Print the plan, run every step that is not done, and print the outcome.

    Args:
        output: folder of all steps.
        seeds: number of trainings of each chosen student; the best on dev is delivered.
        is_complete: True for all architectures.

    Returns:
        The result of `distill`.
    """
    output.mkdir(parents=True, exist_ok=True)
    job = demo_job(output, seeds, is_complete)
    typer.echo(plan_text(make_plan(job)), err=True)
    outcome = distill(job)
    stats = read_json(output / "collection" / "stats.json")
    typer.echo(
        f"\nPyDocs: {sum(stats['pairs'].values()):,} documents from {stats['docstrings']:,} docstrings of "
        f"{len(stats['packages'])} packages; dropped {sum(stats['dropped'].values()):,} by length or as duplicates, "
        f"and {sum(stats['near_duplicates_removed'].values()):,} near duplicates across the splits. Dev and test "
        f"queries are first sentences whose passage is among BM25's top {CANDIDATES}, which favours BM25.\n"
        f"{outcome_text(outcome, job)}\n\n"
        f"Next: hf-kd-ranking serve --pipeline {outcome['folder']}\n"
        f"      hf-kd-ranking push {outcome['folder']} YOUR_NAME/YOUR_MODEL --dry-run\n"
        "      hf-kd-ranking distill --help, for your documents and your teacher"
    )
    return outcome
