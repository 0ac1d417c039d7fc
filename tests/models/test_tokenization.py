"""Texts to a ranker's inputs, token by token: query augmentation, plain words, and texts that are too long.

What a batch of training rows looks like is in data/test_collate.py.
"""

import copy
import random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import hf_kd_ranking as kd
from hf_kd_ranking.data.tokens import cut_pair
from hf_kd_ranking.models import Cuts, RankingProcessor

# Ids of the tiny tokenizer in conftest.py.
PAD, UNK, CLS, SEP, MASK = 0, 1, 2, 3, 4
APPLE, BREAD, CAT, DOG = range(5, 9)


def ranking_tokenizer(tokenizer, **settings) -> RankingProcessor:
    return RankingProcessor(tokenizer, **({"max_query_length": 5, "max_document_length": 6} | settings))


def lists(batch: dict) -> dict:
    return {name: tensor.tolist() for name, tensor in batch.items()}


# ---- Query augmentation ---------------------------------------------------------------------------------------------


def test_masks_follow_the_last_special_token(tokenizer):
    tokens = ranking_tokenizer(tokenizer, query_augmentation=2).queries(["apple bread", ""])
    assert tokens == {
        "input_ids": [[CLS, APPLE, BREAD, SEP, MASK, MASK], [CLS, SEP, MASK, MASK]],
        "token_type_ids": [[0] * 6, [0] * 4],
        "attention_mask": [[1] * 6, [1] * 4],
    }


def test_other_inputs_are_zero_at_masks(tokenizer):
    # Segment 1 for every word: a copied or repeated last value would be one.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = type(tokenizer.backend_tokenizer.post_processor)(
        single="[CLS]:1 $A:1 [SEP]:1", pair="[CLS] $A $B", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokens = ranking_tokenizer(tokenizer, query_augmentation=2).queries(["apple"])
    assert tokens["token_type_ids"] == [[1, 1, 1, 0, 0]]


def test_masks_come_after_truncation_and_before_padding(tokenizer):
    queries = ["apple bread cat dog apple", "dog"]
    batch = ranking_tokenizer(tokenizer, query_augmentation=2)(queries, ["cat", "cat"])["query"]
    assert lists(batch) == {
        "input_ids": [[CLS, APPLE, BREAD, CAT, SEP, MASK, MASK], [CLS, DOG, SEP, MASK, MASK, PAD, PAD]],
        "token_type_ids": [[0] * 7] * 2,
        "attention_mask": [[1] * 7, [1, 1, 1, 1, 1, 0, 0]],
    }


def test_documents_get_no_masks(tokenizer):
    batch = ranking_tokenizer(tokenizer, query_augmentation=2)(["apple"], ["cat", "dog bread"])["document"]
    assert batch["input_ids"].tolist() == [[[CLS, CAT, SEP, PAD], [CLS, DOG, BREAD, SEP]]]


def without_mask_token(tokenizer) -> PreTrainedTokenizerFast:
    # One vocabulary entry less would be refused for its size.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_augmentation_without_a_mask_token_is_refused(tokenizer, model):
    maskless = without_mask_token(tokenizer)
    if isinstance(model, kd.ColBERT | kd.PreTTR):
        message = rf"{model.config.model_type} adds 8 \[MASK\] tokens after each query, and the tokenizer has no mask"
        with pytest.raises(ValueError, match=message):
            RankingProcessor.from_config(maskless, model.config)
        model.config.query_augmentation = 0
    assert RankingProcessor.from_config(maskless, model.config).query_augmentation == 0


def test_tokenizer_without_a_padding_token_is_refused(tokenizer, model):
    backend = tokenizer.backend_tokenizer
    padless = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]")
    with pytest.raises(ValueError, match=r"no padding token, which batches need; set tokenizer\.pad_token"):
        RankingProcessor.from_config(padless, model.config)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_right_with_the_tokenizers_ids(tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side, tokenizer.pad_token = side, "dog"
    processor = ranking_tokenizer(tokenizer, query_augmentation=2)
    tokens = processor.queries(["apple", "", "bread cat dog", "cat apple bread"])
    wanted = tokenizer.pad(tokens, padding=True, padding_side="right", return_tensors="pt")
    padded = processor.pad(tokens, (2, 2))
    assert padded.keys() == wanted.keys()
    for name, tensor in padded.items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, wanted[name].view(2, 2, 7))


