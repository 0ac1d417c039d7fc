"""Efficiency of rankers: latency per query, throughput, memory, bytes of the model and of a stored passage.

The protocol, which every result repeats: each query is ranked separately, against its own candidates or against those
of all queries. The timed region contains tokenising and encoding the query (`encode`), and scoring and sorting all
candidates (`score`); each ends when its numbers are in the CPU's memory, and so after the work of a GPU. Where the
architecture allows it, vectors of the candidates were computed in advance and lie in memory in float32; otherwise
tokenising and encoding them is part of `score`. Loading, finding candidates, and reading their texts or vectors from
disk are not timed; a first stage can be timed in the same rounds. Rankers take turns query by query, so that other
load on the machine affects all of them; the first queries are a warm-up.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import csr_array, issparse
from tqdm.auto import tqdm

from ..errors import InputError
from ..models import ARCHITECTURES
from ..ranker import Ranker
from ..retrieval.stored_reranker import score_stored

Stored = np.ndarray | csr_array | list[np.ndarray] | None  # encoded documents; None where a ranker cannot store them
MEBIBYTE = 2**20
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CPU = Path("/proc/cpuinfo")
TABLE_HEADER = (
    "| ranker | architecture | total p50 ms | p95 | p99 | encode p50 | score p50 | times faster | passages/s "
    "| pairs/s | bytes/passage | model MB | peak MB | peak CUDA MB |"
)


class Scorer(Protocol):
    """An object that only scores and can be timed like a `Ranker`, such as an exported graph."""

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Score query i with document i; (N,), higher is better."""


