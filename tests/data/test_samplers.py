"""The order of training: a permutation, another each epoch, the same again after a resume."""

from itertools import pairwise

import pytest
import torch
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from hf_kd_ranking.data.samplers import ShuffledSampler


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
    orders = {tuple(order(seed=seed, epoch=epoch)) for seed in (1, 10, 100) for epoch in range(4)}
    assert len(orders) == 3 * 4


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
def test_a_resumed_epoch_goes_on_with_the_batches_that_were_left(done):
    def batches() -> DataLoader:
        sampler = ShuffledSampler(range(40), seed=42, chunk_size=16)
        sampler.set_epoch(2)
        return DataLoader(range(40), batch_size=4, sampler=sampler, collate_fn=list)

    interrupted = list(batches())
    resumed = list(skip_first_batches(batches(), done))  # as Trainer resumes
    assert resumed == interrupted[done:]
    assert sorted(row for batch in interrupted for row in batch) == list(range(40))
