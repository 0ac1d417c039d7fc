"""SPLADE: weights by hand, equal to masked language models of transformers, pruning, and what is refused."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

import hf_kd_ranking as kd

TINY = {"vocab_size": 39, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WIDE = TINY | {"max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0}
CONFIGS = {
    "bert": BertConfig(**WIDE, hidden_act="relu"),
    "distilbert": DistilBertConfig(
        vocab_size=39, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, initializer_range=0.5
    ),
    "roberta": RobertaConfig(**WIDE),
    "xlm-roberta": XLMRobertaConfig(**WIDE),
    "mpnet": MPNetConfig(**WIDE),
    "modernbert": ModernBertConfig(**TINY, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0),
}
LENGTHS = {"max_query_length": 8, "max_document_length": 16}
TEXTS = ["bread apple iron", "moon", "", "house of the king under the lake"]


def save_masked(config, tokenizer, folder) -> AutoModelForMaskedLM:
    torch.manual_seed(0)
    masked = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in masked.parameters():  # also biases and norms, which start as zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    masked.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return masked


@pytest.mark.parametrize("name", CONFIGS)
def test_head_is_that_of_the_masked_language_model(name, tokenizer, tmp_path):
    masked = save_masked(CONFIGS[name], tokenizer, tmp_path / "masked")
    ranker = kd.Ranker.from_pretrained(tmp_path / "masked", "splade", "cpu", **LENGTHS)
    assert ranker.model.config.expansion == "head" and not ranker.model.is_fresh
    batch = ranker.processor.pad(ranker.processor.documents(TEXTS))
    with torch.no_grad():
        logits = masked(**batch).logits * batch["attention_mask"].unsqueeze(-1)
    wanted = torch.log1p(logits.relu()).amax(1).numpy()
    assert 0.1 < (wanted > 0).mean() < 1
    np.testing.assert_allclose(ranker.encode_documents(TEXTS).toarray(), wanted, atol=2e-5)
    ranker.save_pretrained(tmp_path / "splade")
    again = kd.Ranker.from_pretrained(tmp_path / "splade", device="cpu").encode_documents(TEXTS)
    np.testing.assert_allclose(again.toarray(), wanted, atol=2e-5)


def test_heads_of_another_form_are_refused(tokenizer, encoder, tmp_path):
    electra = ElectraConfig(**TINY, embedding_size=8, max_position_embeddings=64)
    save_masked(electra, tokenizer, tmp_path / "electra")
    with pytest.raises(ValueError, match=r"the head of electra is not like that of bert, .*expansion='tied'"):
        kd.load_ranker(tmp_path / "electra", "splade", **LENGTHS)
    untied = BertConfig(**WIDE, tie_word_embeddings=False)
    save_masked(untied, tokenizer, tmp_path / "untied")
    with pytest.raises(ValueError, match="its decoder differs from its input embeddings"):
        kd.load_ranker(tmp_path / "untied", "splade", **LENGTHS)
    with pytest.raises(ValueError, match=r"no masked-language-model head .*missing or mismatched cls\.predictions"):
        kd.load_ranker(encoder, "splade", expansion="head", **LENGTHS)
    assert kd.load_ranker(encoder, "splade", **LENGTHS).config.expansion == "tied"
    assert kd.load_ranker(tmp_path / "electra", "splade", expansion="tied", **LENGTHS).is_fresh


def test_lexical_weights_are_those_of_the_own_tokens(encoder, tokenizer):
    model = kd.load_ranker(encoder, "splade", expansion="none", **LENGTHS)
    with torch.no_grad():
        model._term_weight.weight.copy_(torch.linspace(-1, 1, 16))
    ranker, text = kd.Ranker(model, tokenizer), "cat moon cat zebra"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model.bert_model(ids).last_hidden_state[0]
    logits = states.double() @ torch.linspace(-1, 1, 16).double() + 1
    wanted = np.zeros(39)
    for token, logit in list(zip(ids[0].tolist(), logits.tolist(), strict=True))[1:-1]:  # without [CLS] and [SEP]
        wanted[token] = max(wanted[token], np.log1p(max(logit, 0)))
    assert np.count_nonzero(wanted) >= 2
    for vectors in (ranker.encode_documents([text]), ranker.encode_queries([text, "iron violin"])[[0]]):
        np.testing.assert_allclose(vectors.toarray()[0], wanted, atol=1e-5)


def test_lexical_queries_take_the_logits_of_their_tokens(tokenizer, tmp_path):
    masked = save_masked(CONFIGS["bert"], tokenizer, tmp_path)
    ranker = kd.Ranker.from_pretrained(tmp_path, "splade", "cpu", query_encoding="lexical", **LENGTHS)
    ids = tokenizer("cat moon", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = masked(ids).logits[0]
    wanted = np.zeros(39)
    for place in (1, 2):
        wanted[ids[0, place]] = torch.log1p(logits[place, ids[0, place]].relu())
    np.testing.assert_allclose(ranker.encode_queries(["cat moon"]).toarray()[0], wanted, atol=1e-5)
    assert ranker.encode_documents(["cat moon"]).nnz > 2


def test_static_queries_are_a_weight_per_word(encoder, tokenizer):
    model = kd.load_ranker(encoder, "splade", query_encoding="static", **LENGTHS)
    assert model.is_fresh and model.config.special_token_ids == [0, 2, 3, 4]
    with torch.no_grad():
        model._query_weights.weight.copy_(torch.linspace(-2, 2, 39).unsqueeze(1))
    ranker = kd.Ranker(model, tokenizer)
    model.bert_model.forward = None  # the encoder does not run
    found = ranker.encode_queries(["moon cat moon", "apple", ""]).toarray()
    wanted = np.zeros((3, 39))
    for row, words in enumerate((["moon", "cat"], ["apple"], [])):
        for word in tokenizer.convert_tokens_to_ids(words):
            wanted[row, word] = np.linspace(-2, 2, 39)[word]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_static_queries_start_from_idf(encoder):
    model = kd.load_ranker(encoder, "splade", query_encoding="static", **LENGTHS)
    frequencies = torch.zeros(39)
    frequencies[7], frequencies[9] = 1, 9
    model.start_from_idf(frequencies, documents=9)
    weights = model._query_weights.weight.squeeze(1).tolist()
    rare, common = math.log(1 + 8.5 / 1.5), math.log(1 + 0.5 / 9.5)
    mean = (rare + common) / 2
    assert weights[7] == pytest.approx(rare / mean)
    assert weights[9] == pytest.approx(common / mean)
    assert weights[8] == pytest.approx(math.log(1 + 9.5 / 0.5) / mean)  # in no document
    with pytest.raises(ValueError, match="None of 9 documents has a word"):  # a mean of nothing is not a number
        model.start_from_idf(torch.zeros(39), documents=9)
    assert model._query_weights.weight.isfinite().all()
    with pytest.raises(ValueError, match="Only static queries have weights to start, got query_encoding='model'"):
        kd.load_ranker(encoder, "splade", **LENGTHS).start_from_idf(frequencies, documents=9)


def test_pruning_keeps_the_largest_weights_in_evaluation_only(tokenizer, tmp_path):
    save_masked(CONFIGS["bert"], tokenizer, tmp_path)
    ranker = kd.Ranker.from_pretrained(tmp_path, "splade", "cpu", **LENGTHS)
    full = ranker.encode_documents(TEXTS).toarray()
    model = ranker.model
    model.config.document_top_k = 5
    pruned = ranker.encode_documents(TEXTS).toarray()
    for row, weights in enumerate(full):
        largest = np.argsort(-weights)[:5]
        assert set(np.flatnonzero(pruned[row])) == set(largest[weights[largest] > 0])
        np.testing.assert_allclose(pruned[row, largest], weights[largest], atol=1e-6)
    np.testing.assert_allclose(ranker.encode_queries(TEXTS[:3]).toarray(), full[:3], atol=1e-6)
    model.config.document_top_k, model.config.threshold = None, float(np.median(full[full > 0]))
    np.testing.assert_allclose(
        ranker.encode_documents(TEXTS).toarray(), np.where(full > model.config.threshold, full, 0), atol=1e-6
    )
    model.train().bert_model.eval()  # without dropout
    batch = ranker.processor.pad(ranker.processor.documents(TEXTS))
    np.testing.assert_allclose(model(document=batch).document_vectors.detach().numpy(), full, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"document_top_k": 0}, "document_top_k must be at least 1, or None for no limit, got 0"),
        ({"query_top_k": -1}, "query_top_k must be at least 1"),
        ({"threshold": -0.5}, "threshold must be a number of 0 or more, got -0.5"),
        ({"threshold": float("nan")}, "threshold must be a number of 0 or more, got nan"),
    ],
)
def test_bad_fields_are_refused(encoder, fields, message):
    with pytest.raises(ValueError, match=message):
        kd.load_ranker(encoder, "splade", **fields, **LENGTHS)


def test_new_words_get_the_mean_weight(encoder, tokenizer):
    model = kd.load_ranker(encoder, "splade", query_encoding="static", **LENGTHS)
    with torch.no_grad():
        model._query_weights.weight.copy_(torch.arange(39.0).unsqueeze(1))
    model.resize_token_embeddings(41)
    assert model.config.encoder_config.vocab_size == 41
    ranker = kd.Ranker(model, tokenizer)
    assert ranker.encode_queries(["cat"]).shape == ranker.encode_documents(["cat"]).shape == (1, 41)
    assert model._query_weights.weight[39:].flatten().tolist() == [19.0, 19.0]
    assert AutoConfig.for_model("Splade").vectors_per_text == "sparse"


def test_encoded_texts_are_a_sparse_matrix(encoder, tokenizer):
    ranker = kd.Ranker(kd.load_ranker(encoder, "splade", expansion="none", **LENGTHS), tokenizer, batch_size=2)
    vectors = ranker.encode_documents(TEXTS)
    assert (vectors.format, vectors.dtype, vectors.shape) == ("csr", np.float32, (4, 39))
    scores = ranker.score("king of bread", TEXTS)
    query = ranker.encode_queries(["king of bread"])
    np.testing.assert_allclose((vectors @ query.T).toarray()[:, 0], scores, atol=1e-5)
