"""The trainings of `distill`: students under every condition, and teachers that are trained here.

All see the same triples, and the same learning rates are tried under every condition on the validation queries.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from transformers import AutoConfig, set_seed

from ..artifacts import read_json, write_json
from ..data.rows import load_teacher_scores
from ..errors import InputError
from ..losses import IN_BATCH, get_losses, get_regularizers
from ..models import ARCHITECTURES
from ..processes import processes
from ..ranker import Ranker
from ..training.arguments import MATCH, RankingTrainingArguments
from ..training.job import TrainingJob, load_student, train_ranker
from .context import Context, name_sources
from .job import BM25, FIRST_TEACHER, NO_TEACHER, DistillJob
from .teaching import rows_file
from .work import Artifact, model_path, shared

SEED = 42
# Products of vectors have a natural size, to which the teacher's margins are matched. The scores of fresh layers are
# near 0: there the teacher's margins get this root mean square (with matched margins a PreTTR learned half as much).
LAYERS_MARGIN = 1.5
# The losses that distilled best at equal compute, see examples/RESULTS.md: with a teacher that can score every pair of
# a batch, and with others.
LIVE_LOSS, LOSS = "in_batch_kl_div", "margin_mse"


@dataclass(frozen=True)
class Recipe:
    """One training: everything that its result depends on besides its files; options are those of the job."""

    architecture: str
    condition: str  # one of `CONDITIONS`
    config: dict[str, Any]  # fields of the architecture's config, and `layers`
    learning_rates: tuple[float, ...]  # those that are tried
    epochs: float
    head_learning_rate: float | None  # of the ranker's own layers; None is that of the encoder
    seed: int  # number of the training, from 0
    encoder: Path  # folder or name
    loss: str
    live_teacher: Path | None  # folder or name of the teacher that scores all pairs of a batch
    batch_size: int
    evaluations: int
    patience: int | None
    bf16: bool
    max_query_length: int
    max_document_length: int
    measure: str

    @classmethod
    def of_job(
        cls,
        job: DistillJob,
        architecture: str,
        condition: str,
        live_teacher: str | None = None,
        layers: Sequence[int] | None = None,
        is_teacher: bool = False,
    ) -> "Recipe":
        """Read the recipe of a training from a job.

        `live_teacher` is the teacher if it can score all pairs of a batch; `layers` are the encoder's layers that are
        kept, None leaves that to the job's overrides; `is_teacher` is True for a teacher that is trained here.
        """
        options, config = job.training_options(architecture, is_teacher)
        if layers is not None:
            config = {**config, "layers": list(layers)}
        loss = choose_loss(job, architecture, condition, live_teacher is not None)
        if options["regularization"] is not None and not get_regularizers(loss):
            loss = f"{loss},{options['regularization']}"
        reads_batch = any(name.startswith(IN_BATCH) for name in get_losses(loss))
        shared = ("batch_size", "evaluations", "patience", "bf16", "max_query_length", "max_document_length")
        return cls(
            architecture,
            condition,
            config,
            tuple(options["learning_rates"]),
            options["epochs"],
            options["head_learning_rate"],
            seed=0,
            encoder=Path(job.model_name),
            loss=loss,
            live_teacher=Path(live_teacher) if live_teacher is not None and reads_batch else None,
            measure=job.measure,
            **{name: getattr(job, name) for name in shared},
        )


def choose_loss(job: DistillJob, architecture: str, condition: str, has_live_teacher: bool) -> str:
    """Return the loss of a training: RankNet on labels, the job's, or the measured default (`examples/RESULTS.md`)."""
    if condition == NO_TEACHER:
        return "ranknet"
    if job.loss is not None:
        return job.loss
    model_class = ARCHITECTURES[architecture]
    similarity = model_class.config_class.similarity
    # A PreTTR compares vectors by the encoder's layers: all pairs of a batch take ten times as long as its lists.
    is_costly = similarity is None or (similarity == "layers" and bool(model_class.base_model_prefix))
    if has_live_teacher and not is_costly:
        return LIVE_LOSS
    return LOSS


def kept_layers(job: DistillJob, architecture: str) -> dict[str, list[int] | None]:
    """Return name of a student -> the encoder's layers that it keeps, for every number of layers of a job.

    The first and the last layer are kept, the others are spread evenly. None keeps those of the overrides, or all; TK
    has layers of its own.
    """
    if not job.layer_counts or not ARCHITECTURES[architecture].base_model_prefix:
        return {architecture: None}
    available = AutoConfig.from_pretrained(job.model_name).num_hidden_layers
    kept = {}
    for count in job.layer_counts:
        if not 1 <= count <= available:
            raise InputError(f"layer_counts lie between 1 and the encoder's {available} layers, got {count}.")
        places = np.linspace(0, available - 1, count) if count > 1 else [available - 1]
        kept[f"{architecture}-{count}"] = [round(float(place)) for place in places]
    return kept


class Student(NamedTuple):
    """A trained ranker."""

    recipe: Recipe
    training: Artifact

    @property
    def checkpoint(self) -> Path:
        """The folder with its weights, card and manifest."""
        return model_path(self.training)


# ---- Steps ----------------------------------------------------------------------------------------------------------


