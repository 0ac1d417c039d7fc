"""Precision, activation checkpointing, compilation and attention: each trains every architecture as it should."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import hf_kd_ranking as kd
from hf_kd_ranking.training.job import TrainingJob

SIX = pytest.mark.parametrize("model", ["bert_cat", "bert_dot", "colbert", "prettr", "tk", "splade"], indirect=True)


BEFORE_AND_AFTER = pytest.mark.parametrize("model", ["bert_cat", "prettr", "tk"], indirect=True)


def train(make_trainer, model, **settings) -> list[float]:
    """The losses of three steps from the same start."""
    trainer = make_trainer(copy.deepcopy(model), max_steps=3, optim="sgd", **settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@SIX
def test_bf16_trains_near_float32_and_not_as_it(student, make_trainer):
    plain, bf16 = train(make_trainer, student), train(make_trainer, student, bf16=True)
    assert bf16 == pytest.approx(plain, rel=0.1)
    assert bf16 != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SIX
def test_half_precision_checkpoint_trains_in_float32_weights(student, make_trainer, tokenizer, tmp_path, dtype):
    kd.Ranker(student.to(dtype), tokenizer).save_pretrained(tmp_path / "half")
    model = kd.load_ranker(tmp_path / "half", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    start = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, max_steps=3, learning_rate=7e-6, bf16=True)
    trainer.train()
    moved = total = 0
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        if "word_embeddings" not in name:  # most words are in no row
            moved += (parameter.detach() != start[name]).sum().item()
            total += parameter.numel()
    assert moved > total / 2
    trainer.save_model()
    assert kd.load_ranker(tmp_path / "out").dtype == torch.float32


@BEFORE_AND_AFTER
def test_evaluator_measures_in_one_precision_before_and_after(student, make_trainer):
    seen = []

    def measure(ranker: kd.Ranker) -> dict[str, float]:
        seen.append(ranker.score(["apple bread", "moon"], ["queen of the river", "fire glass house iron"]).tolist())
        return {}

    in_float32 = make_trainer(copy.deepcopy(student), {"evaluator": measure})
    in_float32.evaluate()
    trainer = make_trainer(student, {"evaluator": measure}, max_steps=1, learning_rate=0.0, bf16=True)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert seen[1] == seen[2] != seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert_cat", "prettr"], indirect=True)  # a quarter of a minute each
def test_compiled_training_has_the_losses_of_plain(student, make_trainer):
    plain = train(make_trainer, student)
    counters.clear()
    compiled = train(make_trainer, student, torch_compile=True, torch_compile_backend="eager")
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    assert compiled == pytest.approx(plain, rel=1e-4)


@SIX
def test_activation_checkpointing_gives_the_gradients_of_plain(student, make_trainer):
    ends = []
    for way in (False, True):
        model, gradients, forwards = copy.deepcopy(student), {}, []
        trainer = make_trainer(model, max_steps=1, activation_checkpointing=way)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # in every layer, and run anew in the backward pass
                module.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name, found=gradients: found.update({name: parameter.grad.clone()})
            )
        trainer.train()
        ends.append((gradients, len(forwards)))
    (plain, forwards), (checkpointed, more_forwards) = ends
    assert more_forwards > forwards, "nothing was checkpointed"
    assert plain.keys() == checkpointed.keys() == dict(student.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert_cat", "bert_dot", "colbert", "prettr"])
def test_a_job_chooses_the_attention_and_trains_alike(encoder, make_trainer, architecture):
    losses = {}
    for attention in ("sdpa", "eager"):
        overrides = {"join_layer_idx": 1} if architecture == "prettr" else {}
        job = TrainingJob(
            str(encoder),
            architecture,
            config_overrides=overrides,
            max_query_length=8,
            max_document_length=16,
            attn_implementation=attention,
        )
        torch.manual_seed(1)
        model = job.load_model()
        assert model.bert_model.encoder.layer[0].attention.self.config._attn_implementation == attention
        model.config.encoder_config.update({"attention_probs_dropout_prob": 0.0})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses[attention] = train(make_trainer, model)
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)


def test_fp16_on_the_cpu_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU, and this run is on the CPU: leave it out, or take bf16"):
        kd.RankingTrainingArguments(str(tmp_path), fp16=True, use_cpu=True)
