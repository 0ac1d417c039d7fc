"""`hf-kd-ranking rerank | evaluate | compare`: from a ranker to a run, to measures, to tests between runs."""

import json as json_module
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..data.formats import refuse_existing
from ..data.texts import TextStore
from ..data.trec import Run, read_qrels, read_run, write_run
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
from ..models import ARCHITECTURES
from ..ranker import Ranker
from .options import Collection, Config, Dtype, Json, Output, Overwrite, Queries, report, torch_dtype

Runs = Annotated[list[str], typer.Option(help="A TREC run, PATH or NAME=PATH; several times.")]
Qrels = Annotated[Path, typer.Option(help="Judgments, TREC qrels.")]
Measures = Annotated[list[str], typer.Option(help="As ir_measures writes them: nDCG@10, RR(rel=2)@10; several times.")]


def rerank(
    model: Annotated[str, typer.Option(help="A ranker.")],
    queries: Queries,
    collection: Collection,
    candidates: Annotated[Path, typer.Option(help="A first stage, TREC run.")],
    output: Output,
    architecture: Annotated[str | None, typer.Option(help=f"{', '.join(ARCHITECTURES)}; of a plain encoder.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Candidates a query; all if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Re-rank a first stage's candidates."""
    refuse_existing(output, overwrite)
    run = read_run(candidates)
    run = run if k is None else run.top(k)
    stores = TextStore.from_file(queries), TextStore.from_file(collection)
    ranker = Ranker.from_pretrained(model, architecture, batch_size=batch_size, dtype=torch_dtype(dtype))
    run = rerank_run(ranker, run, *stores)
    write_run(run, output, tag=Path(model).name.replace(" ", "_"))
    report({"output": str(output), "queries": len(run), "pairs": sum(map(len, run.values()))}, json)


def evaluate(
    run: Runs,
    qrels: Qrels,
    measure: Measures = DEFAULT_MEASURES,
    dialect: Annotated[str, typer.Option(help=f"How measures are computed: {', '.join(DIALECTS)}.")] = "trec_eval",
    per_query: Annotated[bool, typer.Option("--per-query", help="Also each query's values.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure runs against judgments; a query without results counts as 0."""
    judgments, results = read_qrels(qrels), {}
    for name, ranking in _RunFiles(run, measure, dialect).items():
        values = evaluate_queries(ranking, judgments, measure, dialect)
        check_same_collection(ranking, judgments)
        results[name] = mean_values(values) | {
            "queries": len(judgments),
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
    qrels: Qrels,
    measure: Measures = DEFAULT_MEASURES,
    correction: Annotated[str, typer.Option(help=f"Over all pairs: {', '.join(CORRECTIONS)}.")] = "holm",
    intersect: Annotated[bool, typer.Option("--intersect", help="Compare the queries that all runs have.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Test all pairs of runs: paired t-test, randomisation, bootstrap interval."""
    result = compare_runs(_RunFiles(run, measure), read_qrels(qrels), measure, correction, intersect)
    typer.echo(json_module.dumps(result) if json else comparison_text(result))


class _RunFiles(Mapping[str, Run]):
    """Runs by name, each read when it is asked for and no deeper than the measures look."""

    def __init__(self, options: list[str], measures: list[str], dialect: str = "trec_eval") -> None:
        self.k, self.is_in_file_order, self.paths = deepest(measures), dialect == "matchmaker", {}
        for option in options:
            name, _, path = option.rpartition("=")
            name = name or Path(path).stem
            if name in self.paths:
                raise ValueError(f"Two runs are called {name!r}; write --run NAME=PATH.")
            self.paths[name] = path

    def __getitem__(self, name: str) -> Run:
        return read_ranking(self.paths[name]) if self.is_in_file_order else read_run(self.paths[name], self.k)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)