# ---- Plain words ----------------------------------------------------------------------------------------------------


def test_without_special_tokens_a_text_is_its_words(tokenizer):
    batch = ranking_tokenizer(tokenizer, adds_special_tokens=False)(["apple"], ["cat unheard", "dog"])
    assert batch["query"]["input_ids"].tolist() == [[APPLE]]
    assert batch["document"]["input_ids"].tolist() == [[[CAT, UNK], [DOG, PAD]]]
    assert batch["document"]["attention_mask"].tolist() == [[[1, 1], [1, 0]]]


@pytest.mark.parametrize("text", ["", " "])
def test_empty_text_of_plain_words_is_one_padding_token(tokenizer, text):
    tokens = ranking_tokenizer(tokenizer, adds_special_tokens=False)
    alone = {"input_ids": [[PAD]], "token_type_ids": [[0]], "attention_mask": [[0]]}
    assert lists(tokens.pad(tokens.queries([text]))) == alone
    assert lists(tokens.pad(tokens.documents([text]))) == alone
    among_others = tokens(["apple", text], [text, "dog cat", "dog", text])
    assert among_others["query"]["attention_mask"].tolist() == [[1], [0]]
    assert among_others["document"]["attention_mask"].tolist() == [[[0, 0], [1, 1]], [[1, 0], [0, 0]]]


def test_only_an_empty_text_gets_the_padding_token(tokenizer):
    tokens = ranking_tokenizer(tokenizer, adds_special_tokens=False).queries(["", "cat", "unheard"])
    assert tokens["input_ids"] == [[PAD], [CAT], [UNK]]
    assert tokens["attention_mask"] == [[0], [1], [1]]


def test_empty_text_is_padded_with_the_tokenizers_id(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = "dog"
    tokens = ranking_tokenizer(tokenizer, adds_special_tokens=False).queries([""])
    assert tokens["input_ids"] == [[DOG]]


# ---- Order and prefixes ---------------------------------------------------------------------------------------------


def test_documents_of_the_first_query_come_first(tokenizer):
    documents = ["apple", "bread", "cat", "dog", "apple bread", "cat dog"]
    ids = ranking_tokenizer(tokenizer)(["apple", "bread"], documents)["document"]["input_ids"]
    assert ids.shape == (2, 3, 4)
    wanted = [[[APPLE, SEP], [BREAD, SEP], [CAT, SEP]], [[DOG, SEP], [APPLE, BREAD], [CAT, DOG]]]
    assert ids[:, :, 1:3].tolist() == wanted
    joined = ranking_tokenizer(tokenizer, joins_texts=True)(["cat", "dog"], documents)["input_ids"]
    assert joined.shape == (2, 3, 6)
    assert joined[:, :, 1].tolist() == [[CAT] * 3, [DOG] * 3]
    assert joined[:, :, 3:5].tolist() == wanted


@pytest.mark.parametrize("adds_special_tokens", [True, False])
def test_prefixes_count_towards_the_length(tokenizer, adds_special_tokens):
    special = 2 if adds_special_tokens else 0
    lengths = {"max_query_length": 2 + special, "max_document_length": 3 + special}
    prefixes = {"query_prefix": "apple ", "document_prefix": "bread bread "}
    tokens = ranking_tokenizer(tokenizer, adds_special_tokens=adds_special_tokens, **prefixes, **lengths)
    inner = slice(1, -1) if adds_special_tokens else slice(None)
    queries, documents = tokens.queries(["dog cat", ""]), tokens.documents(["dog cat", ""])
    assert [ids[inner] for ids in queries["input_ids"]] == [[APPLE, DOG], [APPLE]]
    assert [ids[inner] for ids in documents["input_ids"]] == [[BREAD, BREAD, DOG], [BREAD, BREAD]]


# ---- Texts that are too long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "lengths"), [("queries", (6, 5)), ("documents", (7, 6))], ids=["queries", "documents"]
)
def test_without_truncation_a_long_text_is_refused(tokenizer, side, lengths):
    tokenize = getattr(ranking_tokenizer(tokenizer, truncation=False), side)
    words = "apple bread cat dog apple bread".split()
    fits = " ".join(words[: lengths[1] - 2])
    assert [len(ids) for ids in tokenize(["dog", fits])["input_ids"]] == [3, lengths[1]]
    too_long = " ".join(words[: lengths[0] - 2])
    message = rf"^Text 1 has {lengths[0]} tokens, the limit is {lengths[1]}, and truncation is off \('{too_long}'\)\.$"
    with pytest.raises(ValueError, match=message):
        tokenize(["dog", too_long, fits])


