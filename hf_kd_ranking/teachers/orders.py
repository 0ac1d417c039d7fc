"""Orders as teachers: the permutations of listwise rerankers become scores, and so teacher rows.

A listwise teacher, often a large language model, returns an order of a query's documents and no scores. Several orders
of a query, from several teachers or from several samples of one, are combined into one score per document.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..artifacts import existing_file, read_json, refuse_existing
from ..data.rows import TeacherRows, check_format, write_teacher_scores
from ..data.runs import Run, read_run, write_run
from ..data.tables import read_jsonl
from ..errors import InputError

RECIPROCAL_RANK_CONSTANT = 60  # of Cormack et al. 2009
PRIOR = 0.1  # virtual wins and losses that keep Bradley-Terry strengths finite
OPTIMIZER = {"gtol": 1e-7, "ftol": 1e-15, "maxiter": 1_000}


def combine_orders(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: str = "reciprocal_rank",
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> dict[str, int | float | None]:
    """Combine the orders of each query into scores.

    Args:
        files: result files of RankLLM (.json, .jsonl), in which a query may appear several times, or TREC runs.
        output: a run (.trec), from which `teacher triples` samples, or teacher rows of whole lists (.jsonl, .parquet),
            the best document first; appears when it is complete.
        method: one of `METHODS`.
        weights: one weight for each file; None weighs all files equally.
        overwrite: True replaces an existing output.

    Returns:
        `queries` written, `orders` read, `dropped` queries of fewer than two documents, and how far two orders of a
        query agree: the mean of `kendall_tau` and of `inversions`, see `agreement`.

    Raises:
        FileNotFoundError, FileExistsError: for the files and the output.
        InputError: for an unknown method, bad weights, no file, and malformed files.
    """
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    if not files:
        raise InputError("Orders are read from at least one file, got none.")
    if weights is None:
        weights = [1.0] * len(files)
    if len(weights) != len(files) or not all(0 < weight < np.inf for weight in weights):
        raise InputError(f"Needed a weight above 0 for each of the {len(files)} files, got {list(weights)}.")
    output = Path(output)
    refuse_existing(output, overwrite)
    if output.suffix != ".trec":
        check_format(output, has_scores=True, are_pairs=False)
    orders: dict[str, list[tuple[list[str], float]]] = {}  # query_id -> its orders and their weights
    for path, weight in zip(files, weights, strict=True):
        for query_id, order in read_orders(path):
            orders.setdefault(query_id, []).append((order, weight))
    run, agreements = Run(), []
    for query_id, of_query in tqdm(orders.items(), desc="Combining orders", unit="query", delay=3):
        for (first, _), (second, _) in combinations(of_query, 2):
            agreements.append(agreement(first, second))
        scores = _combine(of_query, METHODS[method])
        if len(scores) > 1:
            run[query_id] = sorted(scores.items(), key=lambda scored: -scored[1])
    if not run:
        raise InputError(f"No query of {', '.join(map(str, files))} has two documents, which an order needs.")
    if output.suffix == ".trec":
        write_run(run, output, tag=method)
    else:
        write_teacher_scores(_as_rows(run), output)
    counts = {"queries": len(run), "orders": sum(map(len, orders.values())), "dropped": len(orders) - len(run)}
    return counts | mean_agreement(agreements)


def read_orders(path: str | os.PathLike) -> list[tuple[str, list[str]]]:
    """Read rankings, (query_id, doc_ids, the best first), from a result file of RankLLM or a TREC run.

    RankLLM's files hold objects `{"query": {"qid": ...}, "candidates": [{"docid": ...}, ...]}` as a JSON list (.json)
    or as JSON lines (.jsonl). The order is that of the candidates, and their scores are not read; a query
    may appear several times. A run's order is that of its scores, and of the lines where they tie.

    Raises:
        FileNotFoundError: if the file does not exist.
        InputError: with file and place, for malformed content, a missing id, a document listed twice in an order.
    """
    path = existing_file(path, "order")
    orders = []
    if {".jsonl", ".json"}.isdisjoint(path.suffixes):
        for query_id, ranking in read_run(path).items():
            orders.append((query_id, [doc_id for doc_id, _ in ranking]))
        return orders
    if ".json" in path.suffixes:
        unit, results = "result", enumerate(read_json(path, list, "order"), start=1)
    else:
        unit, results = "line", read_jsonl(path)
    for number, result in results:
        orders.append(_read_result(f"{path} {unit} {number}", result))
    if not orders:
        raise InputError(f"{path} is empty; needed at least one order.")
    return orders


def _read_result(place: str, result: object) -> tuple[str, list[str]]:
    query, candidates = None, None
    if isinstance(result, Mapping):
        query, candidates = result.get("query"), result.get("candidates")
    if not isinstance(query, Mapping) or not isinstance(candidates, list):
        raise InputError(f"{place}: needed an object with query and candidates, got {str(result)[:60]}.")
    if not candidates:
        raise InputError(f"{place}: query {query.get('qid')!r} has no candidates; leave it out.")
    doc_ids = []
    for candidate in candidates:
        doc_ids.append(_read_id(place, "docid", candidate))
    if len(set(doc_ids)) < len(doc_ids):
        repeated = max(doc_ids, key=doc_ids.count)
        raise InputError(f"{place}: document {repeated!r} appears twice in the order of query {query.get('qid')!r}.")
    return _read_id(place, "qid", query), doc_ids


def _read_id(place: str, name: str, holder: object) -> str:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{place}: {name} must be a string or an integer, got {value!r}.")
    return str(value)


# ---- Methods --------------------------------------------------------------------------------------------------------


def _combine(orders: Sequence[tuple[Sequence[str], float]], method: Callable) -> dict[str, float]:
    """Return doc_id -> score of a query's orders; documents in the order in which they are first seen."""
    rows: dict[str, int] = {}
    for order, _ in orders:
        for doc_id in order:
            rows.setdefault(doc_id, len(rows))
    ranks = np.full((len(orders), len(rows)), np.nan)  # from 1; NaN where an order lacks a document
    weights = np.empty(len(orders))
    for number, (order, weight) in enumerate(orders):
        weights[number] = weight
        for rank, doc_id in enumerate(order, start=1):
            ranks[number, rows[doc_id]] = rank
    scores = method(ranks, weights)
    return dict(zip(rows, scores.tolist(), strict=True))


