"""`hf-kd-ranking benchmark`: latency, throughput, memory and storage of rankers, as a table and JSON."""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..artifacts import refuse_existing, write_json
from ..data.texts import TextStore
from ..reporting.efficiency import efficiency_text, measure_efficiency
from . import options


def benchmark(
    model: options.Models,
    queries: options.Queries = None,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    output: Annotated[Path | None, typer.Option(help="JSON file of the result, for `report`.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Number of candidates per query, drawn from the collection.")] = 1_000,
    rounds: Annotated[int, typer.Option(min=1, help="Number of queries that are timed, drawn at random.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Number of rounds before them that are not counted.")] = 2,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one if not given.")] = None,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Measure latency, throughput, memory and storage of rankers in turn."""
    if output is not None:
        refuse_existing(output, overwrite)
    options.torch_dtype(dtype)  # refused before the first ranker is loaded
    rankers = {}
    for name, path in options.named_paths(model, "rankers").items():
        rankers[name] = partial(options.load_ranker, path, architecture, batch_size, dtype, device=device)
    data = options.open_collection(dataset, split, queries=queries, documents=collection)
    results = measure_efficiency(rankers, _drawn(data.queries, rounds), _drawn(data.documents, k), warm_up)
    if output is not None:
        write_json(output, results)
    return results, efficiency_text(results)


def _drawn(store: TextStore, count: int) -> list[str]:
    rows = np.sort(np.random.default_rng(42).permutation(len(store))[:count])
    return store[store.ids_of(rows)]
