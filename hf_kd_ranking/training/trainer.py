"""`RankingTrainer`: a transformers Trainer whose loss compares a student's scores with a teacher's."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..artifacts import write_json
from ..data.collate import RankingCollator, split_batch
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.samplers import ShuffledSampler, TopicBalancedSampler
from ..data.texts import TextStore
from ..errors import InputError
from ..evaluation.rerank import RerankingEvaluator
from ..hub.manifest import select_measures, write_manifest
from ..hub.model_card import write_model_card
from ..hub.publish import publish_ranker
from ..losses import IN_BATCH, LOSSES, get_losses
from ..models import RankerModel, RankingProcessor
from ..models.base import check_finite
from ..ranker import Ranker
from .agreement import compare_with_teacher
from .arguments import RankingTrainingArguments
from .callbacks import LogWithCheckpoints, MatchTeacherScale, StepStatistics, StopOnTermination, start_worker
from .checkpoints import RUN_FILE, check_run, describe_run, last_complete, written_whole
from .checks import check_data_sets, endless
from .in_batch import check_in_batch, in_batch_losses
from .lora import with_adapters
from .topics import rows_of_queries, teacher_margins


class RankingTrainer(Trainer):
    """Train any ranker on teacher rows.

    Args:
        train_dataset: teacher rows, or a data set of one of their layouts, see `load_teacher_scores`. A
            `datasets.IterableDataset` of lists (`query_id`, `doc_ids`, `teacher_scores`) is read in its own order, as
            often as `max_steps` needs, and not checked in advance.
        queries: query_id -> text, of all rows.
        documents: doc_id -> text, of all rows.
        eval_dataset: held-out teacher rows, for `eval_loss` and `eval_pairwise_agreement`, or None.
        evaluator: re-ranks held-out queries for `eval_nDCG@10` and the like, at every evaluation, or None.
        processing_class: the encoder's tokenizer.
        in_batch_teacher: a ranker that scores all pairs of a batch, for losses that begin with `in_batch_`, or None.
            Its scores are multiplied by `teacher_scale` as well.
        query_clusters: cluster of each text of `queries`, see `cluster_queries`; batches are then on one topic, see
            `TopicBalancedSampler`. None shuffles the rows.
        **kwargs: arguments of `transformers.Trainer`, for example `callbacks`.

    Raises:
        InputError: for bad rows or scores, see `check_rows`; if an input that the settings need is missing.
    """

    # The loss is scaled in compute_loss, by rows: exact also where the last accumulated batch is a smaller one.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RankerModel,
        args: RankingTrainingArguments,
        train_dataset: TeacherRows | datasets.Dataset | datasets.IterableDataset | None = None,
        queries: TextStore | None = None,
        documents: TextStore | None = None,
        eval_dataset: TeacherRows | datasets.Dataset | None = None,
        evaluator: RerankingEvaluator | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        in_batch_teacher: Ranker | None = None,
        query_clusters: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        if queries is None or documents is None or processing_class is None:
            raise InputError("RankingTrainer needs queries and documents (text stores) and a tokenizer.")
        self.evaluator = evaluator
        self.query_clusters = query_clusters
        self.losses = get_losses(args.loss)
        training = held_out = None
        if isinstance(train_dataset, datasets.IterableDataset):
            train_dataset = endless(train_dataset, args, query_clusters)
        elif train_dataset is not None:
            training = load_teacher_scores(train_dataset)
            train_dataset = training.rows
        if eval_dataset is not None:
            held_out = load_teacher_scores(eval_dataset)
            eval_dataset = held_out.rows
        check_data_sets(training, held_out, evaluator, queries, documents, args)
        self.in_batch_teacher = teacher_processor = None
        if in_batch_teacher is not None:
            self.in_batch_teacher, teacher_processor = in_batch_teacher.model, in_batch_teacher.processor
        check_in_batch(self.losses, model, self.in_batch_teacher)
        self.teacher_scale = args.teacher_factor()
        self.statistics = StepStatistics()
        processor = RankingProcessor.from_config(processing_class, model.config)
        super().__init__(
            model=with_adapters(model, args),
            args=args,
            data_collator=RankingCollator(processor, queries, documents, teacher_processor),
            train_dataset=train_dataset,
            # Trainer refuses to evaluate without a data set; the evaluator brings its own.
            eval_dataset=train_dataset if eval_dataset is None and evaluator is not None else eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.eval_dataset = eval_dataset
        model.groups_rows = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if not model.groups_rows:  # left on the CPU by Trainer, where evaluation before training would take hours
            model.to(self.args.device)
        if args.lora_r is not None and not model.groups_rows:
            raise InputError("lora_r merges adapters into whole weights, which FSDP and ZeRO share; train with DDP.")
        self.can_return_loss = True  # Trainer looks for `labels` otherwise; scores must never be named so
        self.model_accepts_loss_kwargs = False  # no model takes num_items_in_batch; compute_loss does
        if in_batch_teacher is not None:
            self.in_batch_teacher.to(self.args.device).eval().requires_grad_(False)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        if self.teacher_scale is None:
            self.add_callback(MatchTeacherScale(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.termination = StopOnTermination(self.accelerator)
        self.add_callback(self.termination)
        self.add_callback(LogWithCheckpoints())  # after all that may ask for a checkpoint

    @property
    def ranker(self) -> Ranker:
        """The model as it is now, with its tokenizer."""
        # Processes with different shares would make different numbers of forward passes, which sharded models do not
        # allow: there each process scores everything.
        is_distributed = self.args.world_size > 1 and self.model.groups_rows
        batch_size = self.args.per_device_eval_batch_size
        return Ranker(self.model, self.processing_class, batch_size, is_distributed=is_distributed)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a resumed run ends bit by bit where an uninterrupted one does.

        After SIGTERM the step is finished, a checkpoint saved, and training ends; `termination.is_asked` is then True.
        At the end LoRA adapters are saved in `adapter` of the output folder and merged, so that a ranker remains.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one of the output folder.

        Raises:
            InputError: if the checkpoint is of another model or other data.
            FloatingPointError: if a loss is not finite; names the step and its rows.
            OSError: if a checkpoint cannot be written; the ones before it stay.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} holds no complete checkpoint to resume; start afresh.")
        if resume_from_checkpoint:
            check_run(resume_from_checkpoint, self._run())
        with self.termination.listening():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.lora_r is not None:
            model = self.accelerator.unwrap_model(self.model)
            if self.args.should_save:
                model.save_pretrained(Path(self.args.output_dir) / "adapter")
            self.model = self.model_wrapped = model.merge_and_unload()
        return output

    def _run(self) -> dict[str, Any]:
        names = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        order = {name: getattr(self.args, name) for name in names}
        return describe_run(self.model.config.to_dict(), self.train_dataset, **order)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, all or nothing; older ones are removed when this one is complete."""
        check_finite(self.model, f"step {self.state.global_step}")
        args, folder = self.args, Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        limit, push = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False  # both when it is complete
        try:
            with written_whole(checkpoint, args.should_save):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process writes its random state
                if args.should_save:
                    write_json(checkpoint / RUN_FILE, self._run())
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        if push:
            self._push_from_checkpoint(str(checkpoint))
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None) -> Tensor:
        """The parent's step, stopped before the weights change where the loss is not a number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; the weights were not changed by it. "
                "Try a lower learning_rate, bf16 in place of fp16, and `teacher diagnose`. The queries and documents "
                f"of its batch: {self.data_collator.describe(inputs)}."
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Tensor | tuple[Tensor, Any]:
        """Compute the loss in one forward pass; `inputs` stay as they are.

        `num_items_in_batch` is the rows of all accumulated batches of this step; None gives a plain batch mean.
        """
        features, targets = split_batch(inputs)
        teacher_scores = targets["teacher_scores"] * self.teacher_scale  # (B, n)
        mask = targets.get("is_listed")
        outputs = model(**features)
        parts = self.row_losses(outputs.scores, teacher_scores, mask) | in_batch_losses(self, outputs, targets)
        loss = sum(parts.values())
        if model.training:
            self.statistics.add(features, outputs.scores, teacher_scores, parts, mask)
        if num_items_in_batch is not None:
            loss = loss * (len(teacher_scores) / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def row_losses(self, student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return loss name -> its weighted value for (B, n) scores of the rows' own documents."""
        values = {}
        for name, weight in self.losses.items():
            if not name.startswith(IN_BATCH):
                values[name] = weight * LOSSES[name].function(student_scores, teacher_scores, mask=mask)
        return values

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, int]:
        """Return the batches of one step and their number of rows: the mean of the loss is over rows, not batches."""
        if self._is_over():  # resumed at its end: the parent would train one more step
            self.control.should_training_stop = True
            return [], 0
        with self.statistics.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(len(batch["teacher_scores"]) for batch in batches)

    def _is_over(self) -> bool:
        is_stopped = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                is_stopped |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
        return is_stopped or self.state.global_step >= self.state.max_steps

    def evaluate(
        self,
        eval_dataset: TeacherRows | datasets.Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return loss and agreement on held-out teacher rows, and the evaluator's measures, on every process.

        `ignore_keys` is not used; without a data set the trainer's own is taken, if it has one.
        """
        rows = self.eval_dataset if eval_dataset is None else load_teacher_scores(eval_dataset).rows
        metrics = {} if rows is None else compare_with_teacher(self, rows)
        if self.evaluator is not None:
            metrics |= self.evaluator(self.ranker)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @cached_property
    def train_sampler(self) -> ShuffledSampler | TopicBalancedSampler:
        """The order of the training rows, seeded by `data_seed`, else `seed`."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if self.query_clusters is None:
            return ShuffledSampler(self.train_dataset, seed)
        rows = TeacherRows(self.train_dataset)
        queries, margins = rows_of_queries(rows, self.data_collator.queries), teacher_margins(rows)
        batch_size = args.train_batch_size * args.world_size
        return TopicBalancedSampler(queries, margins, self.query_clusters, batch_size, seed, args.margin_bins)

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # When the parent resumes within an epoch on several processes, accelerate's wrappers that skip and share
        # batches hide the sampler from it; it would read the first epoch's order again.
        if not isinstance(self.train_dataset, datasets.IterableDataset):
            self.train_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's, with workers that survive a SIGTERM to all processes of the job."""
        loader = super().get_train_dataloader()
        base = loader.base_dataloader  # accelerate's wrapper passes attributes on from it, not to it
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        return loader

    def _finalize_training(self, *args: Any) -> TrainOutput:
        if self.termination.is_asked:
            # Otherwise the best model is loaded, and with save_total_limit 1 the checkpoint just saved is deleted.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int]:
        return self.train_sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the parent's optimizer, with the ranker's own layers at `head_learning_rate`."""
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is None:
            return optimizer
        in_head = {id(parameter) for parameter in self.model.head_parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) in in_head]
            if head:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in in_head]
                optimizer.add_param_group({**group, "params": head, "lr": self.args.head_learning_rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the parent's line with the statistics of the steps since the last one."""
        if "loss" in logs:
            logs |= self.statistics.pop(self.accelerator)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the parent's estimate needs a single input tensor."""
        return 0

    def create_model_card(
        self,
        model_name: str | None = None,
        results: Mapping[str, Any] | None = None,
        files: Mapping[str, str | None] | None = None,
        command: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `manifest.json` and the model card into the folder of the saved weights.

        Args:
            model_name: name on the card; None is the repository's.
            results, files, command: see `write_manifest`; without results the last evaluation is taken.
        """
        if not self.is_world_process_zero():
            return
        if results is None:
            measured = [measures for measures in map(select_measures, self.state.log_history) if measures]
            results = {"after": measured[-1] if measured else {}}
        arguments = self.args.to_dict()
        write_manifest(self.args.output_dir, arguments, self._training_rows(), results, files or {}, command=command)
        write_model_card(self.args.output_dir, model_name or self.args.hub_model_id)

    def push_to_hub(self, *args: Any, token: str | None = None, **kwargs: Any) -> str | None:
        """Save weights and card, publish the folder, and return the commit's address (None but on the first process).

        Args:
            token: access token of the Hub; None takes `hub_token`, or the one that is logged in.
            **kwargs: arguments of `create_model_card`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        return publish_ranker(self.args.output_dir, self.hub_model_id, overwrite=True, token=token)["address"]

    def _training_rows(self) -> int:
        if isinstance(self.train_dataset, datasets.Dataset):
            return len(self.train_dataset)
        return self.state.global_step * self.get_total_train_batch_size(self.args)  # of a stream, or 0
