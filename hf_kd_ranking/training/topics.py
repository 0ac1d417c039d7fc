"""Topics of the training queries, for batches on one topic (TAS-Balanced, https://arxiv.org/abs/2104.06967)."""

from pathlib import Path

import datasets
import numpy as np

from ..artifacts import writing
from ..data.rows import column_batches
from ..data.texts import TextStore
from ..ranker import Ranker
from .arguments import RankingTrainingArguments


def cluster_queries(
    ranker: Ranker, queries: TextStore, rows: datasets.Dataset, clusters: int, seed: int = 42
) -> np.ndarray:
    """Cluster the queries of teacher rows by k-means on their vectors.

    Args:
        ranker: encodes them; one vector a text (a BERT_DOT).
        queries: the store of their texts.
        rows: teacher rows.
        clusters: how many; 2,000 in the paper, of 400,000 queries.
        seed: of the first centres.

    Returns:
        (len(queries),) int32, the cluster of each text of the store; -1 for those without rows.

    Raises:
        ValueError: if there are fewer queries than clusters.
        ImportError: if faiss is not installed.
    """
    import faiss  # an extra

    used = np.unique(rows_of_queries(rows, queries))
    if not 1 <= clusters <= len(used):
        raise ValueError(f"query_clusters must be 1 to {len(used):,}, the queries of the rows; got {clusters:,}.")
    vectors = ranker.encode_queries(queries[queries.ids_of(used)])
    kmeans = faiss.Kmeans(vectors.shape[1], clusters, niter=20, seed=seed, min_points_per_centroid=1)
    kmeans.train(vectors)
    labels = np.full(len(queries), -1, dtype=np.int32)
    labels[used] = kmeans.index.search(vectors, 1)[1][:, 0]
    return labels


def saved_clusters(
    ranker: Ranker,
    queries: TextStore,
    rows: datasets.Dataset,
    clusters: int,
    args: RankingTrainingArguments,
    is_new: bool,
) -> np.ndarray:
    """`cluster_queries`, once for a run: kept in its output folder, from where a resumed run takes them.

    One process clusters, the others wait and read.
    """
    path = Path(args.output_dir) / "query_clusters.npy"
    with args.main_process_first(local=False):
        if args.process_index == 0 and (is_new or not path.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path, "wb") as file:
                np.save(file, cluster_queries(ranker, queries, rows, clusters, args.seed))
    return np.load(path)


def rows_of_queries(rows: datasets.Dataset, queries: TextStore) -> np.ndarray:
    """Place of each row's query in the store, (N,) int32."""
    places = [queries.rows_of(batch["query_id"]) for batch in column_batches(rows, ["query_id"])]
    return np.concatenate(places).astype(np.int32)


def teacher_margins(rows: datasets.Dataset) -> np.ndarray:
    """The teacher's margin of each row's positive over its negatives' mean, (N,) float32."""
    if "teacher_scores" in rows.column_names:
        batches = (batch["teacher_scores"] for batch in column_batches(rows, ["teacher_scores"]))
        return np.concatenate([scores[:, 0] - scores[:, 1:].mean(1) for scores in batches])
    return np.concatenate(
        [batch["pos_score"] - batch["neg_score"] for batch in column_batches(rows, ["pos_score", "neg_score"])]
    )
