"""Topics of the training queries, for batches on one topic (TAS-Balanced, https://arxiv.org/abs/2104.06967)."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ..artifacts import writing
from ..data.rows import TeacherRows
from ..data.texts import TextStore
from ..errors import InputError
from ..ranker import Ranker
from .arguments import RankingTrainingArguments


def cluster_queries(
    ranker: Ranker, queries: TextStore, rows: TeacherRows, clusters: int, seed: int = 42
) -> np.ndarray:
    """Cluster the queries of teacher rows by k-means on their vectors.

    Args:
        ranker: gives one vector per text (a BERT_DOT).
        clusters: number of clusters; 2,000 in the paper, of 400,000 queries.
        seed: seed of the first centres.

    Returns:
        (len(queries),) int32, the cluster of each text of the store; -1 for those without rows.

    Raises:
        InputError: if there are fewer queries than clusters.
        ImportError: if faiss is not installed.
    """
    import faiss  # an extra

    used = np.unique(rows_of_queries(rows, queries))
    if not 1 <= clusters <= len(used):
        raise InputError(f"query_clusters must be 1 to {len(used):,}, the queries of the rows; got {clusters:,}.")
    vectors = ranker.encode_queries(queries[queries.ids_of(used)])
    kmeans = faiss.Kmeans(vectors.shape[1], clusters, niter=20, seed=seed, min_points_per_centroid=1)
    kmeans.train(vectors)
    _, nearest = kmeans.index.search(vectors, 1)
    labels = np.full(len(queries), -1, dtype=np.int32)
    labels[used] = nearest[:, 0]
    return labels


def saved_clusters(
    ranker: Ranker, queries: TextStore, rows: TeacherRows, clusters: int, args: RankingTrainingArguments, is_new: bool
) -> np.ndarray:
    """Return `cluster_queries`, computed by one process and kept in the output folder for runs that are not new."""
    path = Path(args.output_dir) / "query_clusters.npy"
    with args.main_process_first(local=False):
        if args.process_index == 0 and (is_new or not path.is_file()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing(path, "wb") as file:
                np.save(file, cluster_queries(ranker, queries, rows, clusters, args.seed))
    return np.load(path)


def rows_of_queries(rows: TeacherRows, queries: TextStore) -> np.ndarray:
    """Return the place of each row's query in the store, (N,) int32."""
    places = np.empty(len(rows), dtype=np.int32)
    for start, batch in rows.batches(["query_id"]):
        query_ids = batch["query_id"]
        places[start : start + len(query_ids)] = queries.rows_of_array(query_ids)
    return places


def teacher_margins(rows: TeacherRows) -> np.ndarray:
    """Return the teacher's margin of each row's positive over the mean of its negatives, (N,) float32."""
    margins = np.empty(len(rows), dtype=np.float32)
    for start, batch in rows.batches(["teacher_scores"]):
        lengths = pc.list_value_length(batch["teacher_scores"]).to_numpy()
        places = np.cumsum(lengths) - lengths  # of the positives
        scores = batch["teacher_scores"].flatten().to_numpy().astype(np.float64)
        positives = scores[places]
        scores[places] = 0
        negatives = np.add.reduceat(scores, places) / (lengths - 1)
        margins[start : start + len(lengths)] = positives - negatives
    return margins
