"""Rows of similar length run together: the same scores and gradients, and hardly any padding computed."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, DistilBertConfig, RobertaConfig

import hf_kd_ranking as kd
from hf_kd_ranking.models.padding import GROUP_TOKENS, VARLEN, can_run_varlen, length_groups

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
# With two separators, 3, as passages need them.
IDS = torch.tensor([[3, 3, 0, 0, 0], [2, 6, 3, 8, 3], [3, 9, 3, 0, 0], [2, 8, 3, 5, 3], [0, 0, 0, 0, 0]])
QUERY = torch.tensor([[2, 9, 3, 0], [2, 8, 6, 3]])
DOCUMENTS = torch.stack([IDS[[1, 0]], IDS[[2, 3]]])  # (2, 2, 5)


def scores_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    if model.config.joins_texts:
        scores = model(input_ids=DOCUMENTS, attention_mask=(DOCUMENTS > 0).long()).scores
    else:
        sides = {"query": QUERY, "document": DOCUMENTS}
        scores = model(
            **{k: {"input_ids": ids, "attention_mask": (ids > 0).long()} for k, ids in sides.items()}
        ).scores
    scores.square().sum().backward()
    return scores.detach(), [parameter.grad for parameter in model.parameters()]


def test_groups_end_when_full_and_rows_get_shorter(monkeypatch):
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 7)
    groups = [(sorted(rows.tolist()), length) for rows, length in length_groups(MASK)]
    # Two rows of 5; then rows of 3 and 2 (6 tokens are not 7) with the empty one, which counts 1.
    assert groups == [([1, 3], 5), ([0, 2, 4], 3)]


def test_given_lengths_make_the_groups_of_the_mask(monkeypatch):
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 7)
    wanted = length_groups(MASK)
    for (rows, length), (wanted_rows, wanted_length) in zip(length_groups(MASK, [2, 5, 3, 5, 0]), wanted, strict=True):
        assert (rows.tolist(), length) == (wanted_rows.tolist(), wanted_length)


@pytest.mark.parametrize("as_lengths", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_inputs_with_lengths_have_the_scores_of_those_without(model, monkeypatch, as_lengths):
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 6)
    model.eval()
    documents = torch.stack([DOCUMENTS[0], DOCUMENTS[1], IDS[[4, 1]]])  # the fifth is empty
    query = QUERY[[0, 1, 0]]
    lengths = {"query": as_lengths([3, 4, 3]), "document": as_lengths([[5, 2], [3, 5], [0, 5]])}
    scores = []
    for names in ((), ("query", "document")):
        sides = {}
        for name, ids in (("query", query), ("document", documents)):
            sides[name] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
            if name in names:
                sides[name]["lengths"] = lengths[name]
        inputs = sides["document"] if model.config.joins_texts else sides
        with torch.no_grad():
            scores.append(model(**inputs).scores)
    assert torch.equal(*scores)


@pytest.mark.parametrize("enough", [1, 6, 1000])
def test_grouped_rows_have_the_same_scores_and_gradients(student, monkeypatch, enough):
    student.groups_rows = False
    scores, gradients = scores_and_gradients(student)
    student.groups_rows = True
    monkeypatch.setitem(GROUP_TOKENS, "cpu", enough)
    grouped_scores, grouped_gradients = scores_and_gradients(student)
    torch.testing.assert_close(grouped_scores, scores, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for grouped, gradient in zip(grouped_gradients, gradients, strict=True):
        torch.testing.assert_close(grouped, gradient, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("groups_rows", "wanted"), [(True, [(2, 5), (1, 3), (1, 2), (1, 1)]), (False, [(5, 5)])], ids=["on", "off"]
)
def test_encoder_reads_groups_without_padding(encoder_model, monkeypatch, groups_rows, wanted):
    shapes = []
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 1)
    encoder_model.groups_rows = groups_rows
    encoder_model.bert_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True
    )
    encoder_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert shapes == wanted


def test_word_embeddings_are_read_once_for_all_groups(encoder_model, monkeypatch):
    shapes = []
    monkeypatch.setitem(GROUP_TOKENS, "cpu", 1)
    words = encoder_model.bert_model.get_input_embeddings()
    words.register_forward_hook(lambda _, args, output: shapes.append(tuple(args[0].shape)))
    encoder_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert shapes == [(5, 5)]
    with torch.no_grad():
        encoder_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert shapes == [(5, 5), (2, 5), (1, 3), (1, 2), (1, 1)]


# ---- All rows as one sequence ---------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ENCODERS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES | {"pad_token_id": 1}),  # whose positions count from 2
    "distilbert": DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
}


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """Let models pack rows on the CPU, where a mask takes the place of torch's kernel; tokens of each of its calls."""
    calls = []

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k) -> torch.Tensor:
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q is cu_seq_k and cu_seq_q[-1] == len(query)
        assert max_q == max_k == cu_seq_q.diff().max()
        row_of = torch.bucketize(torch.arange(len(query)), cu_seq_q[1:].long(), right=True)
        calls.append(len(query))
        heads = (states.transpose(0, 1) for states in (query, key, value))
        mask = row_of.unsqueeze(0) == row_of.unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)

    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this version of torch lacks it")
    monkeypatch.setattr(varlen, "varlen_attn", attend)
    monkeypatch.setattr("hf_kd_ranking.models.encoder.can_run_varlen", lambda device, dtype: True)
    return calls


