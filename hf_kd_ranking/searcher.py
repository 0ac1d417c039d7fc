"""The searcher: first stage, ranker, depth and fusion as one object, and the folder that it is saved in.

    pipeline = load_pipeline("best")
    pipeline.search("how are docstrings parsed", k=10)

A saved pipeline is `pipeline.json` with the folders of its parts: `ranker` (a checkpoint, or its int8 graph),
`first_stage` (BM25), `vectors` (of the documents, with their index) and `documents` (the texts).
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .artifacts import building, content_digest, read_description, read_json, write_json
from .data.passages import run_of_documents, to_passages
from .data.rankings import Pairs, Run, as_run
from .data.texts import Collection, TextStore, check_same_collection
from .errors import InputError
from .interop.onnx import OnnxRanker
from .ranker import Ranker
from .retrieval.base import Index, check_k, open_index
from .retrieval.bm25 import BM25Index
from .retrieval.colbert import ColBERTIndex
from .retrieval.dense import DenseIndex
from .retrieval.fusion import fuse_runs, scale_scores
from .retrieval.stored_reranker import StoredReranker
from .retrieval.vector_store import VectorStore

FILE = "pipeline.json"
KIND, VERSION = "pipeline", 1
INT8 = "int8"
FIELDS = {
    "purpose": str,
    "depth": int,
    "weight": float | int,
    "precision": str | None,
    "probes": int | None,
    "collection": str,
    "parts": dict,
    "description": dict,
}
# The files of a checkpoint that are saved and published: no states of the optimizer, no pickles, no logs.
CHECKPOINT_FILES = {".safetensors", ".onnx", ".json", ".txt", ".model", ".py", ".md"}
PROGRESS_FROM = 100  # queries that are re-ranked from texts


@dataclass
class Pipeline:
    """First stage, ranker, depth and fusion as one object; make one from its parts, or with `load_pipeline`.

    Args:
        documents: texts of the collection, to re-rank from them and to show results; None if neither is needed.
        first_stage: finds candidates; None if the ranker searches by itself, or candidates are given.
        ranker: None keeps the order of the first stage. An `OnnxRanker` is an int8 export.
        depth: number of candidates that are re-ranked, or documents that the index of the ranker finds.
        weight: weight of the first stage's scores in the sum, 0 to 1; 0 is the ranker without them.
        store: vectors of the documents, which then are not encoded; None re-ranks from texts.
        index: searches the whole collection with the ranker; None re-ranks candidates.
        description: measures, latency and names, as JSON; for readers.

    Raises:
        InputError: if a number is out of its range, the parts do not make a pipeline, or they were made from different
            collections.
    """

    documents: TextStore | None = None
    first_stage: Index | None = None
    ranker: Ranker | OnnxRanker | None = None
    depth: int = 100
    weight: float = 0.0
    store: VectorStore | None = None
    index: Index | None = None
    description: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise InputError(f"The depth is a number of documents, at least 1; got {self.depth}.")
        if not 0 <= self.weight <= 1:
            raise InputError(f"The weight of the first stage is a number from 0 to 1, got {self.weight}.")
        has_vectors = self.store is not None or self.index is not None
        if self.ranker is None and self.first_stage is None:
            raise InputError("A pipeline needs a first stage, a ranker, or both; got neither.")
        if has_vectors and not isinstance(self.ranker, Ranker):
            raise InputError("Stored vectors and their index need the Ranker that made the vectors.")
        if self.ranker is not None and not has_vectors and self.documents is None:
            raise InputError("A ranker needs the texts of the documents, or their stored vectors; got neither.")
        if self.index is not None and self.weight > 0 and self.first_stage is None:
            raise InputError(f"There is no first stage whose scores could have the weight {self.weight}.")
        check_same_collection(self.collections())

    def collections(self) -> dict[str, Collection]:
        """Return the collection that each part was made from, by its name."""
        parts = {"documents": self.documents, "first stage": self.first_stage, "vectors": self.store}
        parts["index"] = self.index
        return {name: part.collection for name, part in parts.items() if part is not None}

    @property
    def purpose(self) -> str:
        """Return "search" if the ranker searches the whole collection, else "rerank"."""
        return "rerank" if self.index is None else "search"

    def search(self, query: str, k: int = 10) -> Pairs:
        """Return the best k documents of a query, [(doc_id, score)], see `search_run`."""
        return self.search_run({"query": query}, k)["query"]

    def search_run(self, queries: Mapping[str, str], k: int = 10) -> Run:
        """Return the best k documents of every query, fewer if there are fewer.

        Args:
            queries: query_id -> text. BM25 finds nothing if it does not know a word of the text.
            k: documents per query.

        Raises:
            TypeError: if a query is not a string.
            InputError: if k is not positive, or the pipeline has neither a first stage nor an index.
        """
        check_k(k)
        if self.index is not None:
            return self._search_index(queries, k)
        if self.first_stage is None:
            raise InputError("This pipeline has no first stage that finds candidates; give yours to rerank.")
        candidates = self.first_stage.search(queries, max(k, self.depth))
        return self.rerank(candidates, queries).top(k)

    def rerank(self, candidates: Run, queries: Mapping[str, str] | TextStore) -> Run:
        """Re-rank candidates of any first stage, see `combine`.

        Args:
            candidates: a run; the first `depth` documents of every query are re-ranked.
            queries: query_id -> text.

        Raises:
            UnknownIdError: if a query has no text, or a document has neither a text nor a stored vector.
        """
        candidates = as_run(candidates)
        if self.ranker is None:
            return candidates
        scored = self._score(Run({query_id: ranking for query_id, ranking in candidates.items() if ranking}), queries)
        run = Run()
        for query_id, ranking in candidates.items():
            run[query_id] = combine(ranking, dict(scored.get(query_id, ())), self.depth, self.weight)
        return run

    def _search_index(self, queries: Mapping[str, str], k: int) -> Run:
        if self.weight == 0:
            return self.index.search(queries, max(k, self.depth)).top(k)
        runs = [self.index.search(queries, self.depth), self.first_stage.search(queries, self.depth)]
        return fuse_runs(runs, "weighted_sum", [1 - self.weight, self.weight]).top(k)

    @cached_property
    def _stored_reranker(self) -> StoredReranker:
        # Made once: it sets the mode of every module of the model, which takes a millisecond.
        return StoredReranker(self.store)

    def _score(self, candidates: Run, queries: Mapping[str, str] | TextStore) -> Run:
        """Return the ranker's scores of the candidates within the depth."""
        candidates = candidates.top(self.depth)
        if self.store is not None:
            return self._stored_reranker.rerank(candidates, queries)
        if self.documents.aggregation is not None:
            candidates = to_passages(candidates, self.documents, f"texts of {self.documents.source}")
        scored = Run()
        # One query at a time: int8 activations have one scale per batch, so that scores depend on the batch.
        progress = tqdm(candidates.items(), desc="Re-ranking", disable=len(candidates) < PROGRESS_FROM)
        for query_id, ranking in progress:
            doc_ids = [doc_id for doc_id, _ in ranking]
            scores = self.ranker.score(queries[query_id], self.documents[doc_ids])
            scored[query_id] = sorted(zip(doc_ids, scores.tolist(), strict=True), key=lambda pair: -pair[1])
        return run_of_documents(scored, self.documents.aggregation)


