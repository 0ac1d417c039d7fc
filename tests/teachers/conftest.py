"""The two files of teacher rows, and texts for them; a server that is a teacher."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint_server import Server
from teacher_files import FIRST, SECOND, write_rows

import hf_kd_ranking as kd
from hf_kd_ranking.teachers import endpoint as endpoints


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


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The pauses that were asked for, none of which is made."""
    pauses: list[float] = []
    monkeypatch.setattr(endpoints.time, "sleep", lambda seconds: seconds and pauses.append(seconds))
    return pauses
