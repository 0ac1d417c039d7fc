"""Efficiency of rankers: latency per query, throughput, memory, bytes of the model and of a stored passage.

The protocol, which every result repeats: each query is ranked separately against the same candidates. The timed region
contains tokenising and encoding the query (`encode`), and scoring and sorting all candidates (`score`); each ends when
its numbers are in the CPU's memory, and so after the work of a GPU. Where the architecture allows it, vectors of the
candidates were computed in advance and lie in memory in float32; otherwise tokenising and encoding them is part of
`score`. Loading, finding candidates, and reading their texts or vectors from disk are not timed. Rankers take turns
query by query, so that other load on the machine affects all of them; the first queries are a warm-up.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..inference import score_stored
from ..models import ARCHITECTURES, RankerModel
from ..ranker import Ranker

MEBIBYTE = 2**20
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
TABLE_HEADER = (
    "| ranker | architecture | total p50 ms | p95 | p99 | encode p50 | score p50 | times faster | passages/s "
    "| pairs/s | bytes/passage | model MB | peak MB | peak CUDA MB |"
)


def measure_efficiency(
    rankers: Mapping[str, Callable[[], Ranker]], queries: Sequence[str], documents: Sequence[str], warm_up: int = 2
) -> dict[str, Any]:
    """Measure rankers side by side; the module describes the protocol.

    Args:
        rankers: name -> function that loads the ranker.
        queries: texts; each is one round of measuring.
        documents: the candidates of every query; the paper has 1,000.
        warm_up: number of rounds before, which are not counted, with the first queries.

    Returns:
        `environment`, `protocol` and `rankers`: name -> `architecture`, `device`, `dtype`, `parameters`,
        `model_bytes`, `bytes_per_passage` (None where nothing is stored), `encode_ms` (None where the query is not
        encoded without the document), `score_ms` and `total_ms` ({"p50", "p95", "p99", "mean"}),
        `passages_per_second` (encoding in advance; None where nothing is stored), `pairs_per_second` (scoring from
        text), `peak_process_mb` (more than the process had before) and `peak_cuda_mb` (None on other devices).

    Raises:
        ValueError: if rankers, queries or documents are empty.
    """
    if not rankers or not queries or not documents:
        raise ValueError(
            f"Measuring needs rankers, queries and documents, got {len(rankers)}, {len(queries)} and {len(documents)}."
        )
    results, loaded, seconds = {}, {}, {}
    for name, load in rankers.items():
        ranker, stored, results[name] = _load_and_measure(load, queries[0], documents)
        loaded[name] = (ranker, stored)
        seconds[name] = []
    rounds = [*(queries * warm_up)[:warm_up], *queries]
    for query in tqdm(rounds, desc="Timing", unit="query"):
        for name, (ranker, stored) in loaded.items():
            seconds[name].append(_time_query(ranker, query, documents, stored))
    for name, figures in results.items():
        encode, score = np.array(seconds[name][warm_up:]).T * 1000
        is_stored = figures["bytes_per_passage"] is not None
        figures["encode_ms"] = _percentiles(encode) if is_stored else None
        figures["score_ms"] = _percentiles(score)
        figures["total_ms"] = _percentiles(encode + score)
    protocol = {
        "queries": len(queries),
        "warm_up": warm_up,
        "candidates": len(documents),
        "stored": "vectors of the candidates in memory, float32, where bytes_per_passage is given",
    }
    return {"environment": environment(), "protocol": protocol, "rankers": results}


def _load_and_measure(
    load: Callable[[], Ranker], query: str, documents: Sequence[str]
) -> tuple[Ranker, Sequence[np.ndarray] | None, dict[str, Any]]:
    """Return a ranker, its stored documents (None where it cannot store them), and the figures measured once."""
    before = _start_of_peak()
    ranker = load()
    model = ranker.model
    is_cuda = model.device.type == "cuda"
    parameters = model_bytes = 0
    for parameter in model.parameters():
        parameters += parameter.numel()
        model_bytes += parameter.nbytes
    figures = {
        "architecture": _architecture(model),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": ranker.batch_size,
        "parameters": parameters,
        "model_bytes": model_bytes,
        "bytes_per_passage": None,
        "passages_per_second": None,
    }
    stored = None
    if model.config.is_storable:
        start = time.perf_counter()
        stored = ranker.encode_documents(documents)
        figures["passages_per_second"] = len(documents) / (time.perf_counter() - start)
        figures["bytes_per_passage"] = sum(vectors.nbytes for vectors in stored) / len(documents)
    start = time.perf_counter()
    ranker.score(query, documents)
    figures["pairs_per_second"] = len(documents) / (time.perf_counter() - start)
    figures["peak_process_mb"] = peak_mb() - before
    figures["peak_cuda_mb"] = torch.cuda.max_memory_allocated(model.device) / MEBIBYTE if is_cuda else None
    return ranker, stored, figures


def _architecture(model: RankerModel) -> str:
    names = {model_class.config_class.model_type: name for name, model_class in ARCHITECTURES.items()}
    return names[model.config.model_type]


def _time_query(
    ranker: Ranker, query: str, documents: Sequence[str], stored: Sequence[np.ndarray] | None
) -> tuple[float, float]:
    """Return the seconds of encoding and of scoring."""
    start = time.perf_counter()
    if stored is None:
        np.argsort(-ranker.score(query, documents), kind="stable")
        return 0.0, time.perf_counter() - start
    vectors = ranker.encode_queries([query])[0]
    encoded = time.perf_counter()
    np.argsort(-score_stored(ranker.model, vectors, stored, ranker.batch_size), kind="stable")
    return encoded - start, time.perf_counter() - encoded


def _percentiles(values: np.ndarray) -> dict[str, float]:
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return {"p50": p50, "p95": p95, "p99": p99, "mean": float(values.mean())}


def _start_of_peak() -> float:
    """Reset the peak of memory and return the resident MB; where the system cannot, return 0 and keep the old peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if not os.access(CLEAR, os.W_OK):
        return 0.0
    CLEAR.write_text("5")
    return _status_mb("VmRSS")


def peak_mb() -> float:
    """Return the peak of the process's resident memory in MB."""
    if STATUS.is_file():
        return _status_mb("VmHWM")
    unit = MEBIBYTE if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status_mb(name: str) -> float:
    _, _, rest = STATUS.read_text().partition(f"{name}:")
    return int(rest.split()[0]) / 1024


def environment() -> dict[str, Any]:
    """Return the versions and the machine, as far as they affect the figures."""
    versions = {}
    for name in ("hf_kd_ranking", "torch", "transformers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that is only on the path
            versions[name] = "not installed"
    processor = platform.processor()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        _, _, rest = cpu.read_text().partition("model name\t: ")
        processor = rest.partition("\n")[0] or processor
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
        cells = [total["p50"], total["p95"], total["p99"], encode.get("p50"), figures["score_ms"]["p50"]]
        cells += [slowest / total["p50"], figures["passages_per_second"], figures["pairs_per_second"]]
        cells += [figures["bytes_per_passage"], figures["model_bytes"] / 1e6]
        cells += [figures["peak_process_mb"], figures["peak_cuda_mb"]]
        lines.append(f"| {name} | {figures['architecture']} | {' | '.join(map(_cell, cells))} |")
    settings = results["protocol"] | results["environment"]
    return "\n".join([*lines, "", "; ".join(f"{name} {value}" for name, value in settings.items())])


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:,.1f}"
    return f"{value:,.0f}"
