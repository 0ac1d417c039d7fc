"""BERT_CAT over passages: the windows token by token, an implementation with one call per passage, refusals."""

import itertools

import pytest
import torch
from transformers import AutoModel, RobertaConfig

import hf_kd_ranking as kd
from hf_kd_ranking.models.windows import cut_pairs

LENGTHS = {"max_query_length": 6, "max_document_length": 40}
# Ids of the separators of a pair: "[CLS] query [SEP] document [SEP]" and "<s> query </s></s> document </s>".
LIKE_BERT, LIKE_ROBERTA = ([2], [3], [3]), ([0], [2, 2], [2])
QUERIES = [[11, 12], [13, 14, 15], []]
DOCUMENTS = [list(range(16, 27)), list(range(16, 20)), [], [20], list(range(30, 20, -1)), list(range(16, 33))]


def pairs(frame: tuple[list[int], ...], texts: list[tuple[list[int], list[int]]], width: int = 0) -> dict:
    """Inputs (N, L) of queries with their documents, padded with a word that nothing attends to."""
    begin, middle, end = frame
    rows = [[*begin, *query, *middle, *document, *end] for query, document in texts]
    width = max(width, *map(len, rows))
    return {
        "input_ids": torch.tensor([row + [25] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


# ---- Windows --------------------------------------------------------------------------------------------------------


def rows_of(inputs: dict) -> list[list[int]]:
    found = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        found.append([token for token, is_token in zip(ids, mask, strict=True) if is_token])
    return found


def test_windows_have_the_query_and_some_tokens_of_the_document():
    inputs = pairs(LIKE_BERT, [([11, 12], [21, 22, 23, 24, 25]), ([13], [26])], width=14)
    inputs["token_type_ids"] = torch.tensor([[0] * 4 + [1] * 6 + [0] * 4, [0] * 3 + [1] * 2 + [0] * 9])
    windows = cut_pairs(inputs, query_length=8, window_length=3, stride=2)
    first, second = [2, 11, 12, 3], [2, 13, 3]
    wanted = [[*first, 21, 22, 3], [*first, 23, 24, 3], [*first, 25, 3], [*second, 26, 3]]
    assert rows_of(windows.inputs) == wanted
    assert windows.inputs["input_ids"].shape == (4, 7)  # as wide as the longest
    assert windows.inputs["token_type_ids"].tolist()[1:3] == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]
    assert (windows.rows.tolist(), windows.places.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 0])


@pytest.mark.parametrize(("tokens", "stride", "wanted"), [(4, 2, 1), (5, 2, 2), (6, 2, 2), (7, 2, 3), (9, 4, 3)])
def test_last_window_begins_where_tokens_are_left(tokens, stride, wanted):
    windows = cut_pairs(pairs(LIKE_BERT, [([11], [20] * tokens)]), query_length=8, window_length=5, stride=stride)
    assert len(windows.rows) == wanted


def test_long_queries_are_cut_and_their_separators_kept():
    inputs = pairs(LIKE_ROBERTA, [([11, 12, 13, 14], [21, 22, 23])])
    windows = cut_pairs(inputs, query_length=5, window_length=3, stride=2)
    assert rows_of(windows.inputs) == [[0, 11, 12, 2, 2, 21, 22, 2], [0, 11, 12, 2, 2, 23, 2]]


@pytest.mark.parametrize("frame", [LIKE_BERT, LIKE_ROBERTA])
def test_empty_texts_have_one_window(frame):
    texts = [([], [21, 22]), ([11], []), ([], [])]
    windows = cut_pairs(pairs(frame, texts, width=9), query_length=8, window_length=3, stride=2)
    assert rows_of(windows.inputs) == rows_of(pairs(frame, texts))


def test_pair_with_nothing_attended_has_a_window_of_padding():
    inputs = {"input_ids": torch.tensor([[0, 0, 0]]), "attention_mask": torch.zeros(1, 3, dtype=torch.long)}
    windows = cut_pairs(inputs, query_length=8, window_length=3, stride=2)
    assert windows.inputs["attention_mask"].tolist() == [[0]]


def test_separators_in_a_document_are_words():
    # As many as there are may not make a window longer than the encoder reads.
    windows = cut_pairs(pairs(LIKE_BERT, [([11], [3] * 30)]), query_length=8, window_length=9, stride=8)
    assert windows.inputs["input_ids"].shape[1] <= 8 + 9


def test_pairs_without_a_separator_are_refused(bert_cat):
    inputs = {"input_ids": torch.tensor([[2, 11, 12, 13]]), "attention_mask": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="passage_length needs pairs in which the same separator follows the query"):
        bert_cat(passage_length=5)(**inputs)


# ---- Scores ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert_cat(encoder):
    """bert_cat(**config): a BERT_CAT with random weights, the same for every config but for the attention's."""

    def make(**config) -> kd.BertCat:
        torch.manual_seed(1)
        model = kd.BertCat.from_encoder(encoder, **(LENGTHS | config))
        with torch.no_grad():
            torch.manual_seed(2)
            model._classification_layer.weight.normal_()
            if model.config.has_passage_attention:
                model._passage_attention.weight.normal_()
        return model

    return make


def score_one(model: kd.BertCat, frame: tuple, query: list[int], document: list[int]) -> float:
    """Score one pair: one call of the encoder for each passage, without padding."""
    config, (begin, middle, end) = model.config, frame
    size, vectors = config.passage_length - 1, []
    stride = config.passage_stride or size
    query = query[: config.max_query_length - len(begin) - len(middle)]
    for start in itertools.count(0, stride):
        ids = torch.tensor([[*begin, *query, *middle, *document[start : start + size], *end]])
        vectors.append(model.bert_model(input_ids=ids).last_hidden_state[0, 0])
        if start + size >= len(document):
            break
    if config.passage_pooling == "max":
        pooled = torch.tensor([max(values) for values in zip(*torch.stack(vectors).tolist(), strict=True)])
    else:
        weights = torch.tensor([float(vector @ model._passage_attention.weight[0]) for vector in vectors]).exp()
        pooled = sum(weight * vector for weight, vector in zip(weights / weights.sum(), vectors, strict=True))
    return float(pooled @ model._classification_layer.weight[0] + model._classification_layer.bias)


TEXTS = list(itertools.product(QUERIES, DOCUMENTS))
POOLINGS = [
    {"passage_length": 5},
    {"passage_length": 6, "passage_stride": 3},
    {"passage_length": 5, "passage_stride": 2, "passage_pooling": "attention"},
    {"passage_length": 2, "passage_pooling": "attention"},
]


@pytest.mark.parametrize("config", POOLINGS)
def test_scores_equal_one_encoder_call_per_passage(bert_cat, config):
    model = bert_cat(**config)
    with torch.no_grad():
        scores = model(**pairs(LIKE_BERT, TEXTS)).scores
        wanted = torch.tensor([score_one(model, LIKE_BERT, *texts) for texts in TEXTS])
        lists = {name: tensor.view(3, 6, -1) for name, tensor in pairs(LIKE_BERT, TEXTS, width=50).items()}
        shuffled = {name: tensor.flip(1) for name, tensor in lists.items()}
        torch.testing.assert_close(model(**lists).scores, wanted.view(3, 6), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**shuffled).scores.flip(1), wanted.view(3, 6), rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1, "scores too alike to tell a change"
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", POOLINGS[1:3])
def test_scores_of_other_separators_equal_one_call_per_passage(config):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(4)
    encoder = AutoModel.from_config(
        RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=16, initializer_range=0.5)
    )
    model = kd.BertCat.around(encoder, **LENGTHS, initializer_range=0.5, **config)
    with torch.no_grad():
        scores = model(**pairs(LIKE_ROBERTA, TEXTS, width=50)).scores
        wanted = torch.tensor([score_one(model, LIKE_ROBERTA, *texts) for texts in TEXTS])
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "attention"])
def test_document_of_one_passage_scores_as_without_passages(bert_cat, tokenizer, pooling):
    plain, model = bert_cat(), bert_cat(passage_length=40, passage_pooling=pooling)
    queries, documents = ["what is bread", "", "moon"], ["bread apple iron", "moon " * 30, ""]
    wanted = kd.Ranker(plain, tokenizer).score(queries, documents)
    assert kd.Ranker(model, tokenizer).score(queries, documents) == pytest.approx(wanted, abs=1e-6)


