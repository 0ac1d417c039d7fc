"""Evaluation while training: a student against its teacher on held-out rows, and the measures of an evaluator."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from ..data.collate import split_batch
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.runs import Run
from ..errors import InputError
from ..losses import IN_BATCH, get_loss, listed_margins
from ..ranker import Ranker

# Scores at documents that only fill up a list, in predictions and labels; transformers ignores this label as well.
FILLED_IN = -100.0


def filled_in(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return scores (B, n) with `FILLED_IN` at documents that are not listed."""
    return scores if mask is None else scores.masked_fill(~mask, FILLED_IN)


def held_out_rows(eval_dataset: Any) -> dict[str, TeacherRows]:
    """Return the data sets of an evaluation by name: a single one is named "", None gives none."""
    if eval_dataset is None:
        return {}
    data_sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    return {name: load_teacher_scores(rows) for name, rows in data_sets.items()}


class TeacherAgreement:
    """Sums over the batches of one evaluation, the same on every process.

    `metrics` are `pairwise_agreement`, the share of pairs that student and teacher order alike, and `loss`, once the
    trainer knows its `teacher_scale`.
    """

    def __init__(self, trainer: "EvaluatingTrainer") -> None:
        self.trainer = trainer
        self._pairs: list[Tensor] = []  # of each batch: pairs ordered alike, pairs
        self._losses: list[Tensor] = []  # of each batch: the sum of its rows' losses, rows

    @torch.no_grad()
    def add(self, scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> None:
        """Count a batch of this process: scores (B, n), and the mask of the listed documents."""
        accelerator = self.trainer.accelerator
        is_listed = torch.ones_like(teacher_scores) if mask is None else mask.float()
        batch = torch.stack([scores, teacher_scores, is_listed], dim=-1)  # (B, n, 3)
        # Gathered before any mean: batches differ in size, and the last is filled up with repeated rows.
        batch = accelerator.gather_for_metrics(accelerator.pad_across_processes(batch, dim=1))
        student, teacher, is_listed = batch.unbind(-1)
        mask = None if is_listed.all() else is_listed.bool()
        student_margins, teacher_margins = listed_margins(student, teacher, mask)
        is_agreed = (student_margins > 0) == (teacher_margins > 0)
        self._pairs.append(torch.stack([is_agreed.sum(), torch.tensor(is_agreed.numel(), device=student.device)]))
        loss = self.trainer.row_loss(student, teacher, mask)
        if loss is not None:
            self._losses.append(torch.stack([len(student) * loss, torch.tensor(len(student), device=student.device)]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all batches; empty if there were none with a teacher."""
        metrics = {}
        for name, batches in (("pairwise_agreement", self._pairs), ("loss", self._losses)):
            if batches:
                total, count = torch.stack(batches).cpu().double().sum(0).tolist()
                metrics[name] = total / count
        return metrics


class EvaluatingTrainer(Trainer):
    """The part of `RankingTrainer` that evaluates.

    `losses` (loss name -> weight), `teacher_scale` (None until it is matched), `evaluator` (ranker -> measures, or
    None) and `measures` (the names of what it measured) are set there.
    """

    losses: dict[str, float]
    teacher_scale: float | None
    evaluator: Callable[[Ranker], dict[str, float]] | None
    measures: set[str]
    agreement: TeacherAgreement

    @property
    def ranker(self) -> Ranker:
        """The model as it is now, with its tokenizer."""
        # Processes with different shares would make different numbers of forward passes, which sharded models do not
        # allow: there each process scores everything.
        is_distributed = self.args.world_size > 1 and self.model.groups_rows
        batch_size = self.args.per_device_eval_batch_size
        return Ranker(self.model, self.processing_class, batch_size, is_distributed=is_distributed)

    def row_losses(self, student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return loss name -> its weighted value for (B, n) scores of the rows' own documents."""
        values = {}
        for name, weight in self.losses.items():
            if not name.startswith(IN_BATCH):
                values[name] = weight * get_loss(name).function(student_scores, teacher_scores, mask=mask)
        return values

    def row_loss(self, student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the sum of `row_losses` for scores on the teacher's own scale; None without such losses or scale."""
        if self.teacher_scale is None:
            return None
        losses = self.row_losses(student_scores, teacher_scores * self.teacher_scale, mask)
        return sum(losses.values()) if losses else None

    def evaluate(
        self,
        eval_dataset: TeacherRows | datasets.Dataset | Mapping[str, TeacherRows | datasets.Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return loss and agreement on held-out teacher rows, and the evaluator's measures, on every process.

        Before, during and after training it computes in the precision of training.

        Args:
            eval_dataset: see the class; None takes the trainer's own, if it has one.
            ignore_keys: see `predict`; read only with `compute_metrics`.
            metric_key_prefix: put before the name of every measure; the name of a data set follows it.

        Raises:
            InputError: if there are neither rows nor an evaluator; for rows without scores.
        """
        if eval_dataset is None and self.eval_dataset is None and self.evaluator is None:
            raise InputError("evaluate needs held-out teacher rows (eval_dataset), or a trainer with an evaluator.")
        self._memory_tracker.start()
        metrics = {}
        if eval_dataset is not None:
            for name, rows in held_out_rows(eval_dataset).items():
                rows.check_scores()
                loader = self.get_test_dataloader(rows.rows)  # not get_eval_dataloader, which may keep an earlier one
                metrics |= self._evaluate_rows(loader, name, ignore_keys, metric_key_prefix)
        elif isinstance(self.eval_dataset, dict):
            for name in self.eval_dataset:
                metrics |= self._evaluate_rows(self.get_eval_dataloader(name), name, ignore_keys, metric_key_prefix)
        elif self.eval_dataset is not None:
            metrics |= self._evaluate_rows(self.get_eval_dataloader(), "", ignore_keys, metric_key_prefix)
        if self.evaluator is not None:
            with self.accelerator.autocast():
                measures = self.evaluator(self.ranker)
            self.measures |= measures.keys()
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def rerank(self) -> Run:
        """Return the evaluator's candidates in the order of the student, in the precision of `evaluate`."""
        with self.accelerator.autocast():
            return self.evaluator.rerank(self.ranker)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # an evaluation is of all rows
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _evaluate_rows(
        self, loader: DataLoader, name: str, ignore_keys: list[str] | None, prefix: str
    ) -> dict[str, float]:
        prefix = f"{prefix}_{name}" if name else prefix
        loss_only = True if self.compute_metrics is None else None  # nobody else reads the predictions
        return self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, prefix).metrics

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search as the parent does; without `compute_objective` for the lowest `eval_loss`.

        The parent would add up all measures, of which some are better the higher, and some the lower they are.
        """
        if compute_objective is None:
            if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
                raise InputError("hyperparameter_search needs compute_objective, or one eval_dataset for eval_loss.")
            compute_objective = itemgetter("eval_loss")
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def predict(
        self,
        test_dataset: TeacherRows | datasets.Dataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Return the scores of teacher rows, (N, n), the teacher's as labels, loss and agreement.

        Args:
            test_dataset: rows, with or without teacher scores.
            ignore_keys: None returns scores only; with a list, all outputs but those named are returned, the vectors
                of every token among them.
            metric_key_prefix: put before the name of every measure.
        """
        return super().predict(load_teacher_scores(test_dataset).rows, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the parent's loop in the precision of training; the loss is the mean over rows, not over batches."""
        self.agreement = TeacherAgreement(self)
        with self.accelerator.autocast():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
        for name, value in self.agreement.metrics().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Return the loss of a batch, its scores (B, n), and the teacher's as labels; see `predict`."""
        features, targets = split_batch(self._prepare_inputs(inputs))
        teacher_scores, mask = targets.get("teacher_scores"), targets.get("is_listed")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**features)
            scores = outputs.scores.float()
            loss = labels = None
            if teacher_scores is not None:
                labels = filled_in(teacher_scores, mask)
                self.agreement.add(scores, teacher_scores, mask)
                loss = self.row_loss(scores, teacher_scores, mask)
                if self.compute_loss_func is not None and self.teacher_scale is not None:
                    scaled = filled_in(teacher_scores * self.teacher_scale, mask)
                    loss = self.compute_loss_func(outputs, scaled, num_items_in_batch=len(scores))
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            return loss, filled_in(scores, mask), labels
        left_out = [*ignore_keys, "loss"]
        return loss, tuple(value for name, value in outputs.items() if name not in left_out), labels
