"""Texts in, scores out: the same numbers as the model called by hand, whatever the batches."""

import random
import threading

import numpy as np
import pytest
import torch
from scipy.sparse import issparse
from transformers import AutoTokenizer, pipeline
from warm_processes import run_ranks

import hf_kd_ranking as kd
from hf_kd_ranking import batches, inference
from hf_kd_ranking.ranker import default_dtype
from hf_kd_ranking.retrieval.stored_reranker import score_stored

WORDS = "apple bread cat dog earth fire glass house iron jam king lake moon night".split()


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer, batch_size=3)


def dot_ranker(encoder, tokenizer, **settings) -> kd.Ranker:
    torch.manual_seed(1)
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16, **settings)
    return kd.Ranker(model, tokenizer, batch_size=3)


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Queries and documents of mixed lengths, some of them several times."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2 * count // 3)]
    return rng.choices([text[:20] for text in texts], k=count), rng.choices(texts, k=count)


@torch.no_grad()
def scores_one_by_one(ranker: kd.Ranker, queries: list[str], documents: list[str]) -> list[float]:
    """By hand: no padding, no batch, no block."""
    model, config, scores = ranker.model, ranker.model.config, []
    for query, document in zip(queries, documents, strict=True):
        if isinstance(model, kd.BertCat):
            longest = config.max_query_length + config.max_document_length
            output = model(**cut(ranker, longest, [query], [document]))
        else:
            sides = {"query": with_masks(ranker, cut(ranker, config.max_query_length, [query]))}
            output = model(**sides, document=cut(ranker, config.max_document_length, [document]))
        scores.append(output.scores.item())
    return scores


def cut(ranker: kd.Ranker, longest: int, *texts: list[str]) -> dict[str, torch.Tensor]:
    special = not isinstance(ranker.model, kd.TK)
    return dict(
        ranker.tokenizer(*texts, truncation=True, max_length=longest, return_tensors="pt", add_special_tokens=special)
    )


