"""`hf-kd-ranking serve`: a page to search with one ranker, or two side by side."""

import socket
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..artifacts import refuse_existing
from ..data.texts import TextStore
from ..ranker import Ranker
from . import options
from .options import Config, Dtype, Json, report, torch_dtype

if TYPE_CHECKING:
    from ..serving.search import SearchEngine

EXAMPLES, LONGEST_EXAMPLE = 4, 70  # queries that the page offers; characters


def serve(
    model: Annotated[list[str], typer.Option(help="A ranker, PATH or NAME=PATH; once or twice.")] = (),
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    index: Annotated[list[Path], typer.Option(help="What `index` wrote with one of the rankers.")] = (),
    candidates: Annotated[Path | None, typer.Option(help="A BM25 index; built where none is given.")] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Re-rank also where an index could search.")] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="Add BM25's scores to those of re-ranked candidates.")] = False,
    k: Annotated[int, typer.Option(min=1, help="Candidates that are re-ranked.")] = 100,
    settings: Annotated[str | None, typer.Option(help="Of a faiss index: nprobe=16, efSearch=128.")] = None,
    probes: Annotated[int | None, typer.Option(min=1, help="ColBERT: centroids a query term.")] = None,
    queries: Annotated[Path | None, typer.Option(help="The page offers a few of them as examples.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Passage search",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8_000,
    proxy: Annotated[bool, typer.Option("--proxy", help="A proxy is before it: clients by X-Forwarded-For.")] = False,
    space: Annotated[Path | None, typer.Option(help="Write a Hugging Face Space instead, into a new folder.")] = None,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: Dtype = "fp32",
    config: Config = None,
    json: Json = False,
) -> None:
    """Search a collection on a web page: results side by side, terms that matched, the time of every stage."""
    if not 1 <= len(model) <= 2:
        raise ValueError(f"Give --model once, or twice to compare (and --index where there is one), got {len(model)}.")
    try:
        import uvicorn

        from ..serving.app import SearchPage, make_app
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'hf_kd_ranking[retrieval,serve]'.") from None
    from ..serving.space import write_space

    if space is not None:
        refuse_existing(space, overwrite=False)
    listener = _listen(host, port) if space is None else None
    documents = options.collection_of(dataset, "test", documents=collection).documents
    rankers = {
        name: Ranker.from_pretrained(path, architecture, batch_size=batch_size, dtype=torch_dtype(dtype))
        for name, path in options.named(model, "rankers").items()
    }
    engine = _engine(rankers, documents, index, candidates, rerank, fuse, k, settings, probes)
    engine.search(" ".join(next(documents.items())[1].split()[:8]))  # warms up; finds what does not fit together
    about = _about(engine, title, len(documents), queries)
    if space is not None:
        kept = {"--k": k, "--settings": settings, "--probes": probes, "--batch-size": batch_size, "--dtype": dtype}
        written = [str(part) for option in kept.items() if option[1] is not None for part in option]
        written += [flag for flag, is_given in {"--rerank": rerank, "--fuse": fuse}.items() if is_given]
        write_space(space, engine, about, written, __version__)
        report({"space": str(space), "documents": len(documents)}, json)
        return
    app = make_app(
        SearchPage(engine, about, behind_proxy=proxy),
        [host, "localhost", "127.0.0.1"] if host in ("127.0.0.1", "localhost") else ["*"],
    )
    address = f"http://{host}:{listener.getsockname()[1]}"
    report({"address": address, "documents": len(documents), "stop": "Ctrl-C"}, json)
    server = uvicorn.Config(
        app, log_level="warning", proxy_headers=False, server_header=False, limit_concurrency=100, timeout_keep_alive=5
    )
    uvicorn.Server(server).run(sockets=[listener])


def _engine(
    rankers: dict[str, Ranker],
    documents: TextStore,
    folders: Sequence[Path],
    candidates: Path | None,
    rerank: bool,
    fuse: bool,
    k: int,
    settings: str | None,
    probes: int | None,
) -> "SearchEngine":
    """Each ranker with its index, if it has one, and BM25 where a ranker re-ranks."""
    from ..retrieval.base import open_searchable
    from ..retrieval.bm25 import BM25Index
    from ..retrieval.colbert import ColBERTIndex
    from ..retrieval.stored_reranker import StoredReranker
    from ..serving.search import RankerSearch, SearchEngine

    found, searches = _matched(rankers, folders), {}
    tuned = [name for name, folder in found.items() if (folder / "dense").is_dir() and not rerank]
    if settings is not None and not tuned:
        raise ValueError(f"--settings {settings} are of a faiss index that searches; `index --factory` makes one.")
    for name, ranker in rankers.items():
        store = StoredReranker.open(found[name], ranker) if name in found else None
        can_search = ranker.model.config.model_type in ("BERT_Dot", "ColBERT") and store is not None and not rerank
        own = settings if name in tuned else None
        searching = open_searchable(found[name], ranker, settings=own) if can_search else None
        searches[name] = RankerSearch(ranker, documents, store, searching, probes, fuse)
    if probes is not None and not any(isinstance(search.index, ColBERTIndex) for search in searches.values()):
        raise ValueError(f"--probes {probes} are of a ColBERT that searches; `index --centroids` makes its index.")
    first_stage = None if candidates is None else BM25Index.open(candidates)
    if first_stage is None and any(search.index is None for search in searches.values()):
        typer.echo(f"Indexing {len(documents):,} passages for BM25", err=True)
        first_stage = BM25Index.build(documents)
    return SearchEngine(searches, first_stage, k)


def _matched(rankers: dict[str, Ranker], folders: Sequence[Path]) -> dict[str, Path]:
    """The index of each ranker that has one, by what the index says of the model that built it."""
    from ..artifacts import read_description
    from ..retrieval.versions import model_facts

    facts_of = {name: model_facts(ranker) for name, ranker in rankers.items()} if folders else {}
    found: dict[str, Path] = {}
    for folder in folders:
        facts = read_description(folder)
        fitting = [name for name, own in facts_of.items() if own.items() <= facts.items() and name not in found]
        if not fitting:
            raise ValueError(
                f"{folder} holds vectors of a {facts['architecture']} that is none of the models "
                f"({', '.join(rankers)}), or a second index of one; give the model that built it, or build it again."
            )
        found[fitting[0]] = folder
    return found


def _about(engine: "SearchEngine", title: str, documents: int, queries: Path | None) -> dict:
    texts = [] if queries is None else (text for _, text in TextStore.from_file(queries).items())
    return {
        "title": title,
        "documents": documents,
        "examples": list(islice((text for text in texts if len(text) <= LONGEST_EXAMPLE), EXAMPLES)),
        "rankers": [{"name": name, "line": search.describe(engine.k)} for name, search in engine.rankers.items()],
    }


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens: before models are loaded, so that a port in use is said at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"Cannot listen at {host}, port {port}: {error.strerror}; another --port may be free (0 takes one)."
        ) from None
