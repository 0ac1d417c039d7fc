"""Inputs joined from stored token ids: equal to the tokenizer's for every architecture and kind of tokenizer."""

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import hf_kd_ranking as kd
from hf_kd_ranking.data import tokens
from hf_kd_ranking.data.collate import RankingCollator, sides, split_batch
from hf_kd_ranking.data.tokens import StoredInputs, TokenStore, cut_pair
from hf_kd_ranking.models import RankingProcessor

QUERIES = [
    "apple",
    "bread cat of the moon",
    "",
    "  Zebra,  unheard!  ",
    "what is a queen [MASK]",
    "a [SEP] of the moon",
    "é ﬁre",
    "dog " * 40,
]
DOCUMENTS = [*QUERIES, "under the stone tree", "x", "river river river", "the " * 30 + "end", "king of paper (1999)"]
INPUTS = ["input_ids", "attention_mask"]  # without token types
SETTINGS = {
    "bert_cat": {"joins_texts": True},
    "bert_dot": {},
    "colbert": {"query_augmentation": 3},
    "tk": {"adds_special_tokens": False},
    "prefixes": {"query_prefix": "query: ", "document_prefix": "the "},
    "separators": {"joins_texts": True, "reads_separators": True},
    "joined prefixes": {"joins_texts": True, "query_prefix": "query: ", "document_prefix": "the "},
}


def roberta_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE, `<s> A </s></s> B </s>`, without token types."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=INPUTS, **names)


def t5_like() -> PreTrainedTokenizerFast:
    """SentencePiece's unigrams, `A </s> B </s>`: nothing before the text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=INPUTS, **names)


def xlnet_like(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """[CLS] comes last and has a type of its own, as padding has."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]:2", pair="$A [SEP] $B:1 [SEP]:1 [CLS]:2", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer._pad_token_type_id = 3
    return tokenizer


@pytest.fixture(scope="module", params=["bert", "roberta", "t5", "xlnet"])
def any_tokenizer(request, tokenizer) -> PreTrainedTokenizerBase:
    made = {"bert": lambda: tokenizer, "roberta": roberta_like, "t5": t5_like, "xlnet": lambda: xlnet_like(tokenizer)}
    return made[request.param]()


@pytest.fixture
def stores(tmp_path) -> tuple[kd.TextStore, kd.TextStore]:
    for name, texts in (("queries", QUERIES), ("documents", DOCUMENTS)):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    return kd.TextStore.from_tsv(tmp_path / "queries.tsv"), kd.TextStore.from_tsv(tmp_path / "documents.tsv")


def all_rows() -> list[dict]:
    """Every query with every document, one in each place of a list of two."""
    pairs = list(product(range(len(QUERIES)), range(len(DOCUMENTS))))
    return [{"query_id": query, "doc_ids": [doc, (doc + query) % len(DOCUMENTS)]} for query, doc in pairs]


# ---- Equal inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stored_inputs_are_those_of_the_tokenizer(any_tokenizer, stores, settings):
    if not settings.get("adds_special_tokens", True) and any_tokenizer.pad_token_type_id:
        pytest.skip("TK has no token types")
    for lengths in ((5, 9), (5, 10), (30, 200)):
        processor = RankingProcessor(any_tokenizer, *lengths, **settings)
        tokenised = RankingCollator(processor, *stores)
        stored = RankingCollator(StoredInputs.build(processor, *stores), *stores)
        rows = all_rows()
        for batch in (rows[:1], rows[24:25], rows[:7], rows):  # the second is an empty query
            one, other = split_batch(tokenised(batch))[0], split_batch(stored(batch))[0]
            for wanted, got in zip(sides(one), sides(other), strict=True):
                assert list(got) == list(wanted)
                for name, values in wanted.items():
                    np.testing.assert_array_equal(got[name], values, err_msg=name)
                    assert got[name].dtype == values.dtype


@pytest.mark.parametrize("limit", [6, 7, 8, 9])
def test_pairs_are_cut_as_by_tokenizers(tokenizer, limit):
    for query, document in product(range(1, 9), repeat=2):
        encoding = tokenizer(["dog " * query], ["cat " * document], truncation=True, max_length=limit + 3).encodings[0]
        kept = [encoding.sequence_ids.count(text) for text in (0, 1)]
        assert cut_pair(query, document, limit) == tuple(kept), (query, document)