def with_masks(ranker: kd.Ranker, query: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ColBERT and PreTTR read eight attended [MASK] after a query."""
    if not isinstance(ranker.model, kd.ColBERT | kd.PreTTR):
        return query
    values = {"input_ids": ranker.tokenizer.mask_token_id, "attention_mask": 1, "token_type_ids": 0}
    return {name: torch.cat([ids, torch.full((1, 8), values[name])], 1) for name, ids in query.items()}


def test_scores_equal_the_model_called_by_hand_one_by_one(ranker):
    queries, documents = pairs(20)
    scores = ranker.score(queries, documents)
    assert scores.dtype == np.float32
    assert scores.std() > 0.1, "scores too alike to tell a change"
    np.testing.assert_allclose(scores, scores_one_by_one(ranker, queries, documents), rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_batch_block_or_order(ranker, monkeypatch):
    queries, documents = pairs(40)
    wanted = ranker.score(queries, documents)
    monkeypatch.setattr("hf_kd_ranking.batches.TOKENIZED_AT_ONCE", 16)
    ranker.batch_size = 5
    order = random.Random(1).sample(range(40), 40)
    shuffled = ranker.score([queries[i] for i in order], [documents[i] for i in order])
    np.testing.assert_allclose(shuffled, wanted[order], rtol=1e-5, atol=1e-5)


def test_a_single_query_is_scored_with_every_document(ranker):
    documents = ["night", "house of the king", "moon moon"]
    np.testing.assert_allclose(ranker.score("moon", documents), ranker.score(["moon"] * 3, documents), atol=1e-6)


def test_lengths_and_prefixes_come_from_the_config(ranker, tmp_path):
    ranker.save_pretrained(tmp_path)
    settings = {"max_query_length": 3, "max_document_length": 4, "query_prefix": "earth ", "document_prefix": "fire "}
    short = kd.Ranker.from_pretrained(tmp_path, **settings)
    read_as = ("earth", "fire bread")  # [CLS] and [SEP] count
    config = short.model.config
    # One budget of 7 tokens, three of them special; the longest text is cut first.
    if config.joins_texts and config.passage_length is None:
        read_as = ("earth apple", "fire bread")
    elif not config.adds_special_tokens:
        read_as = ("earth apple jam", "fire bread cat dog")
    got = short.score(["apple jam lake"], ["bread cat dog"])
    query, document = read_as
    assert got == pytest.approx(kd.Ranker.from_pretrained(tmp_path).score([query], [document]), abs=1e-5)


def test_saved_ranker_scores_the_same(ranker, tmp_path):
    queries, documents = pairs(9)
    ranker.save_pretrained(tmp_path)
    again = kd.Ranker.from_pretrained(tmp_path, device="cpu", batch_size=3)
    assert type(again.model) is type(ranker.model)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == ranker.tokenizer.get_vocab()
    np.testing.assert_allclose(again.score(queries, documents), ranker.score(queries, documents), atol=1e-6)


def test_scoring_during_training_has_no_dropout(ranker):
    queries, documents = pairs(6)
    wanted = ranker.score(queries, documents)
    ranker.model.train()
    np.testing.assert_allclose(ranker.score(queries, documents), wanted, atol=1e-6)
    assert ranker.model.training


def test_rerank_sorts_by_score_and_keeps_the_order_of_ties(ranker, monkeypatch):
    # Long enough for sorting algorithms that do not keep it: numpy's sorts few numbers by insertion.
    monkeypatch.setattr(ranker, "score", lambda query, documents: np.array([1.0, 3.0, 2.0] * 30))
    wanted = [(i, score) for score, first in ((3.0, 1), (2.0, 2), (1.0, 0)) for i in range(first, 90, 3)]
    assert ranker.rerank("moon", ["a"] * 90) == wanted
    assert ranker.rerank("moon", ["a"] * 90, top_k=2) == [(1, 3.0), (4, 3.0)]


def test_rerank_returns_indices_and_scores(ranker):
    documents = ["night", "house of the king", "moon moon", "violin"]
    scores, ranking = ranker.score("moon", documents), ranker.rerank("moon", documents)
    assert [index for index, _ in ranking] == sorted(range(4), key=lambda i: -scores[i])
    assert [score for _, score in ranking] == pytest.approx([scores[index] for index, _ in ranking], abs=1e-5)


@pytest.mark.parametrize("width", [16, 6])
def test_dot_product_of_encoded_texts_is_the_score(encoder, tokenizer, width):
    ranker = dot_ranker(encoder, tokenizer, compression_dim=None if width == 16 else width)
    queries, documents = pairs(10)
    vectors = ranker.encode_queries(queries), ranker.encode_documents(documents)
    assert [side.shape for side in vectors] == [(10, width)] * 2
    wanted = (vectors[0] * vectors[1]).sum(1)
    np.testing.assert_allclose(ranker.score(queries, documents), wanted, rtol=1e-5, atol=1e-5)
    one_by_one = scores_one_by_one(ranker, queries, documents)
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-5, atol=1e-5)


def test_ranker_that_joins_texts_has_no_vectors(encoder, tokenizer):
    model = kd.BertCat.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    with pytest.raises(ValueError, match="BertCat reads query and document as one sequence and has no vectors"):
        kd.Ranker(model, tokenizer).encode_documents(["moon"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_encoded_in_advance_score_as_their_texts(ranker, dtype):
    if not ranker.model.config.is_storable:
        pytest.skip("its vectors are not stored")
    ranker.model.to(dtype)
    documents = pairs(9)[1]
    query, stored = ranker.encode_queries(["king moon"])[0], ranker.encode_documents(documents)
    scores = score_stored(ranker.model, query, stored, batch_size=4)
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    assert scores.dtype == np.float32
    assert np.allclose(scores, ranker.score("king moon", documents), **tolerance)


def test_numbers_of_queries_and_documents_must_agree(ranker):
    with pytest.raises(ValueError, match=r"one document per query, got 2 and 3"):
        ranker.score(["moon", "lake"], ["night", "king", "jam"])


@pytest.mark.parametrize("texts", ["apple", b"apple", [None], ["apple", 3.0], [["apple"]]])
def test_texts_must_be_a_list_of_strings(encoder, tokenizer, texts):
    ranker = dot_ranker(encoder, tokenizer)
    for call in (
        lambda: ranker.encode_documents(texts),
        lambda: ranker.encode_queries(texts),
        lambda: ranker.score("moon", texts),
        lambda: ranker.score(["moon"] * len(texts), texts),
        lambda: ranker.rerank("moon", texts),
    ):
        with pytest.raises(TypeError, match=r"Needed (a list of|strings as) (documents|queries|texts), got"):
            call()


def test_padding_is_on_the_right_whatever_the_tokenizer_says(model, tokenizer, tmp_path):
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path)
    documents = ["jam", "king moon " * 6, "a"]
    wanted = [kd.Ranker(model, tokenizer).score(["moon"], [document])[0] for document in documents]
    assert np.std(wanted) > 0.01
    left = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    left.save_pretrained(tmp_path)
    ranker = kd.Ranker.from_pretrained(tmp_path, device="cpu")
    for padded in (ranker, kd.Ranker(model, left)):
        np.testing.assert_allclose(padded.score("moon", documents), wanted, rtol=1e-4, atol=1e-4)
    ranking = pipeline("text-ranking", model=model, tokenizer=left)({"query": "moon", "documents": documents})
    found = {item["index"]: item["score"] for item in ranking}
    np.testing.assert_allclose([found[row] for row in range(3)], wanted, rtol=1e-4, atol=1e-4)
    ranker.save_pretrained(tmp_path / "again")  # for other libraries
    assert AutoTokenizer.from_pretrained(tmp_path / "again").padding_side == "right"


def test_new_ranker_on_an_encoder_says_so(encoder, caplog):
    kd.Ranker.from_pretrained(encoder, "bert_dot", max_document_length=16)  # the encoder's own vectors
    assert not caplog.records
    kd.Ranker.from_pretrained(encoder, "bert_cat", max_document_length=16)
    assert "The bert_cat on the encoder of" in caplog.text


def test_nothing_to_score_or_to_encode_is_an_error(ranker, encoder, tokenizer):
    with pytest.raises(ValueError, match="Scoring or encoding needs at least one text, got none"):
        ranker.score([], [])
    with pytest.raises(ValueError, match="Scoring or encoding needs at least one text, got none"):
        dot_ranker(encoder, tokenizer).encode_queries([])


def test_score_that_is_not_finite_names_the_pair(ranker):
    with torch.no_grad():
        ranker.model.get_input_embeddings().weight[ranker.tokenizer.vocab["violin"]] = torch.inf
    pair = r"1 is nan \(query 'lake'\)"
    if ranker.model.config.vectors_per_text == "sparse":  # the embeddings are the decoder of every text
        pair = r"0 is nan \(query 'moon'\)"
    with pytest.raises(ValueError, match=rf"score of pair {pair}.*torch\.float32.*try float32"):
        ranker.score(["moon", "lake"], ["night", "violin"])


def test_tokenizer_with_too_many_tokens_is_refused(model, tokenizer):
    model.resize_token_embeddings(len(tokenizer) - 1)
    with pytest.raises(ValueError, match=rf"tokenizer has {len(tokenizer)} tokens.*for {len(tokenizer) - 1}"):
        kd.Ranker(model, tokenizer)


def test_only_long_work_shows_progress(ranker, monkeypatch, capsys):
    monkeypatch.setattr("hf_kd_ranking.inference.PROGRESS_FROM", 3)
    ranker.score("moon", ["night"] * 2)
    assert capsys.readouterr().err == ""
    ranker.score("moon", ["night"] * 3)
    assert "Scoring" in capsys.readouterr().err


SHARED_WORK = """
import sys
import numpy as np
import hf_kd_ranking as kd
from accelerate import PartialState

ranker = kd.Ranker.from_pretrained(sys.argv[1], device="cpu", batch_size=2)
ranker.is_distributed = True
state = PartialState(cpu=True)
assert state.num_processes == 2
documents = ["night", "house of the king", "moon moon", "violin", "jam"]
found = {"five": ranker.score("moon", documents), "one": ranker.score("moon", documents[:1])}
found["vectors"] = ranker.encode_documents(documents)
np.savez(f"{sys.argv[2]}/{state.process_index}.npz", **found)
state.destroy_process_group()
"""


def test_two_processes_share_the_work_and_get_all_results(encoder, tokenizer, tmp_path):
    ranker = dot_ranker(encoder, tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SHARED_WORK)
    run_ranks([tmp_path / "script.py", tmp_path / "model", tmp_path], tmp_path / "output", {})
    documents = ["night", "house of the king", "moon moon", "violin", "jam"]
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(found["five"], ranker.score("moon", documents), atol=1e-5)
        np.testing.assert_allclose(found["one"], ranker.score("moon", documents[:1]), atol=1e-5)
        np.testing.assert_allclose(found["vectors"], ranker.encode_documents(documents), atol=1e-5)


@pytest.mark.parametrize("model", ["bert_cat", "bert_dot"], indirect=True)
def test_reranking_no_documents_gives_none(model, tokenizer):
    assert kd.Ranker(model, tokenizer).rerank("cat", []) == []


# ---- Batches and threads --------------------------------------------------------------------------------------------


@pytest.fixture
def shapes(ranker) -> list[tuple[int, int]]:
    """Rows of each batch that the model reads, and its width, that of both sides together."""
    found = []

    def note(module, args, kwargs) -> None:
        sides = [kwargs] if "input_ids" in kwargs else list(kwargs.values())
        widths = [side["input_ids"].shape[1] for side in sides]
        found.append((len(sides[0]["input_ids"]), sum(widths)))

    ranker.model.register_forward_pre_hook(note, with_kwargs=True)
    return found


def test_batches_prepared_in_a_thread_change_no_bit(ranker, monkeypatch):
    monkeypatch.setattr(batches, "TOKENIZED_AT_ONCE", 8)
    queries, documents = pairs(40)
    scores = ranker.score(queries, documents)
    is_storable = ranker.model.config.is_storable
    vectors = list(ranker.encode_queries(queries)) if is_storable else []
    monkeypatch.setattr(batches, "_ahead", lambda batches: batches)
    assert np.array_equal(ranker.score(queries, documents), scores)
    for one, other in zip(ranker.encode_queries(queries) if is_storable else [], vectors, strict=True):
        if issparse(one):
            one, other = one.toarray(), other.toarray()
        assert np.array_equal(one, other)


@pytest.mark.parametrize("model", ["bert_cat", "bert_dot", "colbert", "prettr"], indirect=True)
def test_texts_are_tokenised_in_another_thread(ranker, monkeypatch):
    threads = set()
    encode = type(ranker.processor).encode

    def note(processor, *args, **settings):
        threads.add(threading.current_thread())
        return encode(processor, *args, **settings)

    monkeypatch.setattr(type(ranker.processor), "encode", note)
    ranker.score(*pairs(20))
    assert threading.current_thread() not in threads and len(threads) in (1, 2)  # queries, then documents
    assert not any(thread.is_alive() for thread in threads)
    threads.clear()
    ranker.score("moon", ["night", "jam"])  # one batch, which nothing could overlap
    assert threads == {threading.current_thread()}


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
@pytest.mark.parametrize("where", ["tokenizer", "model"])
def test_error_of_either_thread_is_raised_and_ends_the_other(ranker, monkeypatch, where):
    monkeypatch.setattr(batches, "TOKENIZED_AT_ONCE", 3)
    calls, before = [], threading.active_count()

    def fail(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **settings)

    if where == "tokenizer":
        original = type(ranker.processor)._tokenize
        monkeypatch.setattr(type(ranker.processor), "_tokenize", lambda *args, **settings: fail(*args, **settings))
    else:
        original = ranker.model.forward
        monkeypatch.setattr(ranker.model, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        ranker.score("moon", [f"{text} {number}" for number, text in enumerate(pairs(90)[1])])
    assert threading.active_count() <= before  # threads of earlier tests may have ended since
    assert len(calls) <= 3 + batches.BATCHES_AHEAD + 1, "went on with the work"


def test_each_distinct_text_is_encoded_once(ranker, shapes):
    queries, documents = pairs(60)
    ranker.score(queries, documents)
    if not ranker.model.config.is_storable or ranker.processor.joins_texts:
        assert sum(rows for rows, _ in shapes) == 60
        return
    assert len(set(documents)) < 50, "no document appears twice"
    assert sum(rows for rows, _ in shapes) == len(set(queries)) + len(set(documents))


@pytest.mark.parametrize("model", ["bert_dot", "colbert", "prettr", "tk"], indirect=True)
def test_queries_beyond_the_memory_bound_are_scored_in_turn(ranker, shapes, monkeypatch):
    queries, documents = pairs(40)
    wanted = ranker.score(queries, documents)
    shapes.clear()
    monkeypatch.setattr(inference, "QUERY_BYTES", 1)
    monkeypatch.setattr(inference, "QUERIES_AT_ONCE", 10)
    np.testing.assert_allclose(ranker.score(queries, documents), wanted, rtol=1e-5, atol=1e-5)
    distinct = list(dict.fromkeys(queries))
    assert len(distinct) > 10
    assert sum(rows for rows, _ in shapes) > len(distinct) + len(set(documents)), "one pass"


def test_batches_hold_as_many_padded_tokens_as_allowed(ranker, shapes):
    queries, documents = pairs(40)
    wanted = ranker.score(queries, documents)
    shapes.clear()
    ranker.tokens_per_batch = 60
    np.testing.assert_allclose(ranker.score(queries, documents), wanted, rtol=1e-5, atol=1e-5)
    assert 48 < max(rows * width for rows, width in shapes) <= 60
    assert len({rows for rows, _ in shapes}) > 1
    ranker.tokens_per_batch = 1  # less than a text has
    np.testing.assert_allclose(ranker.score(queries[:9], documents[:9]), wanted[:9], rtol=1e-5, atol=1e-5)


def test_size_of_batches_is_checked(encoder, tokenizer):
    model = dot_ranker(encoder, tokenizer).model
    for setting in ({"batch_size": 0}, {"tokens_per_batch": 0}, {"tokens_per_batch": 2.5}):
        name, value = next(iter(setting.items()))
        with pytest.raises(ValueError, match=f"{name} is an integer from 1, got {value}"):
            kd.Ranker(model, tokenizer, **setting)


def test_precision_is_bfloat16_on_gpus_that_compute_in_it(encoder, monkeypatch):
    assert default_dtype("cpu") == torch.float32
    for is_supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, value=is_supported: value)
        assert default_dtype("cuda:1") == dtype
        assert default_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr("hf_kd_ranking.ranker.default_dtype", lambda device: torch.bfloat16)
    settings = {"architecture": "bert_dot", "device": "cpu", "max_document_length": 16}
    assert kd.Ranker.from_pretrained(encoder, **settings).model.dtype == torch.bfloat16
    assert kd.Ranker.from_pretrained(encoder, dtype="float32", **settings).model.dtype == torch.float32
