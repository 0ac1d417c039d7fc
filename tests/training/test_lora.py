"""Training adapters leaves a whole ranker, and the adapters beside it."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import hf_kd_ranking as kd

peft = pytest.importorskip("peft")
# peft 0.21.2 reads the alias that transformers 5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = {"lora_r": 2, "max_steps": 3, "learning_rate": 1e-2}


def changed(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    other = other.state_dict()
    return {name for name, weight in one.state_dict().items() if not torch.equal(weight, other[name])}


def test_output_is_a_whole_ranker_that_scores_as_its_adapters(encoder_model, make_trainer, tokenizer, tmp_path):
    base = copy.deepcopy(encoder_model)
    trainer = make_trainer(encoder_model, **SETTINGS)
    trainable, everything = trainer.model.get_nb_trainable_parameters()
    assert trainable < everything / 2
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    ranker = kd.Ranker.from_pretrained(tmp_path / "out")
    # A bias on the score cancels in margins.
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in changed(ranker.model, base) if name.endswith(".weight") and "norm" not in name} == linear
    assert not {name for name in changed(ranker.model, base) if name.startswith("bert_model.")} - linear
    texts = ["apple bread", "moon"], ["queen of the river", "fire glass house iron"]
    scores = ranker.score(*texts)
    assert kd.Ranker(trainer.model, tokenizer).score(*texts) == pytest.approx(scores, rel=2e-6, abs=1e-5)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert kd.Ranker(wrapped, tokenizer).score(*texts) == pytest.approx(scores, rel=2e-6, abs=1e-5)


@pytest.mark.parametrize("model", ["colbert", "bert_cat"], indirect=True)
def test_checkpoints_hold_only_adapters_and_resume(model, make_trainer, tmp_path):
    settings = SETTINGS | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "head_learning_rate": 3e-2}
    start, again = copy.deepcopy(model), copy.deepcopy(model)
    whole = make_trainer(model, **settings)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    kinds = {key.split(".")[-2] for key in load_file(checkpoint / "adapter_model.safetensors")}
    assert kinds == {"lora_A", "lora_B", *(name for name, _ in start.named_children() if name != "bert_model")}
    resumed = make_trainer(again, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert changed(resumed.model, whole.model) == set()
    assert len(changed(whole.model, start)) > 10


BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)


@BERT_DOT
def test_the_best_adapters_are_merged(model, make_trainer, tmp_path):
    figures = iter([0.2, 0.9, 0.5])
    trainer = make_trainer(
        model,
        {"evaluator": lambda ranker: {"nDCG@10": next(figures)}},
        **SETTINGS,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nDCG@10",
    )
    trainer.train()
    saved, best, last = (
        load_file(tmp_path / "out" / folder / "adapter_model.safetensors")
        for folder in ("adapter", "checkpoint-2", "checkpoint-3")
    )
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert not all(torch.equal(last[name], best[name]) for name in best)


@BERT_DOT
def test_adapters_start_as_the_seed_decides(model, make_trainer):
    starts = []
    for seed in (1, 1, 2):
        torch.rand(len(starts))  # whatever ran before
        adapted = make_trainer(copy.deepcopy(model), lora_r=2, seed=seed).model
        starts.append({name: weight for name, weight in adapted.state_dict().items() if "lora_A" in name})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert not any(torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


@BERT_DOT
def test_a_second_training_adapts_the_merged_ranker(model, make_trainer, tmp_path):
    trainer = make_trainer(model, **SETTINGS)
    trainer.train()
    first = copy.deepcopy(trainer.model)
    trainer.train()
    assert isinstance(trainer.model, kd.BertDot) and len(changed(trainer.model, first)) > 10
    wrapped = peft.PeftModel.from_pretrained(first, tmp_path / "out" / "adapter").merge_and_unload()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[name], weight)


@BERT_DOT
def test_merged_adapters_are_evaluated_in_the_precision_of_training(student, make_trainer, toy):
    rows = kd.load_teacher_scores(toy / "scores.tsv").select(range(20))
    in_float32 = make_trainer(copy.deepcopy(student), {"eval_dataset": rows}).evaluate()["eval_loss"]
    trainer = make_trainer(student, {"eval_dataset": rows}, lora_r=2, max_steps=1, learning_rate=0.0, bf16=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == before != in_float32


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_tk_has_no_encoder_to_adapt(model, make_trainer):
    with pytest.raises(ValueError, match=r"lora_r adapts .* a pretrained encoder, and a TK has none"):
        make_trainer(model, lora_r=2)


@BERT_DOT
@pytest.mark.parametrize(("alpha", "wanted"), [(None, 8), (3, 3)])
def test_the_scale_is_twice_the_rank_unless_given(model, make_trainer, alpha, wanted):
    assert make_trainer(model, lora_r=4, lora_alpha=alpha).model.peft_config["default"].lora_alpha == wanted
