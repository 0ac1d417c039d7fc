"""Rows of similar length run together: the same scores and gradients, and hardly any padding computed."""

import numpy as np
import pytest
import torch

from hf_kd_ranking.models.padding import GROUP_TOKENS, length_groups

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
IDS = torch.tensor([[2, 5, 0, 0, 0], [2, 6, 7, 8, 3], [2, 9, 3, 0, 0], [2, 8, 6, 5, 3], [0, 0, 0, 0, 0]])
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
