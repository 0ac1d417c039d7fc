"""The "text-ranking" pipeline, and sentence-transformers on a saved checkpoint."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import pipeline

import hf_kd_ranking as kd
from hf_kd_ranking.models import RankingOutput
from hf_kd_ranking.models.pipeline import DOCUMENTS_PER_FORWARD

QUERY = "what is bread"
DOCUMENTS = ["house of the king under the lake", "", "bread", "moon", "bread apple iron", "violin tree water"]
ONE = {"query": QUERY, "documents": DOCUMENTS}
OTHER = {"query": "moon", "documents": ["night", "yellow zebra and violin"]}


@pytest.fixture
def ranker(model, tokenizer) -> kd.Ranker:
    return kd.Ranker(model, tokenizer)


@pytest.fixture
def folder(ranker, tmp_path) -> Path:
    """A saved checkpoint of each architecture."""
    ranker.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def ranking(encoder, tokenizer):
    """A pipeline where one architecture is enough."""
    torch.manual_seed(1)
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    return pipeline("text-ranking", model=model, tokenizer=tokenizer)


def assert_ranked(answer: list[dict], wanted: list[tuple[int, float]], documents: list[str]) -> None:
    assert [item["index"] for item in answer] == [index for index, _ in wanted]
    assert [item["score"] for item in answer] == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert [item["document"] for item in answer] == [documents[index] for index, _ in wanted]


def test_ranking_is_that_of_rerank(ranker, folder):
    rank = pipeline("text-ranking", model=str(folder))
    assert type(rank.model) is type(ranker.model)
    wanted = ranker.rerank(QUERY, DOCUMENTS)
    assert wanted[0][1] - wanted[-1][1] > 0.01, "scores too alike to tell a change"
    assert_ranked(rank(ONE), wanted, DOCUMENTS)


def test_list_of_inputs_returns_a_list_of_rankings(ranker, folder):
    rank = pipeline("text-ranking", model=str(folder))
    answers = rank([ONE, OTHER])
    assert len(answers) == 2
    for inputs, answer in zip([ONE, OTHER], answers, strict=True):
        assert_ranked(answer, ranker.rerank(inputs["query"], inputs["documents"]), inputs["documents"])
    [alone] = rank([OTHER])
    assert alone == answers[1]


def test_many_documents_keep_their_places(ranker, folder):
    words = "apple bread cat dog earth fire glass house iron jam king lake moon".split()
    documents = [
        " ".join(words[: 1 + i % 13][i % 5 :]) + f" {words[i % 7]}" for i in range(2 * DOCUMENTS_PER_FORWARD + 3)
    ]
    answer = pipeline("text-ranking", model=str(folder))({"query": QUERY, "documents": documents})
    assert sorted(item["index"] for item in answer) == list(range(len(documents)))
    scores = ranker.score(QUERY, documents)
    for item in answer:
        assert item["score"] == pytest.approx(scores[item["index"]], abs=1e-5)
        assert item["document"] == documents[item["index"]]
    assert [item["score"] for item in answer] == sorted((item["score"] for item in answer), reverse=True)


def test_forward_pass_has_a_limit_of_documents(ranking):
    sizes = []
    ranking.model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(inputs["document"]["input_ids"].shape[1]), with_kwargs=True
    )
    ranking({"query": QUERY, "documents": ["moon"] * (2 * DOCUMENTS_PER_FORWARD + 1)})
    assert sizes == [DOCUMENTS_PER_FORWARD, DOCUMENTS_PER_FORWARD, 1]


def test_top_k_keeps_the_best(ranking):
    whole = ranking(ONE)
    assert len(whole) == len(DOCUMENTS)
    assert ranking(ONE, top_k=2) == whole[:2]
    assert ranking(ONE, top_k=99) == ranking(ONE, top_k=None) == whole
    assert [len(answer) for answer in ranking([ONE, OTHER], top_k=3)] == [3, 2]


def test_ties_keep_the_order_given(ranking):
    # Of different length, so that they do not pass the model in the order given. Rounded, because equal texts may
    # differ in the last bit.
    documents = ["bread", "moon  ", "bread ", "bread   ", "moon", " bread"] * 20
    ranking.model.register_forward_hook(lambda *args: RankingOutput(scores=args[-1].scores.round(decimals=2)))
    answer = ranking({"query": QUERY, "documents": documents})
    bread, moon = ([i for i, text in enumerate(documents) if text.strip() == word] for word in ("bread", "moon"))
    assert [item["index"] for item in answer] in (bread + moon, moon + bread)


def test_document_scores_do_not_depend_on_the_others(ranking):
    alone = {text: ranking({"query": QUERY, "documents": [text]})[0]["score"] for text in DOCUMENTS}
    for item in ranking(ONE):
        assert item["score"] == pytest.approx(alone[item["document"]], abs=1e-5)


BAD = {
    "no documents": {"query": QUERY, "documents": []},
    "documents missing": {"query": QUERY},
    "query missing": {"documents": DOCUMENTS},
    "query not a string": {"query": ["bread"], "documents": DOCUMENTS},
    "not a dict": "what is bread",
    "a pair": (QUERY, DOCUMENTS),
    "a number among documents": {"query": QUERY, "documents": ["moon", 3]},
    "dicts as documents": {"query": QUERY, "documents": [{"text": "moon"}]},
}


@pytest.mark.parametrize("inputs", BAD.values(), ids=BAD.keys())
def test_bad_inputs_are_refused(ranking, inputs):
    with pytest.raises(ValueError, match=r"^text-ranking takes (\{\"query\"|one or more documents)") as error:
        ranking(inputs)
    assert "\n" not in str(error.value)


def test_bad_input_among_good_ones_is_refused(ranking):
    with pytest.raises(ValueError, match=r"takes one or more documents, each a string, got \[None\]"):
        ranking([ONE, {"query": QUERY, "documents": [None]}])


def test_documents_may_come_as_any_sequence(ranking):
    wanted = ranking(ONE)
    assert ranking({"query": QUERY, "documents": tuple(DOCUMENTS)}) == wanted
    assert ranking({"query": QUERY, "documents": iter(DOCUMENTS)}) == wanted


def test_without_truncation_a_long_text_is_an_error(ranker, folder):
    longest = ranker.model.config.max_query_length + ranker.model.config.max_document_length
    inputs = {"query": QUERY, "documents": ["moon", "lake " * longest]}
    rank = pipeline("text-ranking", model=str(folder))
    assert_ranked(rank(inputs), ranker.rerank(QUERY, inputs["documents"]), inputs["documents"])  # cut by default
    with pytest.raises(ValueError, match=r"Text 1 has \d+ tokens, the limit is \d+, and truncation is off"):
        rank(inputs, truncation=False)


def test_lengths_and_prefixes_are_the_checkpoints(encoder, tokenizer, tmp_path):
    lengths = {"max_query_length": 4, "max_document_length": 5}
    prefixes = {"query_prefix": "earth ", "document_prefix": "fire "}
    model = kd.BertDot.from_encoder(str(encoder), **lengths, **prefixes)
    kd.Ranker(model, tokenizer).save_pretrained(tmp_path)
    [item] = pipeline("text-ranking", model=str(tmp_path))({"query": "jam lake", "documents": ["bread cat dog"]})
    model.config.query_prefix = model.config.document_prefix = ""
    assert item["score"] == pytest.approx(kd.Ranker(model, tokenizer).score("earth jam", ["fire bread cat"])[0])


# ---- sentence-transformers ------------------------------------------------------------------------------------------


def test_cross_encoder_predicts_raw_scores_of_a_saved_bert_cat(encoder, tokenizer, tmp_path):
    torch.manual_seed(1)
    model = kd.BertCat.from_encoder(str(encoder), max_query_length=8, max_document_length=16, initializer_range=0.5)
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path)
    cross_encoder = CrossEncoder(str(tmp_path), device="cpu")
    assert cross_encoder.num_labels == 1
    documents = [text for text in DOCUMENTS if text]
    wanted = ranker.score(QUERY, documents)
    assert not ((wanted >= 0) & (wanted <= 1)).all(), "the random weights hide a sigmoid"
    pairs = [(QUERY, text) for text in documents]
    assert cross_encoder.predict(pairs) == pytest.approx(wanted, abs=1e-5)
    assert cross_encoder.predict(pairs, activation_fn=torch.nn.Identity()) == pytest.approx(wanted, abs=1e-5)


def test_settings_of_the_pipeline_hold_for_its_calls(ranking, tokenizer):
    whole = ranking(ONE)
    limited = pipeline("text-ranking", model=ranking.model, tokenizer=tokenizer, top_k=3, truncation=False)
    assert limited(ONE) == whole[:3]
    assert [len(answer) for answer in limited([ONE, OTHER])] == [3, 2]
    assert limited(ONE, top_k=1) == whole[:1]
    too_long = {"query": QUERY, "documents": ["moon", "lake " * 15]}
    with pytest.raises(ValueError, match=r"Text 1 has 17 tokens, the limit is 16, and truncation is off"):
        limited(too_long)
    assert len(limited(too_long, truncation=True)) == 2


@pytest.mark.parametrize("documents", ["moon", None, 3, {"text": "moon"}])
def test_documents_that_are_not_a_list_are_refused(ranking, documents):
    with pytest.raises(ValueError, match=r"^text-ranking takes"):
        ranking({"query": QUERY, "documents": documents})
