"""Efficiency of rankers: counts, the order of the protocol, memory, the table."""

import mmap
import os

import pytest
import torch

import hf_kd_ranking as kd
from hf_kd_ranking.models import ARCHITECTURES
from hf_kd_ranking.reporting import efficiency

QUERIES, DOCUMENTS = ["king moon", "bread", "house of iron"], ["the cat", "a dog and a king", "moon", "jam on bread"]
LENGTHS = {"max_query_length": 8, "max_document_length": 16}


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer, batch_size=3)


def test_efficiency_counts_parameters_and_bytes(ranker):
    results = kd.measure_efficiency({"ours": lambda: ranker}, QUERIES, DOCUMENTS, warm_up=1)
    figures, model = results["rankers"]["ours"], ranker.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (figures["parameters"], figures["model_bytes"]) == (parameters, 4 * parameters)
    assert isinstance(model, ARCHITECTURES[figures["architecture"]])
    assert (figures["device"], figures["dtype"], figures["peak_cuda_mb"]) == ("cpu", "float32", None)
    is_stored = model.config.is_storable
    assert [figures[name] is not None for name in ("bytes_per_passage", "passages_per_second", "encode_ms")] == [
        is_stored
    ] * 3
    if is_stored:
        stored = ranker.encode_documents(DOCUMENTS)
        assert figures["bytes_per_passage"] == 4 * sum(vectors.size for vectors in stored) / len(DOCUMENTS)
    total = figures["total_ms"]
    assert 0 < total["p50"] <= total["p95"] <= total["p99"]
    assert results["protocol"].items() >= {"queries": 3, "warm_up": 1, "candidates": 4}.items()
    assert results["environment"]["torch"] == torch.__version__


def test_efficiency_times_rankers_in_turns_after_warm_up(encoder, tokenizer, monkeypatch):
    calls, seconds = [], iter([(9, 9), (8, 8), (0.001, 0.002), (0, 0.01), (0.003, 0.004), (0, 0.02)])

    def timed(ranker, query, documents, stored):
        calls.append((ranker.name, query))
        return next(seconds)

    rankers = {}
    for name in ("bert_dot", "bert_cat"):
        rankers[name] = kd.Ranker(kd.load_ranker(str(encoder), name, **LENGTHS), tokenizer)
        rankers[name].name = name
    monkeypatch.setattr(efficiency, "_time_query", timed)
    results = kd.measure_efficiency(
        {name: lambda name=name: rankers[name] for name in rankers}, QUERIES[:2], DOCUMENTS, 1
    )
    assert calls == [(name, QUERIES[i]) for i in (0, 0, 1) for name in rankers]
    dot, cat = results["rankers"].values()
    assert (dot["encode_ms"]["p50"], dot["score_ms"]["mean"]) == (pytest.approx(2), pytest.approx(3))
    assert (dot["total_ms"]["p50"], cat["total_ms"]["p50"]) == (pytest.approx(5), pytest.approx(15))
    assert cat["encode_ms"] is None
    table = efficiency.efficiency_text(results)
    assert "| bert_dot | bert_dot | 5.0 | 6.8 |" in table
    assert "| bert_cat | bert_cat | 15.0 | 19.5 | 19.9 | - | 15.0 | 1.0 |" in table
    assert "queries 2; warm_up 1; candidates 4" in table


def pages(megabytes: int) -> mmap.mmap:
    """Memory that is certainly in use: an allocator could reuse memory that it already has."""
    block = mmap.mmap(-1, megabytes << 20)
    for place in range(0, len(block), mmap.PAGESIZE):
        block[place] = 1
    return block


def test_efficiency_peak_memory_is_the_rankers_own(encoder, tokenizer):
    pages(400).close()  # an earlier peak
    held = pages(100)  # in use before

    def load() -> kd.Ranker:
        pages(60).close()
        return kd.Ranker(kd.load_ranker(str(encoder), "bert_dot", **LENGTHS), tokenizer)

    peak = kd.measure_efficiency({"ours": load}, QUERIES, DOCUMENTS)["rankers"]["ours"]["peak_process_mb"]
    held.close()
    if os.access(efficiency.CLEAR, os.W_OK):
        assert 55 < peak < 100
    else:
        assert peak > 55


def test_efficiency_refuses_empty_input():
    with pytest.raises(ValueError, match="needs rankers, queries and documents, got 0, 3 and 4"):
        kd.measure_efficiency({}, QUERIES, DOCUMENTS)
