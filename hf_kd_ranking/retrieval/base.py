"""What a folder that `index` wrote can do for a ranker: search the collection by itself, or re-rank candidates."""

from pathlib import Path

from ..artifacts import read_description
from ..ranker import Ranker
from .colbert import ColBERTIndex
from .dense import DenseIndex
from .vector_store import VectorStore


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
        ValueError: if the ranker re-ranks only or did not make the vectors, the faiss index is older than they are, or
            there is none for the settings.
    """
    architecture = ranker.model.config.model_type
    if architecture not in ("BERT_Dot", "ColBERT"):
        raise ValueError(f"A {architecture} searches no collection; give --candidates to re-rank from the store.")
    is_exact = exact or not (folder / "dense").is_dir()
    if settings is not None and (is_exact or architecture == "ColBERT"):
        raise ValueError(
            f"Settings {settings!r} are of the faiss index that index --factory makes of a BERT_Dot's vectors; this "
            "search is without one."
        )
    if architecture == "ColBERT":
        return ColBERTIndex.open(folder, ranker)
    if is_exact:
        return DenseIndex.build(ranker, VectorStore.open(folder, ranker))
    dense = DenseIndex.open(folder / "dense", ranker)
    if dense.facts["vectors"] != read_description(folder)["checksum"]:
        raise ValueError(f"{folder / 'dense'} is of an earlier version of the vectors; give index --factory again.")
    if settings is not None:
        dense.tune(settings)
    return dense
