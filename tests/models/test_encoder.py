"""Rows of similar length run together: the same states and gradients, and hardly any padding computed."""

import pytest
import torch

from hf_kd_ranking.models import encoder as module
from hf_kd_ranking.models.encoder import length_groups

MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
IDS = torch.tensor([[2, 5, 0, 0, 0], [2, 6, 7, 8, 3], [2, 9, 3, 0, 0], [2, 8, 6, 5, 3], [0, 0, 0, 0, 0]])


@pytest.fixture
def no_dropout_model(encoder_model):
    for layer in encoder_model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return encoder_model


def states_and_gradients(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    states = model.encode_tokens({"input_ids": IDS, "attention_mask": MASK}) * MASK.unsqueeze(-1)
    states.square().sum().backward()
    return states.detach(), [parameter.grad for parameter in model.bert_model.parameters()]


def test_groups_are_cut_where_a_device_is_full_and_rows_get_shorter(monkeypatch):
    monkeypatch.setitem(module.GROUP_TOKENS, "cpu", 7)
    groups = [(sorted(rows.tolist()), length) for rows, length in length_groups(MASK)]
    # Two rows of 5; then rows of 3 and 2 (6 tokens are not 7) with the empty one, which counts 1.
    assert groups == [([1, 3], 5), ([0, 2, 4], 3)]


@pytest.mark.parametrize("enough", [1, 6, 1000])
def test_grouped_rows_have_the_states_and_gradients_of_all_rows_at_once(no_dropout_model, monkeypatch, enough):
    monkeypatch.setattr(module, "may_group_rows", lambda: False)
    states, gradients = states_and_gradients(no_dropout_model)
    monkeypatch.setattr(module, "may_group_rows", lambda: True)
    monkeypatch.setitem(module.GROUP_TOKENS, "cpu", enough)
    grouped_states, grouped_gradients = states_and_gradients(no_dropout_model)
    torch.testing.assert_close(grouped_states, states, rtol=1e-5, atol=1e-5)
    for grouped, gradient in zip(grouped_gradients, gradients, strict=True):
        torch.testing.assert_close(grouped, gradient, rtol=1e-4, atol=1e-4)


def test_the_encoder_sees_no_padding_that_a_group_does_not_need(no_dropout_model, monkeypatch):
    shapes = []
    monkeypatch.setitem(module.GROUP_TOKENS, "cpu", 1)
    no_dropout_model.bert_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    no_dropout_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert shapes == [(2, 5), (1, 3), (1, 2), (1, 1)]


def test_processes_that_may_share_weights_make_one_forward_each(no_dropout_model, monkeypatch):
    calls = []
    monkeypatch.setitem(module.GROUP_TOKENS, "cpu", 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    no_dropout_model.bert_model.register_forward_pre_hook(lambda *_: calls.append(1))
    no_dropout_model.encode_tokens({"input_ids": IDS, "attention_mask": MASK})
    assert len(calls) == 1
