"""`hf-kd-ranking serve`: a rerank API for one ranker, with a page to search a collection if there is one."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from .. import __version__
from ..artifacts import refuse_existing
from ..data.texts import TextStore, check_same_collection
from ..errors import InputError
from ..ranker import Ranker, check_model_paths
from . import options

if TYPE_CHECKING:  # its libraries are those of the extras
    from fastapi import FastAPI

    from ..searcher import Pipeline
    from ..serving.model import ServedModel
    from ..serving.service import Progress, Service

EXAMPLES, LONGEST_EXAMPLE = 4, 70  # queries that the page offers; characters
LOCAL_HOSTS = ["localhost", "127.0.0.1"]
KEY = "HF_KD_RANKING_API_KEY"
# Connections are kept longer than clients keep them, so that none is closed while a request is on its way.
SERVER = {"limit_concurrency": 1_000, "timeout_keep_alive": 75, "timeout_graceful_shutdown": 60}
SERVER |= {"access_log": False, "log_level": "warning", "server_header": False}
DEPTH = 100
FUSED = 0.5  # weight of BM25's scores


class CountedTexts(TextStore):
    """The texts of a store, which report to a stage of the progress as they are read."""

    def __init__(self, documents: TextStore, progress: "Progress") -> None:
        vars(self).update(vars(documents))
        self.progress = progress

    def take(self, rows: np.ndarray) -> list[str]:
        """Return the texts of some rows."""
        return _CountedList(super().take(rows), self.progress)


class _CountedList(list):
    def __init__(self, texts: list[str], progress: "Progress") -> None:
        super().__init__(texts)
        self.progress = progress

    def __iter__(self) -> Iterator[str]:
        for text in super().__iter__():
            self.progress.done = min(self.progress.done + 1, self.progress.total)
            yield text


@dataclass
class Source:
    """The model, index and collection to serve and how the collection is searched, see the options of `serve`."""

    pipeline: Path | None
    model: str | None
    collection: Path | None
    dataset: str | None
    index: Path | None
    architecture: str | None
    batch_size: int
    dtype: str | None
    candidates: Path | None
    language: str | None
    rerank: bool
    fuse: bool
    k: int
    settings: str | None
    probes: int | None

    @property
    def has_collection(self) -> bool:
        """True if there is a collection to search."""
        return self.pipeline is not None or self.collection is not None or self.dataset is not None

    @property
    def name(self) -> str:
        """Return the name of the model in requests and on the page."""
        if self.pipeline is not None:
            return self.pipeline.resolve().name
        return next(iter(self._paths()))

    def check(self) -> None:
        """Refuse options that do not go together, before anything is loaded."""
        of_model = {"--model": self.model, "--collection": self.collection, "--dataset": self.dataset}
        of_model |= {"--index": self.index, "--architecture": self.architecture, "--dtype": self.dtype}
        of_search = {"--candidates": self.candidates, "--rerank": self.rerank, "--fuse": self.fuse}
        of_search |= {"--k": self.k != DEPTH, "--settings": self.settings, "--probes": self.probes}
        of_search["--language"] = self.language
        given = ", ".join(name for name, value in (of_model | of_search).items() if value)
        if self.pipeline is not None and given:
            raise InputError(f"--pipeline has all its parts and settings; leave out {given}.")
        if self.pipeline is None and not self.model:
            raise InputError("Give --model, or --pipeline.")
        given = ", ".join(name for name, value in of_search.items() if value)
        if not self.has_collection and given:
            raise InputError(f"Give --collection, or --dataset, which {given} would search.")
        if self.model:
            check_model_paths(self._paths().values())

    def _paths(self) -> dict[str, str]:
        return options.named_paths([self.model], "models")

    def load(self, progress: "Progress") -> "ServedModel":
        """Load everything, and search once; the engine's thread runs it."""
        from ..serving.model import ServedModel

        if self.has_collection:
            from ..serving.search import SearchEngine

            pipeline = self._open_pipeline(progress)
            engine = SearchEngine(pipeline)
            progress.begin("searching once")
            engine.warm_up()
            return ServedModel(self.name, pipeline.ranker, pipeline.store, engine)
        ranker = self._load_ranker(progress)
        store = None
        if self.index is not None:
            from ..retrieval.vector_store import VectorStore

            progress.begin("verifying the index")
            store = VectorStore.open(self.index, ranker)
        return ServedModel(self.name, ranker, store)

    def _load_ranker(self, progress: "Progress") -> Ranker:
        progress.begin("loading the model")
        [path] = self._paths().values()
        return options.load_ranker(path, self.architecture, self.batch_size, self.dtype, index=self.index)

    def _open_pipeline(self, progress: "Progress") -> "Pipeline":
        from ..retrieval.bm25 import BM25Index
        from ..searcher import Pipeline, load_pipeline, open_vectors

        if self.pipeline is not None:
            progress.begin("verifying and loading the pipeline")
            return load_pipeline(self.pipeline, batch_size=self.batch_size)
        progress.begin("opening the collection")
        documents = options.open_collection(self.dataset, "test", documents=self.collection).documents
        ranker = self._load_ranker(progress)
        is_searched = self.index is not None and ranker.model.config.is_searchable and not self.rerank
        if not is_searched and (self.settings is not None or self.probes is not None):
            raise InputError("--settings and --probes are for an --index that the ranker searches.")
        if self.language is not None and (self.candidates is not None or (is_searched and not self.fuse)):
            raise InputError("--language is for a BM25 index that serve builds; --candidates has its own.")
        store = vectors_index = first_stage = None
        if self.index is not None:
            progress.begin("verifying the index")
            store, vectors_index = open_vectors(self.index, ranker, is_searched, self.settings, self.probes)
            check_same_collection({"documents": documents.collection, str(self.index): store.collection})
        if self.candidates is not None:
            first_stage = BM25Index.open(self.candidates)
        elif self.fuse or not is_searched:
            count = len(documents)
            typer.echo(f"building a BM25 index of {count:,} documents (--candidates takes a saved one)", err=True)
            progress.begin("building the BM25 index", count)
            first_stage = BM25Index.build(CountedTexts(documents, progress), language=self.language)
        weight = FUSED if self.fuse else 0.0
        return Pipeline(documents, first_stage, ranker, self.k, weight, store, vectors_index)


