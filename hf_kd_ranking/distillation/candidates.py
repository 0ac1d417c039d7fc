"""The steps of `distill` that find candidates, and its judgments.

Each function makes the files of one folder from its inputs, see `work.Workspace`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.passages import run_of_documents, without_document
from ..data.runs import Run, read_qrels, read_run, write_qrels, write_run
from ..data.texts import TextStore
from ..ranker import Ranker
from ..retrieval.base import Index
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import mix_runs
from .context import Context
from .queries import Grades
from .work import Artifact, model_path, shared

PASSAGES = "passages.trec"  # beside run.trec, if the collection has passages
AGREED = 3  # the teachers' best candidates that count as relevant where there are no judgments


def ranking(artifact: Artifact) -> Run:
    """Read the run of a step; it has no query where a system ranked training queries only."""
    return _read(artifact.path / "run.trec")


def passage_scores(artifact: Artifact) -> Run | None:
    """Read the scores of passages that a step left beside those of documents; None if the collection has none."""
    path = artifact.path / PASSAGES
    if not path.is_file():
        return None
    return _read(path)


def _read(path: Path) -> Run:
    if path.stat().st_size == 0:
        return Run()
    return read_run(path)


def write_passages(folder: Path, passages: Run, aggregation: str, tag: str, k: int | None = None) -> None:
    """Write the scores of passages, and the ranking of the best k documents that follows from them."""
    write_run(passages, folder / PASSAGES, tag=tag)
    write_run(run_of_documents(passages, aggregation).top(k), folder / "run.trec", tag=tag)


def grades(artifact: Artifact) -> Grades:
    """Read the judgments of a step."""
    path = artifact.path / "qrels.txt"
    return read_qrels(path) if path.stat().st_size else {}


# ---- Steps ----------------------------------------------------------------------------------------------------------


def index_collection(folder: Path, language: str | None, context: Context) -> None:
    """Build the BM25 index of the collection."""
    BM25Index.build(context.documents, language=language).save(folder / "index", overwrite=True)


def search_bm25(folder: Path, index: Artifact, texts: Mapping[str, str], k: int, exclude_same_id: bool) -> None:
    """Search for queries with BM25."""
    opened = BM25Index.open(index.path / "index")
    if opened.collection.aggregation is None:
        write_run(search(opened, texts, k, exclude_same_id), folder / "run.trec", tag="BM25")
        return
    found = Run(zip(texts, opened.rank_passages(list(texts.values()), k + exclude_same_id), strict=True))
    if exclude_same_id:
        found = Run((query_id, without_document(ranking, query_id)) for query_id, ranking in found.items())
    write_passages(folder, found, "max", "BM25", k)


def search(index: Index, texts: Mapping[str, str], k: int, exclude_same_id: bool) -> Run:
    """Return the k best documents of each query, without the one that has its id if that is to be left out."""
    if not exclude_same_id:
        return index.search(texts, k)
    return index.search(texts, k + 1).without_same_ids().top(k)


def select_candidates(folder: Path, run: Path, query_ids: Sequence[str], k: int, exclude_same_id: bool) -> None:
    """Take the candidates of the user's engine; a training query without any has none."""
    selected = read_run(run).select(query_ids)
    if exclude_same_id:
        selected = selected.without_same_ids()
    write_run(selected.top(k), folder / "run.trec", tag="candidates")


@shared
def search_vectors(
    folder: Path,
    model: str | Path | Artifact,
    texts: Mapping[str, str],
    k: int,
    exclude_same_id: bool,
    context: Context,
) -> None:
    """Search the whole collection with a ranker whose vectors are encoded into the folder, which keeps them."""
    ranker = Ranker.from_pretrained(model_path(model), device=context.device)  # the store shares its work by itself
    index = encode_collection(folder, ranker, context.documents)
    if context.is_main_process:
        write_run(search(index, texts, k, exclude_same_id), folder / "run.trec", tag="dense")


def mix_candidates(
    folder: Path, sources: Mapping[str, Artifact], shares: Mapping[str, float], k: int, positives: Grades
) -> None:
    """Take from each source its share of k candidates per query, see `mix_runs`; add the relevant ones."""
    runs = [ranking(source) for source in sources.values()]
    mixed = mix_runs(runs, [shares[name] for name in sources], k)
    for query_id, found in mixed.items():
        known = dict(found)
        for doc_id, grade in positives.get(query_id, {}).items():
            if grade > 0 and doc_id not in known:
                found.append((doc_id, float(-len(found))))
    write_run(mixed, folder / "run.trec", tag="+".join(sources))


def write_judgments(folder: Path, judgments: Grades) -> None:
    """Write the judgments of a split."""
    write_qrels(judgments, folder / "qrels.txt")


def judge_by_agreement(folder: Path, teacher: Artifact) -> None:
    """Take the teacher's best candidates of each query for relevant, the best with the highest grade."""
    judgments = {}
    for query_id, best in ranking(teacher).top(AGREED).items():
        judgments[query_id] = {doc_id: AGREED - place for place, (doc_id, _) in enumerate(best)}
    write_qrels(judgments, folder / "qrels.txt")


# ---- Vectors --------------------------------------------------------------------------------------------------------


def encode_collection(folder: Path, ranker: Ranker, documents: TextStore) -> Index:
    """Encode a collection into `vectors` of a folder, and return the index that compares all of them."""
    from ..retrieval.colbert import ColBERTIndex
    from ..retrieval.dense import DenseIndex  # needs faiss, an extra
    from ..retrieval.sparse import SparseIndex
    from ..retrieval.vector_store import VectorStore

    store = VectorStore.build(ranker, documents, folder / "vectors")
    indexes = {"one": DenseIndex, "per_token": ColBERTIndex, "sparse": SparseIndex}
    return indexes[ranker.model.config.vectors_per_text].build(store)