def measure_efficiency(
    rankers: Mapping[str, Callable[[], Ranker | Scorer]],
    queries: Sequence[str],
    documents: Sequence[str] | Sequence[Sequence[str]],
    warm_up: int = 2,
    depths: Sequence[int] = (),
    first_stages: Mapping[str, Callable[[str], object]] | None = None,
    counts: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Measure rankers side by side; the module describes the protocol.

    Args:
        rankers: name -> function that loads the ranker.
        queries: texts; each is one round of measuring.
        documents: texts of the candidates, best first: one list for every query, or a list per query. The paper has
            1,000.
        warm_up: number of rounds before, with the first queries, that are not counted.
        depths: numbers of candidates to time, the first of each list; by default all. Figures that do not name their
            depth are those of the largest.
        first_stages: name -> function that searches for one query; timed in the same rounds.
        counts: number of texts of each candidate of each query, its passages; None for one each.

    Returns:
        `environment`, `protocol`, `first_stages`: name -> `total_ms` ({"p50", "p95", "p99", "mean"}), and `rankers`:
        name -> `architecture`, `device`, `dtype`, `batch_size`, `tokens_per_batch`, `parameters`, `model_bytes` (all
        but the first None for a `Scorer`), `score_ms` and `total_ms`, `total_ms_by_depth`: depth, as a string, ->
        `total_ms`, `pairs_per_second` (from text), `peak_process_mb` (more than the process had before),
        `peak_cuda_mb` (None on other devices), and, None where nothing is stored, `bytes_per_passage`, `encode_ms` (of
        the query) and `passages_per_second` (encoding).

    Raises:
        InputError: if rankers, queries or documents are empty, or lists of documents are not one per query.

    Example:
        >>> load = lambda: kd.Ranker.from_pretrained("bert_dot")
        >>> results = kd.measure_efficiency({"bert_dot": load}, ["what is bread"], ["Bread is baked."])
        >>> sorted(results["rankers"]["bert_dot"]["total_ms"])
        ['mean', 'p50', 'p95', 'p99']
    """
    if not rankers or not queries or not documents:
        counts = f"{len(rankers)}, {len(queries)} and {len(documents)}"
        raise InputError(f"Measuring needs rankers, queries and documents, got {counts}.")
    lists, ends = _candidate_lists(queries, documents, depths, counts)
    depths = list(ends[0])
    distinct = list(dict.fromkeys(chain.from_iterable(lists)))
    results, timed, searches = {}, {}, {}
    for name, load in rankers.items():
        ranker, stored, results[name] = _load_and_measure(load, queries[0], lists[0], distinct)
        timed[name] = _TimedRanker(ranker, stored, {depth: [] for depth in depths})
    for name, search in (first_stages or {}).items():
        searches[name] = (search, [])
    place_of = {text: place for place, text in enumerate(distinct)}
    rounds = list(zip(queries, lists, ends, strict=True))
    for query, texts, of_depths in tqdm([*(rounds * warm_up)[:warm_up], *rounds], desc="Timing", unit="query"):
        for search, seconds in searches.values():
            start = time.perf_counter()
            search(query)
            seconds.append(time.perf_counter() - start)
        places = [place_of[text] for text in texts]
        for ranker in timed.values():
            ranker.time(query, texts, places, of_depths)
    searched = {}
    for name, (_, seconds) in searches.items():
        searched[name] = {"total_ms": _percentiles(np.array(seconds[warm_up:]) * 1000)}
    for name, ranker in timed.items():
        results[name] |= ranker.latencies(warm_up)
    protocol = {
        "queries": len(queries),
        "warm_up": warm_up,
        "candidates": min(depths[-1], max(map(len, lists if counts is None else counts))),
        "candidate_lists": "one for all queries" if isinstance(documents[0], str) else "one per query",
        "stored": "vectors of the candidates in memory, float32, where bytes_per_passage is given",
    }
    return {"environment": environment(), "protocol": protocol, "rankers": results, "first_stages": searched}


@dataclass
class _TimedRanker:
    """A loaded ranker, the vectors of all distinct candidates, and the seconds of each round by ascending depth."""

    ranker: Ranker | Scorer
    stored: Stored
    seconds: dict[int, list[tuple[float, float]]]

    def time(self, query: str, documents: Sequence[str], places: Sequence[int], ends: Mapping[int, int]) -> None:
        """Time one query with its candidates, whose vectors have these places, at every depth -> number of texts."""
        for depth, end in ends.items():
            vectors = self.stored
            if isinstance(vectors, np.ndarray | csr_array):
                vectors = vectors[places[:end]]
            elif vectors is not None:
                vectors = [vectors[place] for place in places[:end]]
            self.seconds[depth].append(_time_query(self.ranker, query, documents[:end], vectors))

    def latencies(self, warm_up: int) -> dict[str, Any]:
        """Return the latencies after the rounds of warm-up."""
        figures: dict[str, Any] = {"total_ms_by_depth": {}}
        for depth, seconds in self.seconds.items():
            encode, score = np.array(seconds[warm_up:]).T * 1000
            figures["encode_ms"] = None if self.stored is None else _percentiles(encode)
            figures["score_ms"] = _percentiles(score)
            figures["total_ms"] = figures["total_ms_by_depth"][str(depth)] = _percentiles(encode + score)
        return figures


def _candidate_lists(
    queries: Sequence[str],
    documents: Sequence[str] | Sequence[Sequence[str]],
    depths: Sequence[int],
    counts: Sequence[Sequence[int]] | None,
) -> tuple[list[Sequence[str]], list[dict[int, int]]]:
    """Return the texts of each query up to the largest depth, and how many of them belong to each depth, ascending."""
    lists = list(documents)
    if isinstance(documents[0], str):
        lists = [documents] * len(queries)
    lengths = [len(texts) for texts in lists]
    if len(lists) != len(queries) or min(lengths) == 0:
        raise InputError(
            f"Lists of candidates are one per query and not empty, got {len(lists)} of {min(lengths)} to "
            f"{max(lengths)} texts for {len(queries)} queries; leave out queries without candidates."
        )
    if counts is not None:
        lengths = [len(of_query) for of_query in counts]
    depths = sorted(set(depths)) or [max(lengths)]
    if depths[0] < 1:
        raise InputError(f"depths are numbers of candidates, at least 1, got {depths[0]}.")
    ends = []
    for place, texts in enumerate(lists):
        ends.append({})
        for depth in depths:
            ends[-1][depth] = depth if counts is None else sum(counts[place][:depth])
        lists[place] = texts[: ends[-1][depths[-1]]]
    return lists, ends


def _load_and_measure(
    load: Callable[[], Ranker | Scorer], query: str, documents: Sequence[str], distinct: Sequence[str]
) -> tuple[Ranker | Scorer, Stored, dict[str, Any]]:
    """Return a ranker, the vectors of the distinct documents if it stores them, and the figures measured once."""
    before = 0.0  # where the peak of memory cannot be reset, it is that of the whole process
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")
        before = _status_mb("VmRSS")
    ranker = load()
    figures = _describe(ranker)
    stored = None
    if isinstance(ranker, Ranker) and ranker.model.config.is_storable:
        start = time.perf_counter()
        stored = ranker.encode_documents(distinct)
        figures["passages_per_second"] = len(distinct) / (time.perf_counter() - start)
        figures["bytes_per_passage"] = _bytes(stored) / len(distinct)
    start = time.perf_counter()
    ranker.score([query] * len(documents), documents)
    figures["pairs_per_second"] = len(documents) / (time.perf_counter() - start)
    figures["peak_process_mb"] = peak_mb() - before
    if isinstance(ranker, Ranker) and ranker.model.device.type == "cuda":
        figures["peak_cuda_mb"] = torch.cuda.max_memory_allocated(ranker.model.device) / MEBIBYTE
    return ranker, stored, figures


def _bytes(stored: np.ndarray | csr_array | list[np.ndarray]) -> int:
    arrays = stored
    if issparse(stored):
        arrays = [stored.data, stored.indices, stored.indptr]
    return sum(array.nbytes for array in arrays)


def _describe(ranker: Ranker | Scorer) -> dict[str, Any]:
    """Return what a ranker is; of a `Scorer` only its class is known."""
    names = ("device", "dtype", "batch_size", "tokens_per_batch", "parameters", "model_bytes")
    figures = {"architecture": type(ranker).__name__, **dict.fromkeys(names)}
    if isinstance(ranker, Ranker):
        model = ranker.model
        architectures = {cls.config_class.model_type: name for name, cls in ARCHITECTURES.items()}
        device = model.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(model.device)
        figures = {
            "architecture": architectures[model.config.model_type],
            "device": device,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": ranker.batch_size,
            "tokens_per_batch": ranker.tokens_per_batch,
            "parameters": model.num_parameters(),
            "model_bytes": model.get_memory_footprint(return_buffers=False),
        }
    return figures | dict.fromkeys(("bytes_per_passage", "passages_per_second", "peak_cuda_mb"))


def _time_query(ranker: Ranker | Scorer, query: str, documents: Sequence[str], stored: Stored) -> tuple[float, float]:
    """Return the seconds of encoding and of scoring."""
    start = time.perf_counter()
    if stored is None:
        np.argsort(-ranker.score([query] * len(documents), documents), kind="stable")
        return 0.0, time.perf_counter() - start
    vectors = ranker.encode_queries([query])[0]
    encoded = time.perf_counter()
    np.argsort(-score_stored(ranker.model, vectors, stored, ranker.batch_size), kind="stable")
    return encoded - start, time.perf_counter() - encoded


def _percentiles(values: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(values.mean())}


def peak_mb() -> float:
    """Return the peak of the process's resident memory in MB."""
    if STATUS.is_file():
        return _status_mb("VmHWM")
    unit = MEBIBYTE if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status_mb(name: str) -> float:
    return int(STATUS.read_text().partition(f"{name}:")[2].split()[0]) / 1024


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as far as they affect the figures."""
    versions = dict.fromkeys(("hf_kd_ranking", "torch", "transformers", "numpy"), "not installed")
    for name in versions:
        with suppress(PackageNotFoundError):  # a checkout that is only on the path
            versions[name] = version(name)
    processor = platform.processor()
    if CPU.is_file():
        processor = CPU.read_text().partition("model name\t: ")[2].partition("\n")[0] or processor
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def efficiency_text(results: Mapping[str, Any]) -> str:
    """Format a result of `measure_efficiency` as a Markdown table; `times faster` compares with the slowest median."""
    slowest = max(figures["total_ms"]["p50"] for figures in results["rankers"].values())
    lines = [TABLE_HEADER, "|---" * TABLE_HEADER.count(" |") + "|"]
    for name, figures in results["rankers"].items():
        total, encode = figures["total_ms"], figures["encode_ms"] or {}
        values = [total["p50"], total["p95"], total["p99"], encode.get("p50"), figures["score_ms"]["p50"]]
        values += [slowest / total["p50"], figures["passages_per_second"], figures["pairs_per_second"]]
        megabytes = None if figures["model_bytes"] is None else figures["model_bytes"] / 1e6
        values += [figures["bytes_per_passage"], megabytes, figures["peak_process_mb"]]
        cells = [name, figures["architecture"]]
        for value in [*values, figures["peak_cuda_mb"]]:
            cells.append("-" if value is None else f"{value:,.{int(value < 1000)}f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, figures in results["rankers"].items():
        depths = [f"{depth}: {total['p50']:,.1f}" for depth, total in figures["total_ms_by_depth"].items()]
        if len(depths) > 1:
            lines.append(f"{name}, total p50 ms by number of candidates: {', '.join(depths)}")
    for name, figures in results["first_stages"].items():
        lines.append(f"{name}, first stage: total p50 {figures['total_ms']['p50']:,.1f} ms")
    settings = results["protocol"] | results["environment"]
    return "\n".join([*lines, "; ".join(f"{name} {value}" for name, value in settings.items())])
