"""`RankingTrainer`: a transformers Trainer whose loss compares a student's scores with a teacher's."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer

from ..data.collate import RankingCollator, split_batch
from ..data.samplers import ShuffledSampler, TopicBalancedSampler
from ..data.texts import TextStore
from ..data.triples import has_only_margins, row_name
from ..evaluation.rerank import RerankingEvaluator
from ..hub.model_card import write_model_card
from ..losses import IGNORE_TEACHER, IN_BATCH, LOSSES, check_data, get_losses, margins
from ..models import RankerModel, RankingOutput, RankingTokenizer
from ..ranker import Ranker
from .arguments import RankingTrainingArguments
from .callbacks import MatchTeacherScale, StepStatistics
from .in_batch import check_in_batch, in_batch_scores, known_positives
from .topics import rows_of_queries, teacher_margins


class RankingTrainer(Trainer):
    """Trains any ranker on teacher rows.

    Args:
        model: a ranker.
        args: the settings.
        train_dataset: teacher rows, see `load_teacher_scores`: pairs, or lists of one length.
        queries: query_id -> text, of all rows.
        documents: doc_id -> text, of all rows.
        eval_dataset: held-out teacher rows, for `eval_loss` and `eval_pairwise_agreement`; None for none.
        in_batch_teacher: a ranker that scores all pairs of a batch, for losses that begin with `in_batch_`; None for
            none. Its scores are multiplied by `teacher_scale` as well.
        query_clusters: cluster of each text of `queries`, see `cluster_queries`; batches are then on one topic, see
            `TopicBalancedSampler`. None shuffles the rows.
        evaluator: re-ranks held-out queries for `eval_nDCG@10` and the like, at every evaluation; None for none.
        processing_class: the encoder's tokenizer.
        **kwargs: of `transformers.Trainer`, for example `callbacks`.

    Raises:
        KeyError: if a row has an id that the stores lack; names the file, its line, the id and the counts.
        ValueError: if what the settings need is missing.
    """

    # The loss is scaled in compute_loss, by rows: exact also where the last accumulated batch is a smaller one.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RankerModel,
        args: RankingTrainingArguments,
        train_dataset: datasets.Dataset | None = None,
        queries: TextStore | None = None,
        documents: TextStore | None = None,
        eval_dataset: datasets.Dataset | None = None,
        evaluator: RerankingEvaluator | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        in_batch_teacher: Ranker | None = None,
        query_clusters: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        if queries is None or documents is None or processing_class is None:
            raise ValueError("RankingTrainer needs queries and documents (text stores) and a tokenizer.")
        for rows in (train_dataset, eval_dataset):
            if rows is not None:
                check_ids(rows, queries, documents)
        self.evaluator, self.query_clusters = evaluator, query_clusters
        self.losses = get_losses(args.loss)
        if train_dataset is not None:
            row = train_dataset[0]
            check_data(self.losses, len(row.get("doc_ids", "pn")), has_only_margins(train_dataset))
        check_in_batch(self.losses, model, None if in_batch_teacher is None else in_batch_teacher.model)
        self.teacher_scale = args.teacher_factor()
        self.statistics = StepStatistics()
        tokenizer = RankingTokenizer.from_config(processing_class, model.config)
        super().__init__(
            model=model,
            args=args,
            data_collator=RankingCollator(
                tokenizer, queries, documents, None if in_batch_teacher is None else in_batch_teacher.make_inputs
            ),
            train_dataset=train_dataset,
            # Trainer refuses to evaluate without a data set; the evaluator brings its own.
            eval_dataset=eval_dataset if eval_dataset is not None or evaluator is None else train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_dataset = eval_dataset
        model.groups_rows = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not model.groups_rows:  # left on the CPU by Trainer, where evaluation before training would take hours
            model.to(self.args.device)
        self.can_return_loss = True  # Trainer looks for `labels` otherwise; scores must never be named so
        self.model_accepts_loss_kwargs = False  # no model takes num_items_in_batch; compute_loss does
        self.in_batch_teacher = None
        if in_batch_teacher is not None:
            self.in_batch_teacher = in_batch_teacher.model.to(self.args.device).eval().requires_grad_(False)
        if self.teacher_scale is None:
            self.add_callback(MatchTeacherScale(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """One forward, one loss; `inputs` stay as they are.

        Args:
            num_items_in_batch: rows of all accumulated batches of this step; None for a plain batch mean.
        """
        features, targets = split_batch(inputs)
        teacher_scores = targets["teacher_scores"] * self.teacher_scale  # (B, n)
        outputs = model(**features)
        parts = self.parts_of_loss(outputs.scores, teacher_scores) | self._parts_over_the_batch(outputs, targets)
        loss = sum(parts.values())
        if model.training:
            self.statistics.add(features, outputs.scores, teacher_scores, parts)
        if num_items_in_batch is not None:
            loss = loss * (len(teacher_scores) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def parts_of_loss(self, student_scores: Tensor, teacher_scores: Tensor) -> dict[str, Tensor]:
        """Loss name -> its weighted value for (B, n) scores of the rows' own documents."""
        return {
            name: weight * LOSSES[name](student_scores, teacher_scores)
            for name, weight in self.losses.items()
            if not name.startswith(IN_BATCH)
        }

    def _parts_over_the_batch(self, outputs: RankingOutput, targets: dict[str, Any]) -> dict[str, Tensor]:
        losses = {name: weight for name, weight in self.losses.items() if name.startswith(IN_BATCH)}
        if not losses:
            return {}
        scores = in_batch_scores(self.accelerator.unwrap_model(self.model), outputs, self.accelerator)  # (B, N)
        is_known = known_positives(targets["rows"], self.accelerator)
        is_known[:, 0] = False  # the row's own positive stays
        # The teacher knows what a positive is worth; labels alone would make a negative of another positive.
        labelled = scores.masked_fill(is_known, -torch.inf)
        teacher_scores = torch.zeros_like(scores)
        if self.in_batch_teacher is not None:
            with torch.no_grad():
                outputs = self.in_batch_teacher(**targets["teacher_inputs"])
                teacher_scores = in_batch_scores(self.in_batch_teacher, outputs, self.accelerator)
        parts = {}
        for name, weight in losses.items():
            own = name.removeprefix(IN_BATCH)
            student_scores = labelled if own in IGNORE_TEACHER else scores
            parts[name] = weight * LOSSES[own](student_scores, teacher_scores * self.teacher_scale)
        return parts

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, int]:
        """The batches of one step, and their rows: the mean of the loss is over rows, not over batches."""
        with self.statistics.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["teacher_scores"]) for batch in batches)

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and agreement on held-out teacher rows, and the evaluator's measures; the same on every process."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {} if rows is None else self._agreement_with_teacher(rows)
        if self.evaluator is not None:
            ranker = Ranker(
                self.model,
                self.processing_class,
                self.args.per_device_eval_batch_size,
                # Shares differ in their number of forwards, where all processes must make as many: each scores all.
                is_distributed=self.args.world_size > 1 and self.model.groups_rows,
            )
            metrics |= self.evaluator(ranker)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _agreement_with_teacher(self, rows: datasets.Dataset) -> dict[str, float]:
        self.model.eval()
        student, teacher = [], []
        with torch.no_grad():
            for batch in self.get_eval_dataloader(rows):
                features, targets = split_batch(self._prepare_inputs(batch))
                scores = targets["teacher_scores"], self.model(**features).scores
                # Gathered before the mean: batches differ in size, and the last is filled up with repeated rows.
                gathered = self.accelerator.gather_for_metrics(scores)
                teacher.append(gathered[0])
                student.append(gathered[1])
        student, teacher = torch.cat(student), torch.cat(teacher)
        student_margins, teacher_margins = margins(student, teacher)
        metrics = {"pairwise_agreement": ((student_margins > 0) == (teacher_margins > 0)).float().mean().item()}
        if self.teacher_scale is not None:  # not matched yet, so there is no loss yet
            parts = self.parts_of_loss(student, teacher * self.teacher_scale)
            metrics |= {"loss": sum(parts.values()).item()} if parts else {}
        return metrics

    @cached_property
    def train_sampler(self) -> ShuffledSampler | TopicBalancedSampler:
        """The order of the training rows, seeded by `data_seed`, else `seed`."""
        args, rows = self.args, self.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        if self.query_clusters is None:
            return ShuffledSampler(rows, seed)
        return TopicBalancedSampler(
            rows_of_queries(rows, self.data_collator.queries),
            teacher_margins(rows),
            self.query_clusters,
            args.train_batch_size * args.world_size,
            seed,
            args.margin_bins,
        )

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int]:
        return self.train_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The parent's optimizer, with the ranker's own layers at `head_learning_rate`."""
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is None:
            return optimizer
        in_head = {id(parameter) for parameter in self.model.head_parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) in in_head]
            if head:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_head]
                settings = {name: value for name, value in group.items() if name != "params"}
                optimizer.add_param_group(settings | {"params": head, "lr": self.args.head_learning_rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log line, with the statistics of the steps since the last one."""
        if "loss" in logs:
            logs |= self.statistics.pop(self.accelerator)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the parent's formula takes one input tensor."""
        return 0

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the model card into the output folder: data, teacher, settings and measured results."""
        if not self.is_world_process_zero():
            return
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        write_model_card(
            self.args.output_dir,
            name=model_name or self.args.output_dir,
            config=self.model.config.to_dict(),
            arguments=self.args.to_dict(),
            results=evaluations[-1] if evaluations else {},
            training_rows=0 if self.train_dataset is None else len(self.train_dataset),
        )


def check_ids(rows: datasets.Dataset, queries: TextStore, documents: TextStore, batch_size: int = 1_000_000) -> None:
    """Look up every id of teacher rows before training starts.

    Raises:
        KeyError: naming the file and line of the first row with an id that is not there, the id, and how many rows.
    """
    stores = {"query_id": queries} | {
        name: documents for name in ("pos_id", "neg_id", "doc_ids") if name in rows.column_names
    }
    table = rows.select_columns(list(stores)).with_format("arrow")
    for start in range(0, len(rows), batch_size):
        batch = table[start : start + batch_size]
        for name, store in stores.items():
            column = batch[name].combine_chunks()
            is_list = name == "doc_ids"
            ids = (column.flatten() if is_list else column).to_numpy(zero_copy_only=False)
            missing = np.flatnonzero(store.rows_of(ids) < 0)
            if len(missing):
                row = start + missing[0] // (len(ids) // len(column))
                raise KeyError(
                    f"{row_name(rows, int(row))}: {name} {str(ids[missing[0]])!r} is not among the {len(store):,} "
                    f"texts of {store.source} ({len(missing):,} of {len(ids):,} ids looked up are not); do scores "
                    "and texts belong to one release?"
                )
