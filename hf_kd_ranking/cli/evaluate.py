"""`hf-kd-ranking rerank | evaluate | compare`: from a ranker to a run, to measures, to tests between runs."""

import json
from collections import UserDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifacts import refuse_existing
from ..data.passages import check_aggregation, run_of_documents
from ..data.runs import Run, check_run_ids, read_run, write_run
from ..errors import InputError
from ..evaluation import metrics
from ..evaluation.rerank import rerank_run
from ..evaluation.significance import CORRECTIONS, compare_runs, comparison_text
from ..evaluation.suites import SUITES, Suite, evaluate_suite, read_results, suite_text, summarize
from ..processes import processes
from . import options

_SUITE = "suite model results split measure retrieve k language exclude_same_id batch_size tokens_per_batch dtype"
# What `evaluate` measures -> the options that it reads then.
READ = {
    "--run": "run qrels dataset split measure exclude_same_id aggregation per_query".split(),
    "--suite": _SUITE.split(),
    "--results alone": ["results"],
}


def rerank(
    model: options.Model,
    output: options.Output,
    queries: options.Queries = None,
    collection: options.Collection = None,
    candidates: options.Candidates = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    architecture: options.Architecture = None,
    k: Annotated[int | None, typer.Option(min=1, help="Candidates per query; default: all, or 100 of BM25.")] = None,
    language: options.Language = None,
    exclude_same_id: options.ExcludeSameId = False,
    batch_size: options.BatchSize = 64,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
) -> options.Result | None:
    """Re-rank candidates, or those of BM25; `accelerate launch -m hf_kd_ranking rerank` shares the work.

    Example: hf-kd-ranking rerank --model bert_dot --queries queries.tsv --collection collection.tsv --candidates
    bm25.trec --output reranked.trec
    """
    refuse_existing(output, overwrite)
    data = options.open_collection(dataset, split, queries=queries, documents=collection, candidates=candidates)
    state = processes()
    ranker = options.load_ranker(model, architecture, batch_size, dtype, tokens_per_batch, **_sharing())
    with state.main_process_first():  # it builds the stores
        stores = data.queries, data.documents
        first_stage = data.candidates
        if first_stage and language is not None:
            raise InputError("--language is for the candidates of BM25, and there are other candidates.")
        if not first_stage:
            from ..retrieval.bm25 import BM25Index  # an extra, and only needed here

            index = BM25Index.build(data.documents, language=language)
            check_run_ids(data.judged_queries(), "queries")
            check_run_ids(data.documents, "documents")
            first_stage = index.search(data.judged_queries(), (k or 100) + exclude_same_id)
            k = k or 100
    if exclude_same_id:
        first_stage = first_stage.without_same_ids()
    if k is not None:
        first_stage = first_stage.top(k)
    run = rerank_run(ranker, first_stage, *stores)
    if not state.is_main_process:
        return None
    write_run(run, output, tag=options.run_tag(model))
    pairs = sum(len(ranking) for ranking in run.values())
    cuts = ranker.processor.cuts.shares(ranker.model.config.max_document_length)
    return {"output": str(output), "queries": len(run), "pairs": pairs, **cuts}


def _sharing() -> dict[str, Any]:
    """Return the arguments of a ranker that shares its work among the processes of a job, if there are several."""
    state = processes()
    is_distributed = state.num_processes > 1
    return {"device": state.device if is_distributed else None, "is_distributed": is_distributed}


