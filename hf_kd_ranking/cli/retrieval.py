"""`hf-kd-ranking passages | index | search | fuse`: split and encode a collection, search it, fuse runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifacts import refuse_existing
from ..data.collections import RankingCollection
from ..data.passages import split_documents
from ..data.rankings import without_id
from ..data.runs import check_run_ids, read_run, write_run
from ..data.texts import Collection, TextStore, check_same_collection
from ..errors import InputError
from ..processes import processes
from ..ranker import load_tokenizer
from ..retrieval.base import refuse_replacing
from ..retrieval.fusion import METHODS, fuse_runs
from . import options


def passages(
    model: Annotated[str, typer.Option(help="Ranker, or encoder, whose tokenizer counts the tokens.")],
    output: options.Output,
    passages: Annotated[str, typer.Option(help="LENGTH/STRIDE in tokens, such as 180/120.")],
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    aggregation: options.Aggregation = "max",
) -> options.Result:
    """Split the long documents of a collection into passages.

    LENGTH is the length of a passage, STRIDE the distance between the beginnings of two passages. The output is a
    collection for all other verbs, which score the passages and return documents.

    Example: hf-kd-ranking passages --collection corpus.jsonl --model ranker --passages 180/120 --output passages
    """
    documents = options.open_collection(dataset, "test", documents=collection).documents
    store = split_documents(documents, load_tokenizer(model), passages, output, aggregation)
    return {"output": str(output), "documents": len(documents), "passages": len(store)}


def index(
    output: options.Output,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    model: options.FirstStageOrModel = None,
    architecture: options.Architecture = None,
    storage: Annotated[str, typer.Option(help="Type of stored numbers: float32, float16, int8.")] = "float32",
    factory: Annotated[str | None, typer.Option(help="faiss index for a BERT_DOT: HNSW32, IVF4096,PQ64, ...")] = None,
    centroids: Annotated[int | None, typer.Option(min=0, help="Number of centroids of a ColBERT; 0: auto.")] = None,
    language: options.Language = None,
    batch_size: options.BatchSize = 64,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
) -> options.Result | None:
    """Encode a collection, or index it for BM25; the same command resumes where it was stopped.

    Example: hf-kd-ranking index --model bert_dot --collection collection.tsv --output vectors
    """
    data = options.open_collection(dataset, "test", documents=collection)
    if model is None:
        given = {"--architecture": architecture, "--factory": factory, "--centroids": centroids}
        return _index_words(data.documents, output, given, language, overwrite)

    from ..retrieval.vector_store import TRAINING_VECTORS, VectorStore, check_factory, vector_dimension

    if language is not None:
        raise InputError("--language is for BM25; the ranker (--model) has its own tokenizer.")
    state = processes()
    with state.main_process_first():  # one process builds the store, the others open it
        documents = data.documents
    ranker = options.load_ranker(model, architecture, batch_size, dtype, tokens_per_batch, device=state.device)
    config = ranker.model.config
    if factory is not None and config.vectors_per_text != "one":
        raise InputError(f"--factory is for a ranker with one vector per text (BERT_DOT), got {config.model_type}.")
    if centroids is not None and config.similarity != "max_sim":
        raise InputError(f"--centroids is for a ranker that compares by MaxSim (ColBERT), got {config.model_type}.")
    if factory is not None:
        check_factory(factory, vector_dimension(ranker), len(documents))
        refuse_replacing(output / "dense", "dense", overwrite)
    if centroids is not None:
        most = min(TRAINING_VECTORS, len(documents) * config.max_document_length)
        if centroids > most:
            raise InputError(f"{len(documents):,} documents have at most {most:,} vectors for {centroids} centroids.")
    store = VectorStore.build(ranker, documents, output, storage, overwrite)
    if not state.is_main_process:
        return None
    if config.vectors_per_text == "sparse":
        from ..retrieval.sparse import SparseIndex

        SparseIndex.build(store).save(output / "sparse", overwrite)
    if factory is not None:
        from ..retrieval.dense import DenseIndex

        DenseIndex.build(store, factory=factory).save(output / "dense", overwrite)
    if centroids is not None:
        from ..retrieval.colbert import ColBERTIndex

        ColBERTIndex.build(store, centroids=centroids)
    result = {"output": str(output), "documents": len(store), "bytes_per_document": store.bytes_per_document}
    return result | store.cuts


def _index_words(
    documents: TextStore, output: Path, given: dict[str, Any], language: str | None, overwrite: bool
) -> dict[str, Any]:
    """Index a collection for BM25; `given` are options that only rankers read, which must not be given."""
    from ..retrieval.bm25 import BM25Index

    unread = [option for option, value in given.items() if value is not None]
    if unread:
        raise InputError(f"{', '.join(unread)} need --model: BM25 does not use them.")
    refuse_replacing(output, "bm25", overwrite)  # before the work
    BM25Index.build(documents, language=language).save(output, overwrite)
    return {"output": str(output), "documents": len(documents)}


def search(
    index: Annotated[Path, typer.Option(help="Output of `index`.")],
    output: options.Output,
    queries: options.Queries = None,
    collection: options.Collection = None,
    dataset: options.Dataset = None,
    split: options.Split = "test",
    model: options.FirstStageOrModel = None,
    architecture: options.Architecture = None,
    candidates: options.Candidates = None,
    k: options.K = 1_000,
    exact: Annotated[bool, typer.Option(help="Compare every document.")] = False,
    settings: options.FaissSettings = None,
    probes: options.Probes = None,
    exclude_same_id: options.ExcludeSameId = False,
    batch_size: options.BatchSize = 64,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Search a collection, or re-rank candidates from stored vectors, and write a run.

    The collection of the data set, or that of --collection, must be the one that was indexed.

    Example: hf-kd-ranking search --model bert_dot --index vectors --queries queries.tsv --output run.trec
    """
    refuse_existing(output, overwrite)
    if candidates is not None and (model is None or exact or settings or probes):
        raise InputError("--candidates are re-ranked from the vectors of --model: no --exact, --settings, --probes.")
    data = options.open_collection(dataset, split, ["documents"], queries=queries, documents=collection)
    ranker = model and options.load_ranker(model, architecture, batch_size, dtype, index=index)
    if candidates is not None:
        from ..retrieval.stored_reranker import StoredReranker

        first_stage = read_run(candidates)
        if exclude_same_id:
            first_stage = first_stage.without_same_ids()
        reranker = StoredReranker.open(index, ranker)
        _check_collection(data, index, reranker.store.collection)
        texts = run = reranker.rerank(first_stage.top(k), data.queries)
    else:
        from ..retrieval.base import open_index

        opened, texts = open_index(index, ranker, exact, settings, probes), data.judged_queries()
        _check_collection(data, index, opened.collection)
        check_run_ids(texts, "queries")
        check_run_ids(opened.ids, "documents")
        run = opened.rankings(texts, k + exclude_same_id)
        if exclude_same_id:
            run = ((query_id, without_id(ranking, query_id)[:k]) for query_id, ranking in run)
    documents = write_run(run, output, tag=options.run_tag(model or "bm25"))
    return {"output": str(output), "queries": len(texts), "documents": documents}


def _check_collection(data: RankingCollection, index: Path, indexed: Collection) -> None:
    """Refuse an index of another collection than the documents that the options name, if they name any."""
    if data.has_documents:
        check_same_collection({"documents": data.documents.collection, str(index): indexed})


def fuse(
    run: Annotated[list[Path], typer.Option(help="TREC runs of the same queries.")],
    output: options.Output,
    method: Annotated[str, typer.Option(help=f"Method of fusion: {', '.join(METHODS)}.")] = "reciprocal_rank",
    weights: options.Weights = None,
    k: options.K = 1_000,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Fuse runs of the same queries (hybrid search).

    Example: hf-kd-ranking fuse --run bm25.trec dense.trec --output hybrid.trec
    """
    refuse_existing(output, overwrite)
    fused = fuse_runs([read_run(path) for path in run], method, weights).top(k)
    write_run(fused, output, tag=method)
    return {"output": str(output), "queries": len(fused)}