def combine(candidates: Pairs, scores: Mapping[str, float], depth: int, weight: float) -> list[tuple[str, float]]:
    """Re-rank the first `depth` candidates of a query by the ranker's scores, or by a sum with the first stage's.

    Args:
        candidates: doc_ids and scores of the first stage, best first.
        scores: the ranker's score of each of the first `depth` documents.
        depth: number of candidates that are re-ranked.
        weight: 0 gives the ranker's scores as they are; otherwise (1 - weight) * the ranker's score + weight * the
            first stage's, each scaled to 0..1 over these candidates (equal scores give 1).

    Returns:
        All candidates, scores descending. Ties keep the order of the first stage, as do the candidates beyond the
        depth, which follow with scores below all others.

    Raises:
        UnknownIdError: if a candidate within the depth has no score.
    """
    top = candidates[:depth]
    sums = [float(scores[doc_id]) for doc_id, _ in top]
    if weight > 0:
        first_scores = scale_scores([score for _, score in top])
        for place, score in enumerate(scale_scores(sums)):
            sums[place] = (1 - weight) * score + weight * first_scores[place]
    ranking = [(doc_id, score) for (doc_id, _), score in zip(top, sums, strict=True)]
    ranking.sort(key=lambda scored: -scored[1])
    lowest = min(sums, default=0.0)
    for beyond, (doc_id, _) in enumerate(candidates[depth:], start=1):
        ranking.append((doc_id, lowest - beyond))
    return ranking


