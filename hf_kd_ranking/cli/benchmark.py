"""`hf-kd-ranking benchmark | report`: latency, memory and storage of rankers; all results as one HTML file."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..artifacts import refuse_existing, write_json
from ..data.passages import texts_of
from ..data.runs import read_run
from ..data.texts import TextStore
from ..errors import InputError
from ..evaluation.metrics import DEFAULT_MEASURES
from ..ranker import check_model_paths
from ..reporting.efficiency import efficiency_text, measure_efficiency
from ..reporting.report import write_report
from . import options


def benchmark(
    model: options.Models,
    queries: options.Queries = None,
    collection: options.Collection = None,
    candidates: options.Candidates = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    output: Annotated[Path | None, typer.Option(help="JSON file of the result, for `report`.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Largest number of candidates per query.")] = 1_000,
    depth: Annotated[list[int] | None, typer.Option(min=1, help="Numbers of candidates to time, at most K.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of queries that are timed, drawn at random.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Number of rounds before them that are not counted.")] = 2,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one if not given.")] = None,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Measure latency, throughput, memory and storage of rankers in turn.

    Without --candidates, every query is timed with the same documents, drawn from the collection.

    Example: hf-kd-ranking benchmark --model bert_cat bert_dot --queries queries.tsv --collection collection.tsv
    --output efficiency.json
    """
    if output is not None:
        refuse_existing(output, overwrite)
    options.torch_dtype(dtype)  # refused before the first ranker is loaded
    rankers = {}
    paths = options.named_paths(model, "rankers")
    check_model_paths(paths.values())
    for name, path in paths.items():
        settings = {"tokens_per_batch": tokens_per_batch, "must_rank": False, "device": device}
        rankers[name] = partial(options.load_ranker, path, architecture, batch_size, dtype, **settings)
    if depth and max(depth) > k:
        raise InputError(f"--depth is at most --k, {k}, got {max(depth)}.")
    data = options.open_collection(dataset, split, queries=queries, documents=collection)
    if candidates is None:
        texts, documents, counts = _drawn(data.queries, rounds), _drawn(data.documents, k), None
    else:
        run = read_run(candidates).top(k)
        query_ids = list(run)
        texts, documents, counts = [], [], []
        for row in _rows(len(query_ids), rounds):
            texts.append(data.queries[query_ids[row]])
            passages, of_documents = texts_of(data.documents, [doc_id for doc_id, _ in run[query_ids[row]]])
            documents.append(passages)
            counts.append(of_documents)
    results = measure_efficiency(rankers, texts, documents, warm_up, depth or (), counts=counts)
    if output is not None:
        write_json(output, results)
    return results, efficiency_text(results)


def _drawn(store: TextStore, count: int) -> list[str]:
    return store[store.ids_of(_rows(len(store), count))]


def _rows(total: int, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(42).permutation(total)[:count])


def report(
    results: Annotated[Path, typer.Option(help="Folder with runs/NAME.trec, qrels.txt and, optionally, more.")],
    output: options.Output,
    measure: options.Measures = DEFAULT_MEASURES,
    arrow: Annotated[list[str], typer.Option(help="Names of two runs, CONTROL=TREATMENT.")] = (),
    plot: Annotated[Path | None, typer.Option(help="File of the plot against latency, .png or .svg.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Rankers compared",
    qrels: options.Qrels = None,
    queries: options.Queries = None,
    collection: options.Collection = None,
    candidates: options.Candidates = None,
    intersect: Annotated[bool, typer.Option(help="Leave out queries that a run does not have.")] = False,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Write tables, tests, plots and single queries of rankers as one HTML file that loads nothing.

    Judgments, texts and candidates that are not given are those in the folder of results.

    Example: hf-kd-ranking report --results results --output report.html
    """
    refuse_existing(output, overwrite)
    if plot is not None:
        refuse_existing(plot, overwrite)
    arrows = []
    for pair in arrow:
        control, equals, treatment = pair.partition("=")
        if not equals:
            raise InputError(f"--arrow is CONTROL=TREATMENT, got {pair!r}.")
        arrows.append((control, treatment))
    files = {"qrels": qrels, "queries": queries, "collection": collection, "candidates": candidates}
    given = {kind: path for kind, path in files.items() if path is not None}
    return write_report(results, output, measure, arrows, plot, title, intersect, given)
