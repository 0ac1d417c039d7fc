"""Every argument of transformers' Trainer: it works as there, or is refused with the reason."""

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

import hf_kd_ranking as kd
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.training.arguments import REFUSED

BERT_DOT = pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
SEPARATE = pytest.mark.parametrize("model", ["bert_cat", "bert_dot", "colbert"], indirect=True)

# ---- Which argument does what ---------------------------------------------------------------------------------------

# Read by Trainer itself or by accelerate, in code that does not know what a model reads or returns; or tested here.
WORKS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
    torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
    logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed
    use_cpu dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    skip_memory_metrics resume_from_checkpoint local_rank
""".split()
# Some of their values are refused, see `test_values_that_a_ranker_cannot_have_are_refused`.
WORKS_IN_PART = ["accelerator_config", "include_for_metrics", "label_names", "train_sampling_strategy"]
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "all processes have the same number of rows, and the loss is a mean over rows",
    "logging_nan_inf_filter": "a loss that is not a number ends the training",
    "remove_unused_columns": "is always False",
    "do_train": "Trainer does not read it, scripts do",
    "do_eval": "Trainer does not read it, scripts do",
    "do_predict": "Trainer does not read it, scripts do",
}
PARAMETERS_THAT_WORK = """
    model args train_dataset eval_dataset processing_class model_init compute_loss_func compute_metrics callbacks
    optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics
""".split()
REFUSED_PARAMETERS = ["data_collator"]


def test_every_field_of_training_arguments_is_classified():
    classes = [*WORKS, *WORKS_IN_PART, *WITHOUT_EFFECT, *REFUSED]
    assert len(classes) == len(set(classes)), "a field is in two classes"
    assert {field.name for field in fields(TrainingArguments)} == set(classes)


def test_every_parameter_of_the_trainer_is_classified():
    parameters = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    assert sorted(parameters) == sorted([*PARAMETERS_THAT_WORK, *REFUSED_PARAMETERS])


OTHER_VALUES = {
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "length_column_name": "tokens",
    "enable_jit_checkpoint": True,
    "hub_revision": "draft",
    "debug": "underflow_overflow",
    "parallelism_config": object(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_sense_are_refused_with_the_reason(tmp_path, name):
    with pytest.raises(InputError, match=re.escape(f": {REFUSED[name]}.")) as error:
        kd.RankingTrainingArguments(str(tmp_path), use_cpu=True, **{name: OTHER_VALUES[name]})
    assert str(error.value).startswith(f"{name} must stay ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("include_for_metrics", ["loss", "inputs"], "include_for_metrics takes 'loss', got 'inputs'"),
        ("label_names", ["labels"], "label_names must stay unset"),
        ("accelerator_config", {"dispatch_batches": True}, "dispatch_batches joins batches of unlike lengths"),
        ("train_sampling_strategy", "group_by_length", "'random' or 'sequential', got 'group_by_length': rows hold"),
        ("train_sampling_strategy", "batch_rebalance", "'random' or 'sequential', got 'batch_rebalance': rows hold"),
        ("eval_strategy", "sometimes", "sometimes is not a valid IntervalStrategy"),  # transformers' own check
    ],
)
def test_values_that_a_ranker_cannot_have_are_refused(tmp_path, name, value, message):
    with pytest.raises(InputError, match=message):
        kd.RankingTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


def test_parameters_that_make_no_sense_are_refused_with_the_reason(make_trainer, encoder, tokenizer, tmp_path):
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    for parts, settings, message in (
        ({"data_collator": list}, {}, "data_collator must stay unset"),
        ({"model_init": lambda: model}, {}, "either a model or a model_init that makes one, not both or none"),
        (
            {"compute_loss_func": max},
            {"loss": "ranknet"},
            "compute_loss_func replaces the loss, and loss is 'r",
        ),
        ({"optimizers": (torch.optim.SGD(model.parameters()), None)}, {"lora_r": 2}, "optimizers cannot have the wei"),
        ({"query_clusters": np.zeros(16)}, {"train_sampling_strategy": "sequential"}, "query_clusters decides"),
        ({"query_clusters": np.zeros(16)}, {"auto_find_batch_size": True}, "query_clusters makes batches of one size"),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(model, parts, **settings)
    with pytest.raises(InputError, match="not both or none"):
        make_trainer(None)
    with pytest.raises(TypeError, match=r"trains a ranker, such as load_ranker returns; got Ranker"):
        make_trainer(kd.Ranker(model, tokenizer))
    with pytest.raises(TypeError, match=r"trains a ranker, such as load_ranker returns; got BertModel"):
        make_trainer(model.bert_model)
    with pytest.raises(TypeError, match=r"args must be RankingTrainingArguments, .*; got TrainingArguments"):
        kd.RankingTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))


def test_one_process_on_several_gpus_is_refused(make_trainer, encoder, monkeypatch):
    model = kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)
    monkeypatch.setattr(kd.RankingTrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match=r"This process sees 2 GPUs .*`accelerate launch -m hf_kd_ranking train "):
        make_trainer(model)


@BERT_DOT
@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({"eval_strategy": "epoch"}, {}, r"\(eval_strategy, .*\) needs something to measure: an evaluator"),
        ({"eval_on_start": True}, {}, r"needs something to measure: an evaluator, .* or an eval_dataset"),
        ({"early_stopping_patience": 2}, {}, r"early_stopping_patience needs an eval_strategy and a metric_for_best"),
        (
            {"eval_strategy": "epoch", "metric_for_best_model": "nDCG@10"},
            {"eval_dataset": True},
            r"metric_for_best_model is 'nDCG@10', and evaluation measures pairwise_agreement, loss\.",
        ),
    ],
)
def test_evaluations_without_a_measure_are_refused_at_once(model, make_trainer, toy, settings, parts, message):
    if parts:
        parts = {"eval_dataset": kd.load_teacher_scores(toy / "scores.tsv").select(range(4))}
    with pytest.raises(InputError, match=message):
        make_trainer(model, parts, **settings)


@BERT_DOT
def test_evaluation_of_nothing_is_refused_and_an_evaluator_is_enough(model, make_trainer):
    with pytest.raises(InputError, match=r"evaluate needs held-out teacher rows \(eval_dataset\), or a trainer with"):
        make_trainer(model).evaluate()
    with pytest.raises(InputError, match="the data set has no teacher scores"):
        make_trainer(model).evaluate(datasets.Dataset.from_dict({"query_id": [100], "doc_ids": [[1, 2]]}))
    parts = {"evaluator": lambda ranker: {"AP": 0.5}, "train_dataset": None}
    assert make_trainer(model, parts, eval_strategy="epoch").evaluate() == {"eval_AP": 0.5, "epoch": 0}


# ---- Training -------------------------------------------------------------------------------------------------------


def logged(trainer: kd.RankingTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("settings", [{}, {"lora_r": 2}], ids=["whole", "lora"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_search_over_hyperparameters_makes_every_student_anew(make_trainer, encoder, toy, monkeypatch, settings):
    """The backend tries given values, because none of transformers' own is installed."""
    if settings:
        pytest.importorskip("peft")
    trials = [
        {"learning_rate": 0.0, "loss": "margin_mse", "teacher_scale": "0.5", "seed": 3},
        {"learning_rate": 0.05, "loss": "mse:2", "teacher_scale": "1", "seed": 3},
        {"learning_rate": 0.0, "loss": "mse:2", "teacher_scale": "match", "seed": 4},
    ]
    objectives, made = [], []

    class Backend:
        def ensure_available(self) -> None:
            pass

        def run(self, trainer: kd.RankingTrainer, n_trials: int, direction: str) -> int:
            assert (n_trials, direction) == (3, "minimize")
            for number in range(n_trials):
                trainer.train(trial=SimpleNamespace(number=number, params={}))
                objectives.append(trainer.compute_objective(trainer.evaluate()))
            return int(np.argmin(objectives))

    def make_model(trial: object) -> kd.BertDot:
        made.append(trial)
        return kd.load_ranker(encoder, "bert_dot", max_query_length=8, max_document_length=16)

    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    rows = kd.load_teacher_scores(toy / "scores.tsv").select(range(16))
    parts = {"model_init": make_model, "train_dataset": rows, "eval_dataset": rows}
    trainer = make_trainer(None, parts, max_steps=2, **settings)
    best = trainer.hyperparameter_search(lambda trial: trials[trial.number], n_trials=3, backend="optuna")
    assert best == int(np.argmin(objectives)) and len(set(objectives)) == 3
    assert len(made) == 4  # once by the constructor
    fresh = make_trainer(make_model(None), {"train_dataset": rows, "eval_dataset": rows}, teacher_scale="0.5")
    assert objectives[0] == pytest.approx(fresh.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.losses == {"mse": 2.0} and trainer.teacher_scale not in (None, 0.5, 1.0)


@BERT_DOT
def test_search_without_an_objective_or_loss_is_refused(model, make_trainer):
    with pytest.raises(InputError, match="hyperparameter_search needs compute_objective, or one eval_dataset"):
        make_trainer(None, {"model_init": lambda: model}).hyperparameter_search(n_trials=1)


@BERT_DOT
def test_own_optimizers_are_used(model, make_trainer):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(model, {"optimizers": (optimizer, schedule)}, max_steps=2)
    trainer.train()
    assert logged(trainer, "learning_rate") == [0.25, 0.125]
    parts = {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.125})}
    trainer = make_trainer(copy.deepcopy(model), parts, max_steps=1, head_learning_rate=None)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)