def evaluate(
    context: typer.Context,
    run: Annotated[list[str] | None, typer.Option("--run", help="TREC runs, each PATH or NAME=PATH.")] = None,
    qrels: options.Qrels = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    measure: options.Measures = metrics.DEFAULT_MEASURES,
    exclude_same_id: options.ExcludeSameId = False,
    aggregation: options.OfPassages = None,
    per_query: Annotated[bool, typer.Option(help="Print the values of each query as well, as JSON.")] = False,
    suite: Annotated[str | None, typer.Option(help=f"Folder of data sets, {' or '.join(SUITES)}.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="Rankers, each PATH or NAME=PATH.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of results files of a suite.")] = None,
    retrieve: Annotated[bool, typer.Option(help="Suite: search with the rankers; else they re-rank.")] = False,
    k: Annotated[int, typer.Option(min=1, help="Suite: number of documents per query.")] = 100,
    language: options.Language = None,
    batch_size: options.BatchSize = 64,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Measure runs against judgments, or rankers on all data sets of a suite; a query without results counts as 0.

    A finished set of a suite is not measured again, and `accelerate launch -m hf_kd_ranking evaluate` shares the work.
    With --results only, print the table of the files there.

    Options that are not read are refused: --qrels, --dataset, --aggregation and --per-query are for --run; --model,
    --retrieve, --k, --language, --batch-size, --tokens-per-batch and --dtype for --suite.

    Example: hf-kd-ranking evaluate --run bm25.trec dense.trec --qrels qrels.txt --measure nDCG@10 RR@10
    """
    if suite is not None:
        _refuse_unread(context, "--suite")
        if results is None or not model:
            raise InputError("A suite needs --suite, --model and --results; --results alone prints its files.")
    elif run:
        _refuse_unread(context, "--run")
        judgments = options.open_collection(dataset, split, qrels=qrels).qrels
        return options.print_result(
            _evaluate_runs(run, judgments, measure, exclude_same_id, aggregation, per_query), as_json
        )
    elif results is None:
        raise InputError("Give --run, or --suite with --model and --results.")
    else:
        _refuse_unread(context, "--results alone")
    failed = {}
    if suite is not None:
        settings = Suite(suite, split, measure, retrieve, k, language, exclude_same_id)
        dtype = dtype or options.default_precision()
        loading = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "dtype": dtype}
        loading |= _sharing()
        load = partial(options.load_ranker, architecture=None, **loading)
        failed = evaluate_suite(settings, options.named_paths(model, "models"), load, results, dtype)
    if processes().is_main_process:
        _print_suite(results, failed, as_json)
    if failed:
        raise typer.Exit(1)
    return None


def _print_suite(results: Path, failed: Mapping[str, str], as_json: bool) -> None:
    summary = summarize(read_results(results))
    options.print_result(({**summary, "failed": failed}, suite_text(summary)), as_json)
    for set_name, message in failed.items():
        typer.echo(f"error: {set_name}: {message}", err=True)


def _refuse_unread(context: typer.Context, what: str) -> None:
    """Refuse options that are given, also by an option file, and not read."""
    unread = []
    for option in context.command.params:
        is_given = context.get_parameter_source(option.name).name != "DEFAULT"
        if is_given and option.name not in (*READ[what], "as_json", "config", "help"):
            unread.append(option.opts[0])
    if unread:
        raise InputError(f"evaluate with {what} does not read {', '.join(unread)}; leave out what is not read.")


def _evaluate_runs(
    run: list[str],
    judgments: metrics.Qrels,
    measure: list[str],
    exclude_same_id: bool,
    aggregation: str | None,
    per_query: bool,
) -> options.Result:
    results, lines = {}, []
    for name, ranking in _RunFiles(run, measure, exclude_same_id, aggregation).items():
        values = metrics.evaluate_queries(ranking, judgments, measure)
        metrics.check_same_collection(ranking, judgments)
        figures = metrics.mean_values(values)
        figures["queries"] = len(next(iter(values.values())))
        figures["without_results"] = len(judgments.keys() - ranking.keys())
        lines.append(f"{name}: " + ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items()))
        results[name] = figures
        if per_query:
            figures["per_query"] = values
    if per_query:
        return results, json.dumps(results)
    return results, "\n".join(lines)


def compare(
    run: options.Runs,
    qrels: options.Qrels = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    measure: options.Measures = metrics.DEFAULT_MEASURES,
    correction: Annotated[str, typer.Option(help=f"Correction over all pairs: {', '.join(CORRECTIONS)}.")] = "holm",
    intersect: Annotated[bool, typer.Option(help="Compare only the queries that all runs have.")] = False,
    exclude_same_id: options.ExcludeSameId = False,
    aggregation: options.OfPassages = None,
) -> options.Result:
    """Test all pairs of runs: paired t-test, randomisation, bootstrap interval.

    Example: hf-kd-ranking compare --run bm25.trec dense.trec --qrels qrels.txt --measure nDCG@10
    """
    judgments = options.open_collection(dataset, split, qrels=qrels).qrels
    result = compare_runs(
        _RunFiles(run, measure, exclude_same_id, aggregation), judgments, measure, correction, intersect
    )
    return result, comparison_text(result)


class _RunFiles(UserDict[str, Run]):
    """Runs by name, each read when it is asked for and no deeper than the measures look."""

    def __init__(self, runs: list[str], measures: list[str], exclude_same_id: bool, aggregation: str | None) -> None:
        super().__init__(options.named_paths(runs, "runs"))
        self.k = metrics.deepest(measures)
        if aggregation is not None:
            check_aggregation(aggregation)
            self.k = None  # it is not known in how many passages the documents are
        elif exclude_same_id and self.k is not None:
            self.k += 1
        self.exclude_same_id = exclude_same_id
        self.aggregation = aggregation

    def __getitem__(self, name: str) -> Run:
        run = run_of_documents(read_run(self.data[name], self.k), self.aggregation)
        return run.without_same_ids() if self.exclude_same_id else run
