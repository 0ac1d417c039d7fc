"""Efficiency of rankers: counts, the order of the protocol, memory, the table."""

import mmap
import os

import numpy as np
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
        if model.config.vectors_per_text == "sparse":  # weights, words, and where each document begins
            assert figures["bytes_per_passage"] == 4 * (2 * stored.nnz + len(DOCUMENTS) + 1) / len(DOCUMENTS)
        else:
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


def test_efficiency_times_each_query_with_its_own_candidates_at_each_depth(ranker, monkeypatch):
    calls, lists = [], [DOCUMENTS[:3], DOCUMENTS[2:], DOCUMENTS[::-1]]
    timed, encode = efficiency._time_query, ranker.encode_documents

    def recorded(ranker, query, documents, stored):
        calls.append((query, documents))
        if stored is not None:
            for vectors, wanted in zip(stored, encode(documents), strict=True):
                if ranker.model.config.vectors_per_text == "sparse":
                    vectors, wanted = vectors.toarray(), wanted.toarray()
                assert torch.allclose(torch.as_tensor(vectors), torch.as_tensor(wanted), atol=1e-5)
        return timed(ranker, query, documents, stored)

    encoded = []
    ranker.encode_documents = lambda texts: encoded.extend(texts) or encode(texts)
    monkeypatch.setattr(efficiency, "_time_query", recorded)
    results = kd.measure_efficiency({"ours": lambda: ranker}, QUERIES, lists, warm_up=1, depths=(3, 1, 3))
    wanted = []
    for place in (0, 0, 1, 2):
        wanted += [(QUERIES[place], lists[place][:1]), (QUERIES[place], lists[place][:3])]
    assert calls == wanted
    assert encoded == (DOCUMENTS if ranker.model.config.is_storable else [])  # every text once
    figures = results["rankers"]["ours"]
    assert list(figures["total_ms_by_depth"]) == ["1", "3"]
    assert figures["total_ms_by_depth"]["3"] == figures["total_ms"]
    assert results["protocol"].items() >= {"candidates": 3, "candidate_lists": "one per query"}.items()
    assert "ours, total p50 ms by number of candidates: 1: " in efficiency.efficiency_text(results)


class Graph:
    """A ranker with `score` only, as an exported one."""

    def score(self, queries: list[str], documents: list[str]) -> np.ndarray:
        return np.array([len(query) + len(document) for query, document in zip(queries, documents, strict=True)])


def test_efficiency_times_what_only_scores_and_a_first_stage():
    searched = []
    results = kd.measure_efficiency({"graph": Graph}, QUERIES, DOCUMENTS, 1, first_stages={"BM25": searched.append})
    assert searched == [QUERIES[0], *QUERIES]
    figures = results["rankers"]["graph"]
    assert (figures["architecture"], figures["parameters"], figures["bytes_per_passage"]) == ("Graph", None, None)
    assert 0 < figures["score_ms"]["p50"] == figures["total_ms"]["p50"]
    assert results["first_stages"]["BM25"]["total_ms"]["p50"] > 0
    text = efficiency.efficiency_text(results)
    assert "| graph | Graph | " in text and "BM25, first stage: total p50 0.0 ms" in text


def pages(megabytes: int) -> mmap.mmap:
    """Memory that is certainly in use: an allocator could reuse memory that it already has."""
    block = mmap.mmap(-1, megabytes << 20)
    for place in range(0, len(block), mmap.PAGESIZE):
        block[place] = 1
    return block


def test_efficiency_times_all_passages_of_the_candidates_within_a_depth():
    timed = []

    class Counting:
        def score(self, queries, documents):
            timed.append(len(documents))
            return np.zeros(len(documents))

    lists = [["a", "b", "c", "d"], ["e", "f", "g", "h"]]
    options = {"depths": [1, 3], "warm_up": 0, "counts": [[2, 1, 1], [1, 2, 1]]}
    results = kd.measure_efficiency({"x": Counting}, QUERIES[:2], lists, **options)
    assert timed[-4:] == [2, 4, 1, 4]
    assert list(results["rankers"]["x"]["total_ms_by_depth"]) == ["1", "3"]
    assert results["protocol"]["candidates"] == 3


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
    with pytest.raises(ValueError, match="one per query and not empty, got 2 of 0 to 4 texts for 3 queries"):
        kd.measure_efficiency({"graph": Graph}, QUERIES, [DOCUMENTS, []])
    with pytest.raises(ValueError, match="depths are numbers of candidates, at least 1, got 0"):
        kd.measure_efficiency({"graph": Graph}, QUERIES, DOCUMENTS, depths=(0, 2))
