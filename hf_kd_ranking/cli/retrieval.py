"""`hf-kd-ranking index | search | fuse`: encode a collection, search it, mix runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import refuse_existing
from ..data.runs import read_run, write_run
from ..processes import processes
from ..ranker import Ranker
from ..retrieval.encode import STORAGES
from ..retrieval.fusion import METHODS, fuse_runs
from . import options
from .options import Config, Dtype, Json, Output, Overwrite, report, torch_dtype

Model = Annotated[str | None, typer.Option(help="A ranker; none for BM25.")]


def index(
    output: Output,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    model: Model = None,
    architecture: options.Architecture = None,
    storage: Annotated[str, typer.Option(help=f"Of the vectors: {', '.join(STORAGES)}")] = "float32",
    factory: Annotated[str | None, typer.Option(help="BERT_DOT: a faiss index, HNSW32, IVF4096,PQ64, ...")] = None,
    centroids: Annotated[int | None, typer.Option(min=0, help="ColBERT: for approximate search; 0 chooses.")] = None,
    tokenization: Annotated[str, typer.Option(help="BM25: plain, or english (stop words, stems).")] = "plain",
    batch_size: options.BatchSize = 64,
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Encode a collection (BM25 without --model); the same command goes on where it was stopped."""
    data = options.collection_of(dataset, "test", documents=collection)
    if model is None:
        from ..retrieval.bm25 import BM25Index

        refuse_existing(output, overwrite)
        of_rankers = {"--architecture": architecture, "--factory": factory, "--centroids": centroids}
        if unread := [option for option, value in of_rankers.items() if value is not None]:
            raise ValueError(f"{', '.join(unread)} are of a ranker's index; give its --model, BM25 has none of them.")
        BM25Index.build(data.documents, tokenization=tokenization).save(output, overwrite)
        report({"output": str(output), "documents": len(data.documents)}, json)
        return

    from ..retrieval.vector_store import VectorStore

    state = processes()
    with state.main_process_first():  # one process builds the store, the others open it
        documents = data.documents
    ranker = _ranker(model, architecture, batch_size, dtype, state.device)
    for option, value, kind in (("--factory", factory, "BERT_Dot"), ("--centroids", centroids, "ColBERT")):
        if value is not None and ranker.model.config.model_type != kind:
            raise ValueError(f"{option} is for a {kind}; {model} is a {ranker.model.config.model_type}.")
    store = VectorStore.build(ranker, documents, output, storage, overwrite)
    if state.is_main_process:
        if factory is not None:
            from ..retrieval.dense import DenseIndex

            DenseIndex.build(ranker, store, factory).save(output / "dense", overwrite)
        if centroids is not None:
            from ..retrieval.colbert import ColBERTIndex

            ColBERTIndex(ranker, store).cluster(centroids or None)
        report({"output": str(output), "documents": len(store), "bytes_per_document": store.bytes_per_document}, json)


def search(
    index: Annotated[Path, typer.Option(help="What `index` wrote.")],
    output: Output,
    queries: options.Queries = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    model: Model = None,
    architecture: options.Architecture = None,
    candidates: Annotated[Path | None, typer.Option(help="A run, re-ranked from the stored vectors.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Documents a query.")] = 1_000,
    exact: Annotated[bool, typer.Option("--exact", help="Compare every document.")] = False,
    settings: Annotated[str | None, typer.Option(help="Of the faiss index: nprobe=16, efSearch=128.")] = None,
    probes: Annotated[int | None, typer.Option(min=1, help="ColBERT: centroids a query term.")] = None,
    batch_size: options.BatchSize = 64,
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Search a collection, or re-rank candidates from what is stored, and write a run."""
    refuse_existing(output, overwrite)
    _check_search(model, candidates, exact, settings, probes)
    data = options.collection_of(dataset, split, queries=queries)
    texts = dict(data.queries.items()) if dataset is None else data.judged_queries()
    if model is None:
        from ..retrieval.bm25 import BM25Index

        run = BM25Index.open(index).search(texts, k)
    else:
        from ..retrieval.base import open_searchable
        from ..retrieval.colbert import ColBERTIndex
        from ..retrieval.stored_reranker import StoredReranker

        ranker = _ranker(model, architecture, batch_size, dtype)
        if candidates is not None:
            first = read_run(candidates).top(k)
            run = StoredReranker.open(index, ranker).rerank(first, data.queries)
        elif isinstance(opened := open_searchable(index, ranker, exact, settings), ColBERTIndex):
            run = opened.search(texts, k, probes)
        elif probes is not None:
            raise ValueError("--probes is for a ColBERT; a BERT_Dot's faiss index takes --settings nprobe=N.")
        else:
            run = opened.search(texts, k)
    write_run(run, output, tag=Path(model or "bm25").resolve().name.replace(" ", "_"))
    report({"output": str(output), "queries": len(run), "documents": sum(map(len, run.values()))}, json)


def _check_search(
    model: str | None, candidates: Path | None, exact: bool, settings: str | None, probes: int | None
) -> None:
    """Refuse options that the search would not read."""
    given = {"--candidates": candidates, "--exact": exact, "--settings": settings, "--probes": probes}
    unread = [option for option, value in given.items() if value]
    if model is None and unread:
        raise ValueError(f"{', '.join(unread)} are of a ranker's search; give its --model, BM25 has none of them.")
    if candidates is not None and len(unread) > 1:
        raise ValueError("--exact, --settings and --probes are of a search; --candidates are re-ranked.")
    if exact and len(unread) > 1:
        raise ValueError("--exact compares every document; --settings and --probes are of searches that do not.")


def fuse(
    run: Annotated[list[Path], typer.Option(help="TREC runs, several times.")],
    output: Output,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "reciprocal_rank",
    weights: Annotated[list[float] | None, typer.Option(help="One for each run.")] = None,
    k: Annotated[int, typer.Option(min=1, help="Documents a query.")] = 1_000,
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Mix runs of the same queries (hybrid search)."""
    refuse_existing(output, overwrite)
    fused = fuse_runs([read_run(path) for path in run], method, weights).top(k)
    write_run(fused, output, tag=method)
    report({"output": str(output), "queries": len(fused)}, json)


def _ranker(model: str, architecture: str | None, batch_size: int, dtype: str, device: object = None) -> Ranker:
    return Ranker.from_pretrained(model, architecture, device, batch_size=batch_size, dtype=torch_dtype(dtype))
