"""The two files of teacher rows, and texts for them."""

from pathlib import Path

import pytest
from teacher_files import FIRST, SECOND, write_rows

import hf_kd_ranking as kd


@pytest.fixture
def first(tmp_path) -> Path:
    return write_rows(tmp_path / "first.tsv", FIRST)


@pytest.fixture
def second(tmp_path) -> Path:
    return write_rows(tmp_path / "second.tsv", SECOND)


@pytest.fixture
def stores(tmp_path) -> tuple[kd.TextStore, kd.TextStore]:
    """Texts of all ids but query 2 and document 99."""
    queries = write_rows(tmp_path / "queries.tsv", [(1, "what is <b>kd</b>")])
    documents = write_rows(tmp_path / "documents.tsv", [(i, f"text of {i}") for i in (10, 11, 12, 20, 21, 22)])
    return kd.TextStore.from_tsv(queries), kd.TextStore.from_tsv(documents)