@BERT_DOT
def test_callbacks_of_every_event_are_called(model, make_trainer, uneven):
    events = set()

    class Record(TrainerCallback):
        pass

    names = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for name in names:
        setattr(Record, name, lambda self, *args, name=name, **kwargs: events.add(name))
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    parts = {"callbacks": [Record], "train_dataset": uneven, "eval_dataset": uneven}
    trainer = make_trainer(model, parts, max_steps=1, eval_strategy="steps", eval_steps=1, save_steps=1, **settings)
    trainer.train()
    trainer.predict(uneven)
    assert set(names) - events == {"on_push_begin"}


@BERT_DOT
def test_rows_may_be_read_in_their_own_order(model, make_trainer):
    orders = {}
    for strategy in ("sequential", "random"):
        trainer = make_trainer(copy.deepcopy(model), num_train_epochs=2, train_sampling_strategy=strategy)
        seen = []
        trainer.data_collator = Recorded(trainer.data_collator, seen)
        trainer.train()
        orders[strategy] = seen
    rows = trainer.train_dataset["query_id"][:]
    assert orders["sequential"] == rows * 2
    assert orders["random"] != rows * 2 and sorted(orders["random"]) == sorted(rows * 2)


class Recorded:
    """A collator that keeps the queries that it saw."""

    def __init__(self, collator: Callable, seen: list) -> None:
        self.collator, self.seen = collator, seen

    def __call__(self, rows: list[dict]) -> dict:
        self.seen += [row["query_id"] for row in rows]
        return self.collator(rows)


@SEPARATE
@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_input_tokens_of_both_texts_are_counted(model, make_trainer, kind):
    trainer = make_trainer(model, max_steps=2, include_num_input_tokens_seen=kind)
    order = list(trainer.train_sampler)
    trainer.train()
    total = 0
    for chosen in (order[:8], order[8:16]):
        batch = trainer.data_collator([trainer.train_dataset[row] for row in chosen])
        for side in (batch.get("query", batch), batch.get("document")):
            if side is not None:
                mask = side["attention_mask"]
                total += mask.sum().item() if kind == "non_padding" else mask.numel()
    assert trainer.state.num_input_tokens_seen == total


@BERT_DOT
def test_batch_size_is_reduced_until_it_fits(student, make_trainer):
    sizes = []

    def only_small(module: torch.nn.Module, arguments: tuple, inputs: dict) -> None:
        sizes.append(len(inputs["query"]["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")

    student.register_forward_pre_hook(only_small, with_kwargs=True)
    trainer = make_trainer(student, max_steps=2, per_device_train_batch_size=5, auto_find_batch_size=True)
    trainer.train()
    assert sizes == [5, 4, 4] and trainer.state.global_step == 2


@SEPARATE
def test_noise_on_the_embeddings_changes_training_only(student, make_trainer):
    losses = []
    for alpha in (None, 50.0):
        trainer = make_trainer(copy.deepcopy(student), max_steps=1, learning_rate=0.0, neftune_noise_alpha=alpha)
        before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
        trainer.train()
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(before, rel=1e-5)
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
OTHER_SETTINGS = [
    {"torch_empty_cache_steps": 1, "full_determinism": True, "logging_first_step": True, "max_grad_norm": 0.1},
    {"lr_scheduler_type": "reduce_lr_on_plateau", **EVERY_STEP},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "warmup_steps": 0.5},
    {"optim": "adafactor", "dataloader_drop_last": True, "dataloader_pin_memory": False, "tf32": False},
    {"optim": "sgd", "optim_args": "momentum=0.9", "eval_delay": 2, **EVERY_STEP},
    {"eval_on_start": True, "teacher_scale": "match"},
    {"save_only_model": True, "save_strategy": "steps", "save_steps": 1},
    {"save_strategy": "best", "metric_for_best_model": "loss", **EVERY_STEP},
    {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True, **EVERY_STEP},
    {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
    {"accelerator_config": {"split_batches": True}, "average_tokens_across_devices": False},
    {"dataloader_num_workers": 1, "dataloader_in_order": False, "dataloader_prefetch_factor": 2},
    {"bf16": True, "auto_find_batch_size": True, "eval_use_gather_object": True, **EVERY_STEP},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@BERT_DOT
@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=str)
def test_training_ends_with_other_settings(model, make_trainer, toy, settings):
    rows = kd.load_teacher_scores(toy / "scores.tsv").select(range(5))
    trainer = make_trainer(model, {"eval_dataset": rows}, max_steps=3, **settings)
    trainer.train()
    assert trainer.state.global_step == 3 and len(logged(trainer, "loss")) == 3
    assert np.isfinite(trainer.evaluate()["eval_loss"])