def reciprocal_rank(ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Score documents by the weighted mean of 1 / (60 + rank); an order that lacks a document adds 0.

    Source: Cormack et al. 2009, https://dl.acm.org/doi/10.1145/1571941.1572114.

    Args:
        ranks: (orders, documents), from 1; NaN where an order lacks a document.
        weights: (orders,).

    Returns:
        (documents,).
    """
    return weights @ np.nan_to_num(1 / (RECIPROCAL_RANK_CONSTANT + ranks)) / weights.sum()


def borda(ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Score documents by the weighted mean of the share of the others that they are ranked before, 0 to 1.

    An order's missing documents share the places after its last one. Arguments and result as `reciprocal_rank`.
    """
    count = ranks.shape[1]
    listed = (~np.isnan(ranks)).sum(1, keepdims=True)
    ranks = np.where(np.isnan(ranks), (listed + 1 + count) / 2, ranks)
    return weights @ ((count - ranks) / max(count - 1, 1)) / weights.sum()


def bradley_terry(ranks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Score documents by their strengths in the Bradley-Terry model of all pairs that an order ranks, as logarithms.

    The probability that i is ranked before j is sigmoid(s_i - s_j); s is the maximum likelihood, with `PRIOR` virtual
    wins and losses of each document against one of strength 0 (Bradley and Terry 1952,
    https://doi.org/10.2307/2334029). A missing document is in no pair of that order. Arguments and result as
    `reciprocal_rank`.
    """
    from scipy.optimize import minimize  # slow to import, and only needed here
    from scipy.special import expit

    with np.errstate(invalid="ignore"):
        is_before = ranks[:, :, None] < ranks[:, None, :]  # (orders, i, j); False for NaN
    wins = np.tensordot(weights, is_before.astype(float), 1)  # (i, j)

    def loss_and_gradient(strengths: np.ndarray) -> tuple[float, np.ndarray]:
        differences = strengths - strengths[:, None]  # (i, j): s_j - s_i
        losses = wins * np.logaddexp(0, differences)
        surprise = wins * expit(differences)  # wins times the probability of the contrary
        prior = PRIOR * (np.logaddexp(0, strengths) + np.logaddexp(0, -strengths))
        gradient = surprise.sum(0) - surprise.sum(1) + PRIOR * (2 * expit(strengths) - 1)
        return losses.sum() + prior.sum(), gradient

    found = minimize(loss_and_gradient, np.zeros(ranks.shape[1]), jac=True, method="L-BFGS-B", options=OPTIMIZER)
    return found.x


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "reciprocal_rank": reciprocal_rank,
    "borda": borda,
    "bradley_terry": bradley_terry,
}


# ---- Agreement ------------------------------------------------------------------------------------------------------


def agreement(first: Sequence, second: Sequence) -> tuple[float, float] | None:
    """Return Kendall's tau of two orders over the documents of both, -1 to 1, and the share of inverted pairs.

    None if they share fewer than two documents.
    """
    places = {doc_id: place for place, doc_id in enumerate(second)}
    shared = np.array(list(filter(lambda place: place is not None, map(places.get, first))))
    pairs = len(shared) * (len(shared) - 1) // 2
    if pairs == 0:
        return None
    inverted = int(np.triu(shared[:, None] > shared).sum())
    return 1 - 2 * inverted / pairs, inverted / pairs


def mean_agreement(agreements: Sequence[tuple[float, float] | None]) -> dict[str, float | None]:
    """Return the means of `kendall_tau` and `inversions` of pairs of orders; None without any."""
    known = [values for values in agreements if values is not None]
    if not known:
        return {"kendall_tau": None, "inversions": None}
    tau, inversions = np.mean(known, axis=0).tolist()
    return {"kendall_tau": tau, "inversions": inversions}


def _as_rows(run: Run) -> TeacherRows:
    columns = {"query_id": list(run), "doc_ids": [], "teacher_scores": []}
    for ranking in run.values():
        columns["doc_ids"].append([doc_id for doc_id, _ in ranking])
        columns["teacher_scores"].append([score for _, score in ranking])
    scores = pa.array(columns["teacher_scores"], pa.list_(pa.float32()))
    return TeacherRows(datasets.Dataset(pa.table(columns | {"teacher_scores": scores})))