@shared
def train_student(
    folder: Path,
    recipe: Recipe,
    rate: float | Artifact,
    rows: Artifact | Path,
    candidates: Artifact,
    judgments: Artifact,
    context: Context,
) -> None:
    """Train a ranker into the folder `ranker`; an interrupted training resumes from its last checkpoint.

    `rate` is a learning rate or the step that chose it; candidates and judgments are of the validation queries.
    """
    output = folder.resolve() / "ranker"  # a checkpoint remembers the path of the best one
    if not (output / "README.md").is_file():  # training writes it last
        job, args = training(recipe, learning_rate(rate), rows_file(rows), candidates, judgments, context, output)
        try:
            title = f"{folder.parent.name}, {folder.name}"
            train_ranker(job, args, is_measured_before=False, title=title)
        except SystemExit as error:
            if not error.code:
                raise
            step = "the training saved a checkpoint"
            raise SystemExit(f"Stopped by SIGTERM, {step}; the same command resumes.") from None
    if context.is_main_process:
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def choose_rate(folder: Path, trained: Sequence[Artifact], rates: Sequence[float], measure: str) -> None:
    """Choose the training that is best on the validation queries; `ranker` is a link to its checkpoint."""
    values = [validation_value(artifact, measure) for artifact in trained]
    best = values.index(max(values))
    link = folder / "ranker"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(trained[best].path / "ranker", folder))
    write_json(folder / "choice.json", {"learning_rate": rates[best], "value": values[best]})


# ---- What the steps left --------------------------------------------------------------------------------------------


def learning_rate(rate: float | Artifact) -> float:
    """Return a learning rate, or the one that a step chose."""
    if isinstance(rate, Artifact):
        return read_json(rate.path / "choice.json")["learning_rate"]
    return rate


def validation_value(training: Artifact, measure: str) -> float:
    """Return the measure of a trained ranker on the validation queries."""
    results = read_json(training.path / "ranker" / "results.json")
    return results["after"][f"eval_{measure}"]


def untrained_ranker(recipe: Recipe, context: Context) -> Ranker:
    """Return a student before its training: what the encoder gives by itself."""
    set_seed(SEED)
    job = training_job(recipe, context)
    ranker = load_student(job, context.documents)
    ranker.model.to(context.device)
    return ranker


# ---- One training ---------------------------------------------------------------------------------------------------


def training(
    recipe: Recipe,
    rate: float,
    rows: Path,
    candidates: Artifact,
    judgments: Artifact,
    context: Context,
    output: Path,
) -> tuple[TrainingJob, RankingTrainingArguments]:
    """Return the job and the arguments of one training, for `train_ranker`."""
    job = training_job(recipe, context)
    job.teacher_scores = str(rows)
    job.candidates = str(candidates.path / "run.trec")
    job.qrels = str(judgments.path / "qrels.txt")
    return job, training_arguments(recipe, rate, teacher_scale(recipe, rows), context, output)


def training_job(recipe: Recipe, context: Context) -> TrainingJob:
    """Return the job of one training without its files."""
    return TrainingJob(
        context.job.model_name,
        recipe.architecture,
        config_overrides=recipe.config,
        max_query_length=recipe.max_query_length,
        max_document_length=recipe.max_document_length,
        collection=context.job.collection,
        queries=context.job.queries,
        measures=[recipe.measure],
        in_batch_teacher=None if recipe.live_teacher is None else str(recipe.live_teacher),
    )


def training_arguments(
    recipe: Recipe, rate: float, scale: str, context: Context, output: Path
) -> RankingTrainingArguments:
    """Return the arguments of one training."""
    evaluations = max(recipe.evaluations, math.ceil(recipe.epochs))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1_000}  # one epoch may take a day
    if evaluations > 1:
        saving = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
        saving["eval_steps"] = saving["save_steps"] = 1 / evaluations  # below 1 they are shares of the training
        saving["metric_for_best_model"] = f"eval_{recipe.measure}"
        saving["early_stopping_patience"] = recipe.patience
    has_encoder = bool(ARCHITECTURES[recipe.architecture].base_model_prefix)
    args = RankingTrainingArguments(
        str(output),
        loss=recipe.loss,
        teacher_scale=scale,
        learning_rate=rate,
        head_learning_rate=recipe.head_learning_rate,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size // processes().num_processes,
        seed=SEED + recipe.seed,
        weight_decay=0.01,
        warmup_steps=0.1,
        logging_steps=10,
        save_total_limit=2,  # with 1 the last checkpoint is removed before the ranker is saved
        resume_from_checkpoint="true",
        bf16=recipe.bf16,
        use_cpu=context.device == "cpu",
        dataloader_pin_memory=context.device != "cpu",
        data_name=context.job.data_of("train"),
        base_model=context.job.base_model if has_encoder else None,
        teacher_name=_describe_teacher(context.job, recipe.condition),
        **saving,
    )
    args._n_gpu = min(args.n_gpu, 1)  # transformers would put a batch on every GPU
    return args


def teacher_scale(recipe: Recipe, rows: Path) -> str:
    """Return the factor on the teacher's scores that suits an architecture."""
    if recipe.condition == NO_TEACHER:
        return "1"
    if ARCHITECTURES[recipe.architecture].config_class.similarity in ("dot", "max_sim"):
        return MATCH
    squares, count = 0.0, 0
    for _, columns in load_teacher_scores(rows).batches(["teacher_scores"]):
        lengths = pc.list_value_length(columns["teacher_scores"]).to_numpy()
        scores = columns["teacher_scores"].flatten().to_numpy().astype(np.float64)
        positives = np.repeat(scores[np.cumsum(lengths) - lengths], lengths)
        squares += float(np.square(positives - scores).sum())
        count += len(scores) - len(lengths)
    return f"{LAYERS_MARGIN / max(squares / count, 1e-12) ** 0.5:.6g}"


def _describe_teacher(job: DistillJob, condition: str) -> str:
    """Return in words what the students of a condition learn from."""
    if condition == NO_TEACHER:
        return "the labels"
    names = []
    for name, source in name_sources(job).items():
        if source in ARCHITECTURES:
            name = f"a {name} trained on the labels"
        names.append(name.replace(BM25, "BM25"))
    return names[0] if condition == FIRST_TEACHER else " and ".join(names)