def test_without_truncation_a_long_pair_is_refused(tokenizer):
    tokens = ranking_tokenizer(tokenizer, truncation=False)
    query, document = "apple bread cat", "dog dog dog dog dog"
    assert [len(ids) for ids in tokens.pairs([query], [document])["input_ids"]] == [11]
    with pytest.raises(ValueError, match=r"Text 1 has 12 tokens, the limit is 11, .*\('apple bread cat / dog dog"):
        tokens.pairs(["cat", query], ["dog", document + " dog"])


def test_masks_do_not_count_towards_the_limit(tokenizer):
    tokens = ranking_tokenizer(tokenizer, truncation=False, query_augmentation=3)
    assert tokens.queries(["apple bread cat"])["input_ids"] == [[CLS, APPLE, BREAD, CAT, SEP, MASK, MASK, MASK]]


def test_a_long_text_is_quoted_in_part(tokenizer):
    with pytest.raises(ValueError, match="Text 0 has 202 tokens") as error:
        ranking_tokenizer(tokenizer, truncation=False).documents(["apple " * 200])
    assert len(str(error.value)) < 200


def test_padding_takes_any_shape(tokenizer):
    tokens = ranking_tokenizer(tokenizer)
    documents = tokens.documents(["apple", "bread cat", "", "dog"])
    flat, nested = tokens.pad(documents), tokens.pad(documents, (2, 2))
    assert flat["input_ids"].shape == (4, 4)
    assert all(torch.equal(nested[name].flatten(0, 1), flat[name]) for name in flat)
    assert nested["input_ids"][0, 1].tolist() == [CLS, BREAD, CAT, SEP]


# ---- What is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5, 6), (3, 4), (60, 70)])
@pytest.mark.parametrize("joins_texts", [False, True])
def test_cut_tokens_are_the_difference_to_whole_texts(tokenizer, lengths, joins_texts):
    rng = random.Random(4)
    words = ["apple", "bread", "cat", "dog"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(0, 40))) for _ in range(40)]
    queries = [" ".join(rng.choices(words, k=rng.randrange(0, 12))) for _ in range(40)]
    cut = ranking_tokenizer(
        tokenizer, max_query_length=lengths[0], max_document_length=lengths[1], joins_texts=joins_texts
    )
    for start in (0, 20):  # counts add up
        if joins_texts:
            cut.pairs(queries[start : start + 20], texts[start : start + 20])
        else:
            cut.queries(queries[start : start + 20])
            cut.documents(texts[start : start + 20])
    kept, whole = 0, sum(len(text.split()) for text in texts)
    total, cut_texts = whole + 2 * 40, 0
    for query, text in zip(queries, texts, strict=True):
        count = len(text.split())
        room = lengths[1] - 2
        if joins_texts:
            of_query, room = cut_pair(len(query.split()), count, sum(lengths) - 3)
            total += of_query + 1
        kept += min(count, room)
        cut_texts += count > room
    assert cut.cuts == Cuts(texts=40, cut_texts=cut_texts, cut_tokens=whole - kept, tokens=total)
    shares = cut.cuts.shares(lengths[1])
    assert shares == {"cut_texts": round(cut_texts / 40, 4), "cut_tokens": round((whole - kept) / total, 4)}


def test_warning_says_what_is_cut_above_a_tenth(tokenizer, caplog):
    for long, is_warned in ((1, False), (2, True)):
        cut = ranking_tokenizer(tokenizer)
        cut.documents(["apple"] * (10 - long) + ["apple " * 14] * long)
        shares = cut.cuts.shares(6)
        assert shares["cut_texts"] == long / 10
        assert ("longer than 6 tokens and are cut" in caplog.text) == is_warned
    assert Cuts().shares(6) == {}
