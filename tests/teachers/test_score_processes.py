"""Scoring in processes of their own: a run that is killed, and two processes that share the work."""

import signal
from contextlib import contextmanager

import datasets
import pytest
import torch
from test_score import PAIRS, Calls, make_stores, write_triples
from warm_processes import Warm, run_ranks

import hf_kd_ranking as kd
from hf_kd_ranking.teachers import score
from hf_kd_ranking.teachers.load import load_teacher


def environment() -> dict[str, str]:
    """Return the variables of a process with the cache of the test."""
    return {"HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}


KILLED = """
import os, signal, sys, zlib
import numpy as np
import hf_kd_ranking as kd
from hf_kd_ranking import artifacts
from hf_kd_ranking.teachers import score
from hf_kd_ranking.teachers.load import Teacher

folder, triples, queries, documents, writes = sys.argv[1:]
score.PAIRS_PER_BLOCK = 16
written = []
put_in_place = artifacts._put_in_place


def put_or_die(temporary, path):
    if len(written) == int(writes):
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    put_in_place(temporary, path)


def hashes(queries, documents):
    pairs = zip(queries, documents)
    return np.array([zlib.crc32("|".join(pair).encode()) / 2**31 - 1 for pair in pairs], dtype=np.float32)


artifacts._put_in_place = put_or_die
stores = kd.TextStore.open(queries), kd.TextStore.open(documents)
kd.score_teacher(Teacher("hash", hashes, "hash"), triples, *stores, f"{folder}/out.tsv")
"""


@pytest.mark.slow
def test_killed_run_resumes_with_the_finished_blocks(tmp_path, monkeypatch, private_cache):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 16)
    triples, stores, calls = write_triples(tmp_path), make_stores(tmp_path), Calls()
    kd.score_teacher(Calls().teacher(), triples, *stores, tmp_path / "whole.tsv")
    (tmp_path / "script.py").write_text(KILLED)
    writes = 4  # the description of the work and three blocks
    arguments = [tmp_path / "script.py", tmp_path, triples, *(store.folder for store in stores), writes]
    assert Warm(arguments, tmp_path / "killed", environment()).wait() == -signal.SIGKILL
    assert not (tmp_path / "out.tsv").exists()
    counts = kd.score_teacher(calls.teacher(), triples, *stores, tmp_path / "out.tsv")
    assert counts["resumed"] == 48
    assert calls.total() == len(PAIRS) - 48
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert [path.name for path in tmp_path.glob("*out.tsv*") if path.suffix != ".tsv"] == []


SHARED_WORK = """
import sys
from accelerate import PartialState
import hf_kd_ranking as kd
from hf_kd_ranking import artifacts
from hf_kd_ranking.teachers import score

model, triples, queries, documents, folder = sys.argv[1:]
state = PartialState(cpu=True)
assert state.num_processes == 2
score.PAIRS_PER_BLOCK = 16
asked, writing = [], artifacts.writing
artifacts.writing = lambda path, mode="w": asked.append(path.name) or writing(path, mode)
stores = kd.TextStore.open(queries), kd.TextStore.open(documents)
counts = score.score_teacher(kd.load_teacher(model, device="cpu"), triples, *stores, f"{folder}/two.tsv")
with open(f"{folder}/{state.process_index}.txt", "w") as file:
    file.write(" ".join(name for name in asked if name.startswith("block")))
state.destroy_process_group()
"""


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_write_the_bytes_of_one(encoder, tokenizer, toy, tmp_path, monkeypatch, private_cache):
    monkeypatch.setattr(score, "PAIRS_PER_BLOCK", 16)
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path / "model")
    stores = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    with one_thread():  # sums are rounded otherwise by several
        teacher = load_teacher(str(tmp_path / "model"), device="cpu")
        kd.score_teacher(teacher, toy / "scores.tsv", *stores, tmp_path / "one.tsv")
    (tmp_path / "script.py").write_text(SHARED_WORK)
    arguments = [tmp_path / "script.py", tmp_path / "model", toy / "scores.tsv"]
    arguments += [*(store.folder for store in stores), tmp_path]
    run_ranks(arguments, tmp_path / "output", environment())
    assert (tmp_path / "two.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert not (tmp_path / "two.tsv.parts").exists()
    shares = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert min(map(len, shares)) >= 3
    assert not set(shares[0]) & set(shares[1])
