"""Options that are made from the fields of dataclasses."""

from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers.hf_argparser import HfArg

from hf_kd_ranking.cli.parser import exit_on_bad_input
from hf_kd_ranking.cli.settings import _field_options, parse_settings
from hf_kd_ranking.cli.train import parse_job
from hf_kd_ranking.distillation.job import DistillJob
from hf_kd_ranking.models import ARCHITECTURES
from hf_kd_ranking.training.arguments import RankingTrainingArguments
from hf_kd_ranking.training.job import TrainingJob

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
ON_CPU = ["--use-cpu", "--dtype", "fp32"]


class Color(Enum):
    RED = "red"


@dataclass
class Odd:
    """A field of each type that transformers and this package use."""

    needed: int
    count: int = 1
    rate: float = HfArg(default=0.5, help="Rate of 20%% each.")
    name: str | None = HfArg(default=None, aliases=["--title"])
    is_on: bool = True
    is_off: bool = False
    unset: bool | None = None
    switch: str | None = field(default=None, metadata={"nargs": "?", "const": True})
    color: Color | str = Color.RED
    mapping: dict | str | None = None
    typed: dict[str, bool] | None = None
    text: str | list[str] | None = None
    numbers: list[int] | None = None
    rates: list[float] = field(default_factory=lambda: [1e-3])
    hidden: int = field(default=7, init=False)


def odd(*arguments: str) -> Odd:
    (settings,), _ = parse_settings([Odd], ["--needed", "1", *arguments])
    return settings


def test_defaults_are_those_of_the_dataclass():
    assert odd() == Odd(1)
    with pytest.raises(typer.BadParameter.__base__, match="needed"):
        parse_settings([Odd], [])


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--count -2", "count", -2),
        ("--rate 7e-6", "rate", 7e-6),
        ("--rate 0", "rate", 0.0),
        ("--title x", "name", "x"),
        ("--name=x=y", "name", "x=y"),
        ("--no-is-on", "is_on", False),
        ("--no_is_on", "is_on", False),
        ("--is_on false", "is_on", False),
        ("--is-off", "is_off", True),
        ("--unset False", "unset", False),
        ("--switch", "switch", True),
        ("--color blue", "color", "blue"),
        ('--mapping {"a":1}', "mapping", '{"a":1}'),
        ("--text none", "text", "none"),
        ("--numbers 1 -2 --numbers 3", "numbers", [1, -2, 3]),
        ("--rates 1 2e-5", "rates", [1.0, 2e-5]),
    ],
)
def test_values_have_the_type_of_their_field(arguments, name, value):
    settings = odd(*arguments.split())
    expected = vars(Odd(1)) | {name: value}
    assert vars(settings) == expected and type(vars(settings)[name]) is type(value)


def test_fields_without_a_form_on_the_command_line_have_no_option():
    assert {each.name for each in fields(Odd)} - set(_field_options(Odd)) == {"typed", "hidden"}
    missing = {each.name for each in fields(RankingTrainingArguments)} - set(_field_options(RankingTrainingArguments))
    assert {name for name in missing if not name.startswith("_")} <= {"liger_kernel_config", "parallelism_config"}
    for settings in (TrainingJob, DistillJob):
        assert {each.name for each in fields(settings)} == set(_field_options(settings))


def test_help_names_options_types_and_defaults(capsys):
    with pytest.raises(SystemExit), exit_on_bad_input():
        parse_settings([Odd], ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--name, --title", "--is-on / --no-is-on", "Rate of 20% each. [default: 0.5]", "[required]"):
        assert words in shown


# ---- train and distill ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "field_name"),
    [
        (("--model", "--model-name", "--model_name"), "model_name"),
        (("--scores", "--teacher-scores", "--teacher_scores"), "teacher_scores"),
        (("--output", "--output-dir", "--output_dir"), "output_dir"),
        (("--batch-size", "--per-device-train-batch-size", "--per_device_train_batch_size"), None),
    ],
)
def test_train_knows_options_by_all_their_names(names, field_name):
    for name in names:
        job, args, _ = parse_job([name, "5", *ON_CPU])
        given: dict[str, Any] = vars(job) | vars(args) | {None: str(args.per_device_train_batch_size)}
        assert given[field_name] == "5"


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", True), ("fp32", False)])
def test_dtype_sets_the_precision_of_training(tmp_path, dtype, expected):
    (tmp_path / "job.yaml").write_text("fp16: true\n")
    _, args, _ = parse_job(["--config", str(tmp_path / "job.yaml"), "--use-cpu", "--dtype", dtype])
    assert (args.bf16, args.fp16) == (expected, False)
    texts = ["--collection", "c", "--queries", "q", "--output", "o"]
    (job,), _ = parse_settings([DistillJob], [*texts, "--dtype", dtype])
    assert job.bf16 is expected
    with pytest.raises(ValueError, match="--dtype is one of fp32, bf16, got 'int8'"):
        parse_settings([DistillJob], [*texts, "--dtype", "int8"])


@pytest.mark.parametrize(("flags", "expected"), [(["--bf16"], (True, False)), (["--no-fp16"], (False, False))])
def test_precision_flags_win_over_the_dtype_of_a_file(tmp_path, flags, expected):
    (tmp_path / "job.yaml").write_text("dtype: fp16\n")
    _, args, _ = parse_job(["--config", str(tmp_path / "job.yaml"), "--use-cpu", *flags])
    assert (args.bf16, args.fp16) == expected


def test_distill_takes_the_names_of_the_other_verbs():
    given = "--collection c --queries q --output o --model m --teacher a b --scores s t --k 7 --batch-size 5 --json"
    (job,), as_json = parse_settings([DistillJob], given.split())
    assert (job.collection, job.queries, job.output, job.model_name) == ("c", "q", "o", "m")
    assert (job.teachers, job.scores, job.k, job.batch_size, as_json) == (["a", "b"], ["s", "t"], 7, 5, True)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_names_all_that_training_needs(file):
    job, args, _ = parse_job(["--config", str(file), *ON_CPU])
    job.check()
    assert job.architecture in ARCHITECTURES
    assert args.learning_rate == 7e-6 and args.metric_for_best_model == "eval_nDCG@10"


def test_every_kind_of_value_has_a_form_in_a_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        """
        learning-rate: 7e-6
        use_cpu: true
        eval_strategy: no
        resume_from_checkpoint: true
        layers: [0, 1]
        measures:
          - RR@10
        config_overrides: {compression_dim: 128, normalize: true, initializer_range: 1e-2}
        accelerator_config: {even_batches: false}
        lr_scheduler_kwargs: {min_lr: 1e-7}
        teacher_scale: 1
        queries: null
        """
    )
    job, args, as_json = parse_job(["--config", str(path), "--json"])
    assert (args.learning_rate, args.use_cpu, args.eval_strategy, as_json) == (7e-6, True, "no", True)
    assert (args.resume_from_checkpoint, args.teacher_scale) == ("true", "1")
    assert (job.layers, job.measures, job.queries) == ([0, 1], ["RR@10"], None)
    assert job.config_overrides == {"compression_dim": 128, "normalize": True, "initializer_range": 0.01}
    assert (args.accelerator_config.even_batches, args.lr_scheduler_kwargs) == (False, {"min_lr": 1e-7})
    assert parse_job([f"--config={path}", "--layers", "2"])[0].layers == [2]