# ---- Folders --------------------------------------------------------------------------------------------------------


def save_pipeline(
    folder: str | os.PathLike,
    pipeline: Pipeline,
    checkpoint: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a pipeline with copies of all its parts into a folder that is complete or absent.

    Args:
        pipeline: its first stage, if there is one, is a `BM25Index`.
        checkpoint: folder that training wrote, whose files are those of the ranker, with its card and manifest (of the
            training of an int8 export only the card is saved); None saves what the ranker consists of.
        overwrite: True replaces an earlier pipeline.

    Raises:
        FileExistsError: if the folder contains something else, or a pipeline and `overwrite` is False.
        InputError: if a part cannot be saved.
    """
    folder = Path(folder)
    is_pipeline = (folder / FILE).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (overwrite and is_pipeline)):
        raise FileExistsError(f"{folder} exists; give a new folder, or overwrite=True to replace a pipeline.")
    saved = {
        "kind": KIND,
        "version": VERSION,
        "purpose": pipeline.purpose,
        "depth": pipeline.depth,
        "weight": pipeline.weight,
        "precision": _precision(pipeline.ranker),
        "probes": None,
        "collection": _collection(pipeline),
    }
    if isinstance(pipeline.index, ColBERTIndex):
        saved["probes"] = pipeline.index.probes
    with building(folder, replaces=overwrite) as temporary:
        _write_parts(temporary, pipeline, checkpoint)
        parts = {path.name: _part_digest(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / FILE, {**saved, "parts": parts, "description": pipeline.description})


def load_pipeline(folder: str | os.PathLike, device: str | None = None, batch_size: int = 64) -> Pipeline:
    """Open a saved pipeline, after all its parts were verified.

    Args:
        folder: folder that `distill` or `save_pipeline` wrote.
        device: device of the ranker; None takes a GPU if there is one. An int8 ranker always runs on the CPU.
        batch_size: texts or pairs per forward pass; an int8 ranker does not read it.

    Raises:
        FileNotFoundError: if the folder is not a pipeline, or a part is missing.
        InputError: if `pipeline.json` is damaged or of another version, or a part is damaged or another one.

    Example:
        >>> pipeline = kd.load_pipeline("best")
        >>> hits = pipeline.search("what is bread", k=10)  # [(doc_id, score)]
    """
    folder = Path(folder)
    saved = _read_saved(folder)
    parts = saved["parts"]
    for name, digest in parts.items():
        part = folder / name
        if not part.is_dir():
            raise FileNotFoundError(f"{part} is missing; a pipeline is copied with all its parts.")
        if _part_digest(part) != digest:
            raise InputError(f"{part} is not the part that the pipeline was saved with; copy all parts again.")
    documents = first_stage = ranker = store = index = None
    if "documents" in parts:
        documents = TextStore.open(folder / "documents")
    if "first_stage" in parts:
        first_stage = BM25Index.open(folder / "first_stage")
    if "ranker" in parts and saved["precision"] == INT8:
        ranker = OnnxRanker(folder / "ranker")
    elif "ranker" in parts:
        dtype = saved["precision"]
        ranker = Ranker.from_pretrained(folder / "ranker", device=device, batch_size=batch_size, dtype=dtype)
    if "vectors" in parts:
        is_searched = saved["purpose"] == "search"
        store, index = open_vectors(folder / "vectors", ranker, is_searched, probes=saved["probes"])
    depth, weight = saved["depth"], saved["weight"]
    try:
        return Pipeline(documents, first_stage, ranker, depth, weight, store, index, saved["description"])
    except InputError as error:
        raise InputError(f"{folder / FILE}: {error}") from None


def open_vectors(
    folder: str | os.PathLike,
    ranker: Ranker,
    is_searched: bool,
    settings: str | None = None,
    probes: int | None = None,
) -> tuple[VectorStore, Index | None]:
    """Open stored vectors for re-ranking, and, if `is_searched`, their index, whose options are those of `open_index`.

    Raises:
        FileNotFoundError, InputError: see `VectorStore` and `open_index`.
    """
    folder, index = Path(folder), None
    if is_searched:
        index = open_index(folder, ranker, settings=settings, probes=probes)
        if isinstance(index.ids, VectorStore):  # there is no faiss index
            return index.ids, index
    return VectorStore.open(folder, ranker), index


def _precision(ranker: Ranker | OnnxRanker | None) -> str | None:
    if ranker is None:
        return None
    if isinstance(ranker, OnnxRanker):
        return INT8
    return str(ranker.model.dtype).removeprefix("torch.")


def _collection(pipeline: Pipeline) -> str:
    """Return the fingerprint of the collection that all parts were made from; refuse parts that cannot be saved."""
    if pipeline.first_stage is not None and not isinstance(pipeline.first_stage, BM25Index):
        kind = type(pipeline.first_stage).__name__
        raise InputError(f"A pipeline is saved with a BM25Index as its first stage, got a {kind}.")
    if pipeline.index is not None and pipeline.store is None:
        raise InputError("A pipeline whose ranker searches is saved with the vectors of its index; give the store.")
    return next(iter(pipeline.collections().values())).fingerprint


def _write_parts(folder: Path, pipeline: Pipeline, checkpoint: str | os.PathLike | None) -> None:
    ranker, index = pipeline.ranker, pipeline.index
    if isinstance(ranker, OnnxRanker):
        _copy_checkpoint(ranker.folder, folder / "ranker")
        if checkpoint is not None and Path(checkpoint, "README.md").is_file():
            shutil.copy(Path(checkpoint, "README.md"), folder / "ranker")
    elif ranker is not None and checkpoint is not None:
        _copy_checkpoint(Path(checkpoint), folder / "ranker")
    elif ranker is not None:
        ranker.save_pretrained(folder / "ranker")
    if pipeline.first_stage is not None:
        pipeline.first_stage.save(folder / "first_stage")
    if pipeline.documents is not None:
        pipeline.documents.save(folder / "documents")
    if pipeline.store is not None:
        shutil.copytree(pipeline.store.folder, folder / "vectors", ignore=shutil.ignore_patterns("dense"))
    # An exact index is built again from the vectors when it is opened.
    if isinstance(index, DenseIndex) and (index.description["factory"] != "Flat" or index.ids is not pipeline.store):
        index.save(folder / "vectors" / "dense")


def _copy_checkpoint(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix in CHECKPOINT_FILES:
            shutil.copy(path, target)


def _part_digest(path: Path) -> str:
    """Return what identifies the content of a part."""
    if path.name == "ranker":
        return content_digest(path)
    if path.name == "documents":
        return TextStore.open(path).compute_fingerprint()
    return read_description(path)["checksum"]


def _read_saved(folder: Path) -> dict[str, Any]:
    """Read `pipeline.json`, or raise the error of a folder that is not a pipeline that can be read here."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}, so it is not a pipeline; distill writes one.")
    saved = read_json(path, what="pipeline's")
    if saved.get("kind") != KIND or saved.get("version") != VERSION:
        found = f"kind {saved.get('kind')!r}, version {saved.get('version')!r}"
        raise InputError(f"{path} has {found}; this release of hf_kd_ranking reads {KIND!r}, version {VERSION}.")
    missing = [name for name in FIELDS if name not in saved]
    if missing:
        raise InputError(f"{path} is damaged: it lacks {', '.join(missing)}; copy it again.")
    for name, kind in FIELDS.items():
        if not isinstance(saved[name], kind) or isinstance(saved[name], bool):
            raise InputError(f"{path} is damaged: {str(saved[name])[:60]!r} is no value of {name}; copy it again.")
    return saved
