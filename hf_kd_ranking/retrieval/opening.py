"""What a folder that `index` wrote can do for a ranker: search the collection by itself, or re-rank candidates."""

from pathlib import Path

from ..ranker import Ranker
from .colbert_index import ColBERTIndex
from .dense_index import DenseIndex
from .vectors import VectorStore
from .versions import read_facts


def open_searchable(
    folder: Path, ranker: Ranker, exact: bool = False, settings: str | None = None
) -> DenseIndex | ColBERTIndex:
    """Open an index that searches its whole collection.

    Args:
        folder: of the vectors; a faiss index of a BERT_DOT lies inside as `dense`.
        exact: True leaves that faiss index and compares every vector.
        settings: of the faiss index, see `DenseIndex.tune`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the ranker re-ranks only, did not make the vectors, or the faiss index is older than they are.
    """
    architecture = ranker.model.config.model_type
    if architecture == "ColBERT":
        return ColBERTIndex.open(folder, ranker)
    if architecture != "BERT_Dot":
        raise ValueError(f"A {architecture} searches no collection; give --candidates to re-rank from the store.")
    if exact or not (folder / "dense").is_dir():
        return DenseIndex.build(ranker, VectorStore.open(folder, ranker))
    dense = DenseIndex.open(folder / "dense", ranker)
    if dense.facts["vectors"] != read_facts(folder)["checksum"]:
        raise ValueError(f"{folder / 'dense'} is of an earlier version of the vectors; give index --factory again.")
    if settings is not None:
        dense.tune(settings)
    return dense
