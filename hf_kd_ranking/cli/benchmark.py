"""`hf-kd-ranking benchmark`: what rankers cost, as a table and JSON."""

import json as json_module
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ..artifacts import refuse_existing, writing
from ..data.texts import TextStore
from ..ranker import Ranker
from ..reporting.efficiency import efficiency_text, measure_efficiency
from . import options
from .options import Config, Dtype, Json, Overwrite, torch_dtype


def benchmark(
    model: Annotated[list[str], typer.Option(help="A ranker, PATH or NAME=PATH; several times.")],
    queries: options.Queries = None,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    output: Annotated[Path | None, typer.Option(help="Where the JSON is written, for `report`.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Candidates of every query, drawn from the collection.")] = 1_000,
    rounds: Annotated[int, typer.Option(min=1, help="Queries that are timed, drawn.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before them that are not counted.")] = 2,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: Dtype = "fp32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; a GPU where there is one if not given.")] = None,
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure latency, throughput, memory and storage of rankers, by turns."""
    if output is not None:
        refuse_existing(output, overwrite)
    settings = {"device": device, "batch_size": batch_size, "dtype": torch_dtype(dtype)}
    rankers = {
        name: partial(Ranker.from_pretrained, path, architecture, **settings)
        for name, path in options.named(model, "rankers").items()
    }
    data = options.collection_of(dataset, split, queries=queries, documents=collection)
    texts = _drawn(data.queries, rounds), _drawn(data.documents, k)
    results = measure_efficiency(rankers, *texts, warm_up)
    if output is not None:
        with writing(output) as file:
            json_module.dump(results, file, indent=1)
    typer.echo(json_module.dumps(results) if json else efficiency_text(results))


def _drawn(store: TextStore, count: int) -> list[str]:
    rows = np.sort(np.random.default_rng(42).permutation(len(store))[:count])
    return store[store.ids_of(rows)]
