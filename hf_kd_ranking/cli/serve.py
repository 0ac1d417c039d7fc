"""`hf-kd-ranking serve`: a page to search with one ranker, or with a pipeline."""

import socket
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..artifacts import refuse_existing
from ..data.texts import TextStore, check_same_collection
from ..errors import InputError
from ..ranker import Ranker
from . import options

if TYPE_CHECKING:  # its libraries are those of the extras
    from ..searcher import Pipeline

EXAMPLES, LONGEST_EXAMPLE = 4, 70  # queries that the page offers; characters
LOCAL_HOSTS = ["localhost", "127.0.0.1"]
SERVER = {"limit_concurrency": 100, "timeout_keep_alive": 5, "proxy_headers": False, "server_header": False}
DEPTH = 100
FUSED = 0.5  # weight of BM25's scores


def serve(
    pipeline: Annotated[Path | None, typer.Option(help="Pipeline that `distill` wrote, in place of --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Ranker: a folder or a name on the Hub.")] = None,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    index: Annotated[Path | None, typer.Option(help="Output of `index` for the ranker.")] = None,
    candidates: Annotated[Path | None, typer.Option(help="BM25 index; built if needed.")] = None,
    rerank: Annotated[bool, typer.Option(help="Re-rank candidates also if the index could search.")] = False,
    fuse: Annotated[bool, typer.Option(help="Add BM25's scores to those of the ranker.")] = False,
    k: Annotated[int, typer.Option(min=1, help="Number of candidates that are re-ranked.")] = DEPTH,
    settings: options.FaissSettings = None,
    probes: options.Probes = None,
    queries: Annotated[Path | None, typer.Option(help="Queries; the page offers a few of them as examples.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Passage search",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8_000,
    proxy: Annotated[bool, typer.Option(help="Behind a proxy nearby: X-Forwarded-For names clients.")] = False,
    space: Annotated[Path | None, typer.Option(help="New folder for a Hugging Face Space; no serving.")] = None,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Search a collection on a web page: passages, tokens that matched, the time of every stage."""
    parts = {"--model": model, "--collection": collection, "--dataset": dataset, "--index": index}
    parts |= {"--candidates": candidates, "--rerank": rerank, "--fuse": fuse, "--k": k != DEPTH}
    parts |= {"--settings": settings, "--probes": probes, "--architecture": architecture, "--dtype": dtype}
    _check_source(pipeline, parts)
    try:
        import uvicorn

        from ..searcher import load_pipeline
        from ..serving.app import SearchPage, make_app
        from ..serving.connections import LimitedProtocol, ProxiedProtocol
        from ..serving.search import SearchEngine
        from ..serving.space import write_space
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install 'hf_kd_ranking[retrieval,serve]'.") from None
    if space is None:
        listener = _listen(host, port)  # before models are loaded, so that a port in use is reported at once
    else:
        refuse_existing(space, overwrite=False)
    if pipeline is not None:
        searched = load_pipeline(pipeline, batch_size=batch_size)
    else:
        documents = options.open_collection(dataset, "test", documents=collection).documents
        ranker = options.load_ranker(model, architecture, batch_size, dtype, index=index)
        made = _make_pipeline(documents, ranker, index, candidates, rerank, fuse, settings, probes)
        searched = replace(made, depth=k)
    engine = SearchEngine(searched)
    engine.warm_up()
    count = len(searched.documents)
    about = {"title": title, "documents": count, "examples": _examples(queries)}
    about |= {"name": (pipeline or Path(model)).resolve().name, "line": engine.describe()}
    if space is not None:
        write_space(space, searched, about, batch_size, __version__)
        return options.print_result({"space": str(space), "documents": count}, as_json)
    app = make_app(SearchPage(engine, about, behind_proxy=proxy), LOCAL_HOSTS if host in LOCAL_HOSTS else ["*"])
    address = f"http://{host}:{listener.getsockname()[1]}"
    options.print_result({"address": address, "documents": count, "stop": "Ctrl-C"}, as_json)
    protocol = ProxiedProtocol if proxy else LimitedProtocol
    uvicorn.Server(uvicorn.Config(app, http=protocol, log_level="warning", **SERVER)).run(sockets=[listener])


def _check_source(pipeline: Path | None, parts: Mapping[str, Any]) -> None:
    """Refuse a pipeline with options of `--model` (option -> value, false if it is not given), or neither of both."""
    given = [name for name, value in parts.items() if value]
    if pipeline is not None and given:
        raise InputError(f"--pipeline has all its parts and settings; leave out {', '.join(given)}.")
    if pipeline is None and not parts["--model"]:
        raise InputError("Give --model, or --pipeline.")


def _make_pipeline(
    documents: TextStore,
    ranker: Ranker,
    index: Path | None,
    candidates: Path | None,
    rerank: bool,
    fuse: bool,
    settings: str | None,
    probes: int | None,
) -> "Pipeline":
    """Return the pipeline of the options beside `--model`; a ranker searches the index if it can."""
    from ..retrieval.bm25 import BM25Index
    from ..searcher import Pipeline, open_vectors

    is_searched = index is not None and ranker.model.config.is_searchable and not rerank
    if not is_searched and (settings is not None or probes is not None):
        raise InputError("--settings and --probes are for an --index that the ranker searches.")
    store = vectors_index = first_stage = None
    if index is not None:
        store, vectors_index = open_vectors(index, ranker, is_searched, settings, probes)
        check_same_collection({"documents": documents.collection, str(index): store.collection})
    if candidates is not None:
        first_stage = BM25Index.open(candidates)
    elif fuse or not is_searched:
        typer.echo(f"building a BM25 index of {len(documents):,} documents (--candidates takes a saved one)", err=True)
        first_stage = BM25Index.build(documents)
    weight = FUSED if fuse else 0.0
    return Pipeline(documents, first_stage, ranker, DEPTH, weight, store, vectors_index)


def _examples(queries: Path | None) -> list[str]:
    """Return the first short queries of a file."""
    if queries is None:
        return []
    texts = TextStore.from_file(queries).items()
    return list(islice((text for _, text in texts if len(text) <= LONGEST_EXAMPLE), EXAMPLES))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        message = f"Cannot listen at {host}, port {port}: {error.strerror}; --port 0 takes a free one."
        raise InputError(message) from None
