"""`hf-kd-ranking rerank | evaluate | compare`: from a ranker to a run, to measures, to tests between runs."""

import json as json_module
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import refuse_existing
from ..data.collections import RankingCollection
from ..data.runs import Run, read_run, write_run
from ..evaluation.matchmaker import read_ranking
from ..evaluation.metrics import (
    DEFAULT_MEASURES,
    DIALECTS,
    check_same_collection,
    deepest,
    evaluate_queries,
    mean_values,
)
from ..evaluation.rerank import rerank_run
from ..evaluation.significance import CORRECTIONS, compare_runs, comparison_text
from ..processes import processes
from ..ranker import Ranker
from . import options
from .options import Config, Dtype, Json, Output, Overwrite, torch_dtype

BM25_DEPTH = 100

Runs = Annotated[list[str], typer.Option(help="A TREC run, PATH or NAME=PATH; several times.")]
Measures = Annotated[list[str], typer.Option(help="As ir_measures writes them: nDCG@10, RR(rel=2)@10; several times.")]


def rerank(
    model: Annotated[str, typer.Option(help="A ranker.")],
    output: Output,
    queries: options.Queries = None,
    collection: options.Collection = None,
    candidates: Annotated[Path | None, typer.Option(help="A first stage, TREC run; BM25 if not given.")] = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    architecture: options.Architecture = None,
    k: Annotated[int | None, typer.Option(min=1, help="Candidates a query; all if not given, of BM25 100.")] = None,
    batch_size: options.BatchSize = 64,
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Re-rank a first stage's candidates; `accelerate launch -m hf_kd_ranking rerank` shares the work."""
    refuse_existing(output, overwrite)
    parts = {"queries": queries, "documents": collection, "candidates": candidates}
    data = options.collection_of(dataset, split, **parts)
    state, settings = processes(), {"batch_size": batch_size, "dtype": torch_dtype(dtype)}
    device = state.device if state.num_processes > 1 else None
    ranker = Ranker.from_pretrained(model, architecture, device, is_distributed=state.num_processes > 1, **settings)
    with state.main_process_first():  # it builds the stores
        stores, run = (data.queries, data.documents), data.candidates or _bm25(data, k or BM25_DEPTH)
    run = rerank_run(ranker, run if k is None else run.top(k), *stores)
    if state.is_main_process:
        write_run(run, output, tag=Path(model).resolve().name.replace(" ", "_"))
        options.report({"output": str(output), "queries": len(run), "pairs": sum(map(len, run.values()))}, json)


def _bm25(data: RankingCollection, k: int) -> Run:
    from ..retrieval.bm25 import BM25Index  # an extra, and only needed here

    return BM25Index.build(data.documents).search(data.judged_queries(), k)


def evaluate(
    run: Runs,
    qrels: options.Qrels = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    measure: Measures = DEFAULT_MEASURES,
    dialect: Annotated[str, typer.Option(help=f"How measures are computed: {', '.join(DIALECTS)}.")] = "trec_eval",
    per_query: Annotated[bool, typer.Option("--per-query", help="Also each query's values.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure runs against judgments; a query without results counts as 0."""
    judgments, results = options.collection_of(dataset, split, qrels=qrels).qrels, {}
    for name, ranking in _RunFiles(run, measure, dialect).items():
        values = evaluate_queries(ranking, judgments, measure, dialect)
        check_same_collection(ranking, judgments)
        results[name] = mean_values(values) | {
            "queries": len(next(iter(values.values()))),
            "without_results": len(judgments.keys() - ranking.keys()),
        }
        if per_query:
            results[name]["per_query"] = values
    if json or per_query:
        typer.echo(json_module.dumps(results))
        return
    for name, figures in results.items():
        typer.echo(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


def compare(
    run: Runs,
    qrels: options.Qrels = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    measure: Measures = DEFAULT_MEASURES,
    correction: Annotated[str, typer.Option(help=f"Over all pairs: {', '.join(CORRECTIONS)}.")] = "holm",
    intersect: Annotated[bool, typer.Option("--intersect", help="Compare the queries that all runs have.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Test all pairs of runs: paired t-test, randomisation, bootstrap interval."""
    judgments = options.collection_of(dataset, split, qrels=qrels).qrels
    result = compare_runs(_RunFiles(run, measure), judgments, measure, correction, intersect)
    typer.echo(json_module.dumps(result) if json else comparison_text(result))


class _RunFiles(Mapping[str, Run]):
    """Runs by name, each read when it is asked for and no deeper than the measures look."""

    def __init__(self, runs: list[str], measures: list[str], dialect: str = "trec_eval") -> None:
        self.k, self.is_in_file_order = deepest(measures), dialect == "matchmaker"
        self.paths = options.named(runs, "runs")

    def __getitem__(self, name: str) -> Run:
        return read_ranking(self.paths[name]) if self.is_in_file_order else read_run(self.paths[name], self.k)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
