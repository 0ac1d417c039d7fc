"""A collection with difficult ids, a ranker with a store of its vectors, and ways to damage or interrupt files."""

from collections.abc import Callable
from pathlib import Path

import pytest

import hf_kd_ranking as kd


@pytest.fixture
def make_texts(tmp_path) -> Callable[..., kd.TextStore]:
    """make_texts((doc_id, text), ...): a store of texts."""

    def make(*rows: tuple[str, str]) -> kd.TextStore:
        path = tmp_path / f"texts{len(rows)}.tsv"
        path.write_text("".join(f"{doc_id}\t{text}\n" for doc_id, text in rows), encoding="utf-8")
        return kd.TextStore.from_tsv(path)

    return make


@pytest.fixture
def documents(toy, make_texts) -> kd.TextStore:
    """The toy documents; ids have blanks and non-ASCII letters, one appears twice, and two have the same text."""
    texts = kd.TextStore.from_tsv(toy / "collection.tsv").texts.to_pylist()
    rows = [(f"d ü {i}", text) for i, text in enumerate(texts)]
    return make_texts(*rows, rows[3], ("文書 same as 5", texts[5]))


@pytest.fixture
def queries(toy) -> dict[str, str]:
    return dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer, batch_size=7)


@pytest.fixture
def store(ranker, documents, tmp_path) -> kd.VectorStore:
    return kd.VectorStore.build(ranker, documents, tmp_path / "store")


@pytest.fixture
def other_ranker(encoder, tokenizer) -> kd.Ranker:
    """A BERT_DOT with other settings than `model`."""
    return kd.Ranker(kd.BertDot.from_encoder(encoder, pooling="mean", max_document_length=16), tokenizer)


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Change a byte in the middle of a file."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


@pytest.fixture
def stop_at_write(monkeypatch) -> Callable[[int], list]:
    """Raise KeyboardInterrupt instead of giving the n-th complete file its name; 0 stops none."""

    def arm(stop_at: int) -> list:
        names = []

        def put(temporary: Path, path: Path) -> None:
            names.append(path.name)
            if len(names) == stop_at:
                raise KeyboardInterrupt
            temporary.replace(path)

        monkeypatch.setattr("hf_kd_ranking.artifacts._put_in_place", put)
        return names

    return arm
