"""A small engine for searching."""

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.searcher import Pipeline
from hf_kd_ranking.serving.search import SearchEngine

HOSTILE = "apple bread <script>window.ran = 1</script> <img src=x onerror='window.ran = 1'> & \"king\""


@pytest.fixture
def hostile() -> str:
    """A passage that would run if it were read as markup."""
    return HOSTILE


@pytest.fixture
def documents(toy, tmp_path) -> kd.TextStore:
    """The toy documents, and one whose text and id are markup."""
    rows = (toy / "collection.tsv").read_text() + f"<b>41</b>\t{HOSTILE}\n"
    (tmp_path / "documents.tsv").write_text(rows)
    return kd.TextStore.from_tsv(tmp_path / "documents.tsv")


@pytest.fixture
def bm25(documents) -> kd.BM25Index:
    return kd.BM25Index.build(documents)


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer)


@pytest.fixture
def engine(documents, bm25, ranker) -> SearchEngine:
    """Re-ranks BM25's candidates from their texts."""
    return SearchEngine(Pipeline(documents, bm25, ranker, depth=20))