# ---- What is stored -------------------------------------------------------------------------------------------------


def test_ids_are_stored_once_for_all_lengths(tokenizer, stores, monkeypatch):
    written, write = [], tokens._write_ids
    monkeypatch.setattr(tokens, "_write_ids", lambda *args: written.append(args[-1]) or write(*args))
    tokenizer = copy.deepcopy(tokenizer)
    for settings in ({}, {"joins_texts": True}, {"query_augmentation": 2}):
        for length in (5, 8):
            processor = RankingProcessor(tokenizer, length, 9, **settings)
            processor(["dog"], ["cat"])  # leaves its length in the tokenizer
            StoredInputs.build(processor, *stores)
    assert written == ["", ""]
    StoredInputs.build(RankingProcessor(tokenizer, 5, 9, query_prefix="the "), *stores)
    assert written == ["", "", "the "]
    tokenizer.add_tokens(["zebra crossing"])
    TokenStore.build(stores[0], tokenizer)
    assert len(written) == 4


def test_a_token_store_pickles_to_its_path(tokenizer, stores):
    store = TokenStore.build(stores[1], tokenizer)
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    for got, wanted in zip(pickle.loads(pickled).take(range(len(store))), DOCUMENTS, strict=True):
        assert got.tolist() == tokenizer(wanted, add_special_tokens=False)["input_ids"]


def test_a_kill_while_ids_are_written_leaves_nothing(tokenizer, stores, monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "write_description", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TokenStore.build(stores[0], tokenizer)
    assert not list(tmp_path.rglob("*-tokens-*"))
    monkeypatch.undo()


def test_truncated_ids_are_refused(tokenizer, stores):
    folder = TokenStore.build(stores[0], tokenizer).folder
    (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-2])
    with pytest.raises(kd.errors.InputError, match=r"ids\.bin has another size than its texts; remove the folder"):
        TokenStore.build(stores[0], tokenizer)


# ---- Where ids of texts do not make inputs --------------------------------------------------------------------------


def test_tokenizers_that_cut_on_the_left_are_refused(tokenizer, stores):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    with pytest.raises(ValueError, match="makes other inputs than its ids of each text, joined"):
        StoredInputs.build(RankingProcessor(tokenizer, 5, 9), *stores)


def test_texts_without_tokens_are_refused(tokenizer, tmp_path):
    (tmp_path / "empty.tsv").write_text("0\t\n1\t \n")
    store = kd.TextStore.from_tsv(tmp_path / "empty.tsv")
    with pytest.raises(ValueError, match=r"No text of .*empty\.tsv has a token"):
        StoredInputs.build(RankingProcessor(tokenizer, 5, 9), store, store)


# ---- Training -------------------------------------------------------------------------------------------------------

BERT_CAT = pytest.mark.parametrize("model", ["bert_cat"], indirect=True)


@pytest.mark.parametrize("model", ["bert_cat", "colbert"], indirect=True)
def test_training_reads_ids_and_ends_as_without(student, make_trainer):
    weights = []
    for token_cache in (True, False):
        trainer = make_trainer(copy.deepcopy(student), max_steps=4, token_cache=token_cache)
        trainer.train()
        assert isinstance(trainer.data_collator.processor, StoredInputs) == token_cache
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)


@BERT_CAT
@pytest.mark.parametrize(("steps", "is_stored"), [(2, False), (3, True)])
def test_ids_are_stored_if_the_collection_is_read_once(model, make_trainer, steps, is_stored):
    trainer = make_trainer(model, max_steps=steps)  # 16 of 40 documents per step
    trainer.get_train_dataloader()
    assert isinstance(trainer.data_collator.processor, StoredInputs) == is_stored


@BERT_CAT
def test_training_tokenises_again_where_it_must(model, make_trainer, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "truncation_side", "left")
    trainer = make_trainer(model, max_steps=3)
    with pytest.warns(UserWarning, match="Texts are tokenised again for every batch. The tokenizer, a "):
        trainer.train()
    assert trainer.state.global_step == 3