def serve(
    pipeline: Annotated[Path | None, typer.Option(help="Pipeline that `distill` wrote, in place of --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Ranker: a folder or a name on the Hub, or NAME=PATH.")] = None,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    index: Annotated[Path | None, typer.Option(help="Output of `index` for the ranker.")] = None,
    candidates: Annotated[Path | None, typer.Option(help="BM25 index; built if needed.")] = None,
    language: options.Language = None,
    rerank: Annotated[bool, typer.Option(help="Re-rank candidates also if the index could search.")] = False,
    fuse: Annotated[bool, typer.Option(help="Add BM25's scores to those of the ranker.")] = False,
    k: Annotated[int, typer.Option(min=1, help="Number of candidates that are re-ranked.")] = DEPTH,
    settings: options.FaissSettings = None,
    probes: options.Probes = None,
    queries: Annotated[Path | None, typer.Option(help="Queries; the page offers a few of them as examples.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Passage search",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8_000,
    raw_scores: Annotated[bool, typer.Option(help="Answer with scores of the model, not their sigmoid.")] = False,
    cors: Annotated[list[str] | None, typer.Option(help="Sites whose pages may read answers.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per batch; 1 turns batching off.")] = 16_384,
    batch_window: Annotated[float, typer.Option(min=0, help="Longest wait for a batch to fill, in ms.")] = 5.0,
    max_waiting: Annotated[int, typer.Option(min=1, help="Number of waiting requests; more get status 429.")] = 256,
    docker: Annotated[Path | None, typer.Option(help="New folder for a Docker image or a Space; no serving.")] = None,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Serve a rerank API that clients of Cohere, Jina and text-embeddings-inference speak, and a search page.

    The environment variable HF_KD_RANKING_API_KEY sets a key that requests must have.

    Example: hf-kd-ranking serve --model bert_dot --port 8000
    """
    how = (candidates, language, rerank, fuse, k, settings, probes)
    source = Source(pipeline, model, collection, dataset, index, architecture, batch_size, dtype, *how)
    source.check()
    with _explain_extras(source.has_collection):
        from ..serving.app import make_app
        from ..serving.docker import write_image
        from ..serving.service import Progress, Service
    about = None
    if source.has_collection:
        about = {"title": title, "examples": _examples(queries)}
    if docker is not None:
        refuse_existing(docker, overwrite=False)
        write_image(docker, source.load(Progress()), about, batch_size, __version__)
        return options.print_result({"docker": str(docker)}, as_json)
    listener = _listen(host, port)  # before models are loaded, so that a port in use is reported at once
    engine = {"window_ms": batch_window, "batch_tokens": batch_tokens, "max_waiting": max_waiting}
    service = Service(source.load, raw_scores=raw_scores, **engine)
    hosts = LOCAL_HOSTS if host in LOCAL_HOSTS else ["*"]
    app = make_app(service, about, os.environ.get(KEY), hosts, cors or [])
    address = f"http://{host}:{listener.getsockname()[1]}"
    options.print_result({"address": address, "docs": f"{address}/docs", "stop": "Ctrl-C"}, as_json)
    _run(service, app, listener)


def _run(service: "Service", app: "FastAPI", listener: socket.socket) -> None:
    """Answer until a signal comes; raise the error of a model that cannot be loaded."""
    import uvicorn

    log = logging.StreamHandler()  # lines of JSON
    access_log = logging.getLogger("hf_kd_ranking.serving.access")
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    access_log.addHandler(log)
    server = uvicorn.Server(uvicorn.Config(app, **SERVER))
    service.on_failure = lambda: setattr(server, "should_exit", True)
    try:
        server.run(sockets=[listener])
    finally:
        access_log.removeHandler(log)
    if service.failure is not None:
        raise service.failure


@contextmanager
def _explain_extras(has_collection: bool) -> Iterator[None]:
    """Turn the error of a missing library into an InputError, before anything is loaded."""
    try:
        if has_collection:
            import_module("hf_kd_ranking.searcher")
        yield
    except ModuleNotFoundError as error:
        extras = "retrieval,serve" if has_collection else "serve"
        raise InputError(f"serve needs {error.name}: pip install 'hf_kd_ranking[{extras}]'.") from None


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