def test_packed_rows_have_the_same_scores_and_gradients(student, packed, monkeypatch):
    student.groups_rows = False
    scores, gradients = scores_and_gradients(student)
    assert packed == []
    student.groups_rows = True
    packed_scores, packed_gradients = scores_and_gradients(student)
    assert bool(packed) == (not isinstance(student, kd.TK))
    torch.testing.assert_close(packed_scores, scores, rtol=1e-5, atol=1e-5)
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for one, other in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ENCODERS)
def test_packed_rows_have_the_states_of_padded_ones(name, packed):
    torch.manual_seed(0)
    model = kd.BertDot.around(AutoModel.from_config(ENCODERS[name]), max_document_length=16, max_query_length=8)
    inputs = {"input_ids": IDS.clamp(min=2), "attention_mask": MASK}
    with torch.no_grad():
        model.groups_rows = False
        tokens, first = model.encode_tokens(inputs), model.encode_first(inputs)
        model.groups_rows = True
        packed_tokens = model.encode_tokens(inputs)
        assert packed == [2 + 5 + 2 + 5 + 1] * 2  # two layers; an empty row keeps its first token
        attended = MASK.bool()
        torch.testing.assert_close(packed_tokens[attended], tokens[attended], rtol=1e-5, atol=1e-5)
        assert not packed_tokens[:4][~attended[:4]].any()
        torch.testing.assert_close(model.encode_first(inputs)[:4], first[:4], rtol=1e-5, atol=1e-5)


def test_packed_first_states_skip_the_last_feed_forward_network(encoder_model, packed):
    shapes = []
    encoder_model.bert_model.encoder.layer[-1].intermediate.register_forward_hook(
        lambda _, args, output: shapes.append(tuple(output.shape[:2]))
    )
    with torch.no_grad():
        encoder_model.encode_first({"input_ids": IDS, "attention_mask": MASK})
        encoder_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert shapes == [(1, 5), (1, 15)]


def test_threads_that_pack_rows_of_one_model_keep_them_apart(encoder, packed, check_threads):
    model = kd.BertDot.from_encoder(str(encoder), max_query_length=8, max_document_length=16)
    batches = [{"input_ids": IDS[rows], "attention_mask": MASK[rows]} for rows in ([0, 1, 3], [1, 3], [0], [3, 0])]

    def encode(batch: dict) -> torch.Tensor:
        with torch.no_grad():
            return model.encode_first(batch).numpy()

    wanted = [encode(batch) for batch in batches]
    check_threads([lambda batch=batch: encode(batch) for batch in batches], wanted)


def test_packing_is_for_half_precision_on_gpus_without_dropout(encoder_model, packed, tmp_path):
    assert not can_run_varlen(torch.device("cpu"), torch.bfloat16)
    assert not can_run_varlen(torch.device("cuda"), torch.float32)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    encoder_model.train()  # BERT has dropout on attention, which torch's kernel lacks
    encoder_model.encode_tokens(inputs)
    assert packed == []
    encoder_model.eval().encode_tokens(inputs)
    assert packed
    assert encoder_model.bert_model.config._attn_implementation == VARLEN
    encoder_model.save_pretrained(tmp_path)
    assert VARLEN not in (tmp_path / "config.json").read_text()