def test_separators_in_texts_do_not_end_the_query(bert_cat, tokenizer):
    # The test's vocabulary has no brackets, so that they become unknown words.
    ranker = kd.Ranker(bert_cat(passage_length=6), tokenizer)
    texts = ranker.processor.pairs(["bread [SEP] moon"], ["cat [SEP] dog [PAD] apple"])["input_ids"][0]
    assert texts.count(tokenizer.sep_token_id) == 2
    assert tokenizer.pad_token_id not in texts
    assert tokenizer(["bread [SEP] moon"])["input_ids"][0].count(tokenizer.sep_token_id) == 2, "changed for others"


def test_ranker_without_passages_reads_long_documents_in_passages(bert_cat, tokenizer, tmp_path):
    kd.Ranker(bert_cat(), tokenizer).save_pretrained(tmp_path)
    overrides = {"passage_length": 20, "max_document_length": 200}  # the encoder has 64 positions
    ranker = kd.Ranker.from_pretrained(tmp_path, device="cpu", **overrides)
    filler = "house of the king " * 30
    scores = ranker.score("zebra", [filler, f"{filler} zebra", f"zebra {filler}"])
    assert len(set(scores.round(4).tolist())) == 3, "a word after 120 others is not read"
    with pytest.raises(ValueError, match=r"missing keys: _passage_attention\.weight"):
        kd.load_ranker(tmp_path, passage_length=20, passage_pooling="attention")


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"passage_length": 1}, "passage_length must be at least 2, one token and .SEP., got 1"),
        (
            {"passage_length": 9, "passage_stride": 9},
            r"passage_stride must be 1\.\.8, else tokens are left out; got 9",
        ),
        ({"passage_length": 9, "passage_stride": 0}, r"passage_stride must be 1\.\.8, .*got 0"),
        ({"passage_stride": 5}, "passage_stride and passage_pooling need passage_length, which is None"),
        ({"passage_pooling": "attention"}, "passage_stride and passage_pooling need passage_length"),
        ({"passage_length": 60}, r"max_query_length \+ passage_length is 66 tokens, .*has positions for 64"),
    ],
)
def test_passages_that_do_not_fit_together_are_refused(bert_cat, config, message):
    with pytest.raises(ValueError, match=message):
        bert_cat(**config)


def test_distill_refuses_int8_graphs_of_passages():
    options = {"architectures": ["bert_cat"], "overrides": {"bert_cat": {"passage_length": 60}}}
    job = kd.DistillJob("c.tsv", "q.tsv", "out", teachers=["t"], precisions=["float32", "int8"], **options)
    with pytest.raises(ValueError, match="The precision int8 reads a pair as one sequence; leave out passage_length"):
        job._check_names()
