"""The order of training: a permutation, another each epoch, the same again after a resume."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from hf_kd_ranking.data import samplers
from hf_kd_ranking.data.samplers import ShuffledSampler, TopicBalancedSampler


def order(size: int = 100, seed: int = 42, epoch: int = 0, chunk_size: int = 65_536) -> list[int]:
    sampler = ShuffledSampler(range(size), seed, chunk_size)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 100])
def test_every_row_comes_once_an_epoch(size, epoch):
    rows = order(size, epoch=epoch)
    assert sorted(rows) == list(range(size))
    assert len(ShuffledSampler(range(size), 42)) == size
    assert all(type(row) is int for row in rows)  # data sets are not indexed by tensors


def test_rows_are_shuffled_and_not_merely_rotated():
    rows = order()
    assert rows != sorted(rows)
    assert len({(b - a) % 100 for a, b in pairwise(rows)}) > 10


@pytest.mark.parametrize("chunk_size", [1, 7, 99, 100, 101])
def test_the_chunk_size_does_not_change_the_order(chunk_size):
    assert order(chunk_size=chunk_size) == order()


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(order(seed=seed, epoch=epoch)) for seed in (1, 2, 3, 100) for epoch in range(4)}
    assert len(orders) == 4 * 4  # none is that of a neighbouring seed's earlier epoch


def test_setting_an_epoch_again_restores_its_order():
    sampler = ShuffledSampler(range(100), 42)
    first = list(sampler)
    assert list(sampler) == first  # Trainer alone moves the epoch on
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = order()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert order() == first


@pytest.mark.parametrize("done", [0, 3, 9])
def test_resumed_epoch_continues_with_the_batches_left(done):
    def batches() -> DataLoader:
        sampler = ShuffledSampler(range(40), seed=42, chunk_size=16)
        sampler.set_epoch(2)
        return DataLoader(range(40), batch_size=4, sampler=sampler, collate_fn=list)

    interrupted = list(batches())
    resumed = list(skip_first_batches(batches(), done))  # as Trainer resumes
    assert resumed == interrupted[done:]
    assert sorted(row for batch in interrupted for row in batch) == list(range(40))


# ---- Batches on one topic -------------------------------------------------------------------------------------------

# 60 queries in 3 clusters of 20, five rows each; one more query of the store has no row.
QUERIES = np.repeat(np.arange(60), 5)
MARGINS = np.tile([0.0, 0.1, 0.2, 9.0, 10.0], 60).astype(np.float32)
CLUSTERS = np.append(np.arange(60) % 3, -1).astype(np.int32)


def topic_order(batch_size: int = 10, seed: int = 42, epoch: int = 0, **settings) -> np.ndarray:
    """(batches, batch_size) rows."""
    sampler = TopicBalancedSampler(QUERIES, MARGINS, CLUSTERS, batch_size, seed, **settings)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert len(rows) == len(sampler)
    assert all(type(row) is int for row in rows)
    return np.array(rows).reshape(-1, batch_size)


def test_a_batch_is_on_one_topic_and_takes_a_query_once():
    batches = topic_order()
    assert len(batches) == 30  # as many as the rows fill
    topics = [set(CLUSTERS[QUERIES[rows]]) for rows in batches]
    assert all(len(found) == 1 for found in topics)
    assert set().union(*topics) == {0, 1, 2}
    assert all(len(set(QUERIES[rows])) == 10 for rows in batches)
    drawn = [QUERIES[topic_order(epoch=epoch)] for epoch in range(5)]
    assert set(np.concatenate(drawn).flatten()) == set(range(60))


def test_a_cluster_with_too_few_queries_is_filled_up_from_the_next():
    for rows in topic_order(batch_size=30):
        sizes = sorted(np.bincount(CLUSTERS[QUERIES[rows]], minlength=3))
        assert sizes == [0, 10, 20]


def test_rows_are_balanced_over_the_margins():
    drawn = np.concatenate([topic_order(epoch=epoch).flatten() for epoch in range(20)])  # 6,000 rows
    # Ten bins of width 1: three rows share the first, 9.0 and 10.0 the last (its upper edge included).
    assert np.bincount(drawn % 5) / len(drawn) == pytest.approx([1 / 6] * 3 + [1 / 4] * 2, abs=0.03)
    plain = np.concatenate([topic_order(epoch=epoch, bins=1).flatten() for epoch in range(20)])
    assert np.bincount(plain % 5) / len(plain) == pytest.approx([0.2] * 5, abs=0.03)


def test_rows_are_placed_part_by_part_as_a_stable_sort_does(monkeypatch):
    whole = topic_order()
    parts = samplers._parts
    monkeypatch.setattr(samplers, "_parts", lambda length: parts(length, 7))
    assert (topic_order() == whole).all()
    cells = np.random.default_rng(0).integers(0, 9, 100)
    counts = np.bincount(cells, minlength=9)
    assert (samplers._rows_by_cell(cells, np.cumsum(counts) - counts) == np.argsort(cells, kind="stable")).all()


def test_a_query_with_one_margin_has_one_bin():
    sampler = TopicBalancedSampler(np.array([0, 0, 1]), np.array([2.0, 2.0, -1.0]), np.array([0, 0]), 2, 1)
    assert {frozenset(batch) for _ in range(50) for batch in [list(sampler)]} <= {frozenset({0, 2}), frozenset({1, 2})}


def test_topic_batches_depend_on_seed_and_epoch():
    orders = {topic_order(seed=seed, epoch=epoch).tobytes() for seed in (1, 10) for epoch in range(3)}
    assert len(orders) == 6
    sampler = TopicBalancedSampler(QUERIES, MARGINS, CLUSTERS, 10, 42)
    loader = DataLoader(range(len(QUERIES)), sampler=sampler, batch_size=5, collate_fn=list)
    assert list(skip_first_batches(loader, 7)) == list(loader)[7:]


def test_batches_with_more_rows_than_there_are_queries_are_refused():
    with pytest.raises(ValueError, match=r"A batch of 61 rows .* the rows have 60 queries, 10 bins"):
        topic_order(batch_size=61)


@pytest.mark.parametrize("clusters", [CLUSTERS[:40], np.where(np.arange(61) == 7, -1, CLUSTERS)])
def test_queries_without_a_cluster_are_refused(clusters):
    with pytest.raises(ValueError, match=rf"needs a cluster, .* got {len(clusters)} clusters for the queries 0 to 59"):
        TopicBalancedSampler(QUERIES, MARGINS, clusters, 10, 42)
