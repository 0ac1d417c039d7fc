"""A collection whose ids are hard to keep."""

from collections.abc import Callable
from pathlib import Path

import pytest

import hf_kd_ranking as kd


@pytest.fixture
def documents(toy, tmp_path) -> kd.TextStore:
    """The toy documents under ids with blanks and letters beyond ASCII; one stands twice, two have the same text."""
    texts = list(kd.TextStore.from_tsv(toy / "collection.tsv").texts.to_pylist())
    rows = [(f"d ü {i}", text) for i, text in enumerate(texts)]
    rows += [rows[3], ("文書 same as 5", texts[5])]
    path = tmp_path / "documents.tsv"
    path.write_text("".join(f"{i}\t{text}\n" for i, text in rows), encoding="utf-8")
    return kd.TextStore.from_tsv(path)


@pytest.fixture
def queries(toy) -> dict[str, str]:
    return dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer, batch_size=7)


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Change a byte in the middle of a file."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change
