"""Four threads that share rankers, text stores and indexes compute the same as one."""

import random

import pytest
from conftest import ARCHITECTURES, WORDS, make_model

import hf_kd_ranking as kd


@pytest.fixture
def texts() -> list[str]:
    """Longer than the 8 tokens of a query and the 16 of a document."""
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=40)) for _ in range(6)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rankers_that_share_a_tokenizer_cut_texts_at_their_own_lengths(name, encoder, tokenizer, texts, check_threads):
    ranker = kd.Ranker(make_model(name, encoder), tokenizer)
    other = kd.Ranker(make_model("bert_cat", encoder), tokenizer)
    calls = [lambda: ranker.score(texts[0], texts), lambda: other.score(texts[1], texts)]
    if ranker.model.config.is_storable:
        calls += [lambda: ranker.encode_queries(texts), lambda: ranker.encode_documents(texts)]
    check_threads(calls)


def test_dropout_is_off_until_the_last_thread_has_ended(encoder, tokenizer, texts, check_threads):
    ranker = kd.Ranker(make_model("bert_dot", encoder), tokenizer)
    ranker.model.train()
    check_threads([lambda: ranker.score(texts[0], texts), lambda: ranker.encode_queries(texts[:1])])
    assert ranker.model.training


def test_texts_and_searches(toy, encoder, tokenizer, tmp_path, check_threads):
    documents = kd.TextStore.from_tsv(toy / "collection.tsv")
    queries = dict(kd.TextStore.from_tsv(toy / "queries.tsv").items())
    ranker = kd.Ranker(make_model("bert_dot", encoder), tokenizer)
    bm25 = kd.BM25Index.build(documents)
    dense = kd.DenseIndex.build(kd.VectorStore.build(ranker, documents, tmp_path / "vectors"))
    calls = [lambda: documents[[3, "17", 0]], lambda: documents[list(range(40))]]
    calls += [lambda: bm25.search(queries, 5).values(), lambda: dense.search(queries, 5).values()]
    check_threads(calls)


def test_a_store_is_built_by_every_thread(toy, tmp_path, check_threads):
    """All build one folder."""
    wanted = [line.split("\t")[1] for line in (toy / "collection.tsv").read_text().splitlines()]
    folder = tmp_path / "store"
    check_threads([lambda: kd.TextStore.from_tsv(toy / "collection.tsv", folder)[list(range(40))]], [wanted])
