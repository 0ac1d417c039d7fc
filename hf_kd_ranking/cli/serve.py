"""`hf-kd-ranking serve`: a page to search with one ranker, or with two side by side."""

import socket
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..artifacts import refuse_existing
from ..data.texts import TextStore
from . import options

EXAMPLES, LONGEST_EXAMPLE = 4, 70  # queries that the page offers; characters
LOCAL_HOSTS = ["localhost", "127.0.0.1"]


def serve(
    model: options.Models = (),
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    index: Annotated[list[Path], typer.Option(help="Outputs of `index` for the rankers.")] = (),
    candidates: Annotated[Path | None, typer.Option(help="BM25 index; built if needed.")] = None,
    rerank: Annotated[bool, typer.Option(help="Re-rank candidates also if an index could search.")] = False,
    fuse: Annotated[bool, typer.Option(help="Add BM25's scores to those of re-ranked candidates.")] = False,
    k: Annotated[int, typer.Option(min=1, help="Number of candidates that are re-ranked.")] = 100,
    settings: options.FaissSettings = None,
    probes: options.Probes = None,
    queries: Annotated[Path | None, typer.Option(help="Queries; the page offers a few of them as examples.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Passage search",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one.")] = 8_000,
    proxy: Annotated[bool, typer.Option(help="Read clients' addresses from X-Forwarded-For.")] = False,
    space: Annotated[Path | None, typer.Option(help="New folder for a Hugging Face Space; no serving.")] = None,
    architecture: options.Architecture = None,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = "fp32",
    as_json: options.Json = False,
) -> None:
    """Search a collection on a web page: results side by side, tokens that matched, the time of every stage."""
    if not 1 <= len(model) <= 2:
        raise ValueError(f"Give one --model, or two to compare, got {len(model)}.")
    try:
        import uvicorn

        from ..serving.app import SearchPage, make_app
        from ..serving.search import build_engine
        from ..serving.space import write_space
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}: pip install 'hf_kd_ranking[retrieval,serve]'.") from None

    if space is None:
        listener = _listen(host, port)  # before models are loaded, so that a port in use is reported at once
    else:
        refuse_existing(space, overwrite=False)
    documents = options.open_collection(dataset, "test", documents=collection).documents
    rankers = {}
    for name, path in options.named_paths(model, "rankers").items():
        rankers[name] = options.load_ranker(path, architecture, batch_size, dtype)
    can_search = len(index) == len(rankers) and all(each.model.config.is_searchable for each in rankers.values())
    if candidates is None and (rerank or not can_search):
        typer.echo(f"building a BM25 index of {len(documents):,} documents (--candidates takes a saved one)", err=True)
    engine = build_engine(rankers, documents, index, candidates, rerank, fuse, k, settings, probes)
    _, first_text = next(documents.items())
    engine.search(" ".join(first_text.split()[:8]))  # warms up, and fails if parts do not belong together
    lines = [{"name": name, "line": search.describe(k)} for name, search in engine.rankers.items()]
    about = {"title": title, "documents": len(documents), "examples": _examples(queries), "rankers": lines}
    if space is not None:
        repeated = {"--k": k, "--settings": settings, "--probes": probes, "--batch-size": batch_size, "--dtype": dtype}
        arguments = [f"{name}={value}" for name, value in repeated.items() if value is not None]
        arguments += [name for name, is_set in (("--rerank", rerank), ("--fuse", fuse)) if is_set]
        write_space(space, engine, about, arguments, __version__)
        return options.print_result({"space": str(space), "documents": len(documents)}, as_json)
    app = make_app(SearchPage(engine, about, behind_proxy=proxy), LOCAL_HOSTS if host in LOCAL_HOSTS else ["*"])
    address = f"http://{host}:{listener.getsockname()[1]}"
    options.print_result({"address": address, "documents": len(documents), "stop": "Ctrl-C"}, as_json)
    headers = {"proxy_headers": False, "server_header": False}
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=100, timeout_keep_alive=5, **headers)
    uvicorn.Server(config).run(sockets=[listener])


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
        raise ValueError(message) from None
