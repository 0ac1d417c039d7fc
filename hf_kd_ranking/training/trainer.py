"""`RankingTrainer`: a transformers Trainer whose loss compares a student's scores with a teacher's."""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..artifacts import write_json
from ..data.collate import RankingCollator, sides, split_batch
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.samplers import ShuffledSampler, TopicBalancedSampler
from ..data.texts import TextStore
from ..errors import InputError
from ..evaluation.rerank import RerankingEvaluator
from ..losses import get_losses, get_regularizers
from ..models import RankerModel, RankingProcessor
from ..models.base import check_finite
from ..ranker import Ranker
from .arguments import RankingTrainingArguments
from .callbacks import (
    FiniteLosses,
    LogWithCheckpoints,
    MatchTeacherScale,
    StepStatistics,
    StopOnTermination,
    start_worker,
)
from .checkpoints import RUN_FILE, check_run, describe_run, last_complete, written_whole
from .checks import check_data_sets, check_evaluation, check_options, check_temperature, endless
from .evaluation import filled_in, held_out_rows
from .feeding import with_stored_tokens
from .in_batch import check_gradient_cache, check_in_batch, in_batch_losses
from .lora import trainable, with_adapters
from .publishing import PublishingTrainer
from .regularization import SparsityStatistics, check_regularization, regularization_losses
from .topics import rows_of_queries, teacher_margins


class RankingTrainer(PublishingTrainer):
    """Train any ranker on teacher rows.

    Args:
        model: the student; None if `model_init` makes it. Its weights become float32.
        train_dataset: teacher rows, or a data set of one of their layouts, see `load_teacher_scores`. A
            `datasets.IterableDataset` of lists (`query_id`, `doc_ids`, `teacher_scores`) is read in its own order, as
            often as `max_steps` needs, and not checked in advance.
        queries: query_id -> text, of all rows.
        documents: doc_id -> text, of all rows.
        eval_dataset: held-out teacher rows, for `eval_loss` and `eval_pairwise_agreement`, or several by name, for
            `eval_NAME_loss` and so on, or None.
        evaluator: re-ranks held-out queries for `eval_nDCG@10` and the like, at every evaluation, or None.
        processing_class: the encoder's tokenizer.
        in_batch_teacher: a ranker that scores all pairs of a batch, for losses that begin with `in_batch_`, or None.
            Its scores are multiplied by `teacher_scale` as well.
        query_clusters: cluster of each text of `queries`, see `cluster_queries`; batches are then on one topic, see
            `TopicBalancedSampler`. None shuffles the rows.
        **kwargs: arguments of `transformers.Trainer`, for example `callbacks`, but no `data_collator`.
            `compute_loss_func(outputs, labels, num_items_in_batch)` replaces `loss`: labels are the scaled teacher
            scores (B, n), items are rows. `compute_metrics` gets the scores and the teacher's, both (N, n). Where
            lists differ in length, -100 marks the places that are filled up.

    Raises:
        InputError: for bad rows or scores, see `check_rows`; if an input that the settings need is missing; for
            arguments that make no sense together.
        TypeError: if model or args are of another class.

    Example:
        >>> queries, documents = kd.TextStore.from_tsv("queries.tsv"), kd.TextStore.from_tsv("collection.tsv")
        >>> model, tokenizer = kd.load_ranker("bert_dot"), AutoTokenizer.from_pretrained("bert_dot")
        >>> args = kd.RankingTrainingArguments("student", max_steps=2)
        >>> rows = kd.load_teacher_scores("scores.tsv")
        >>> trainer = kd.RankingTrainer(model, args, rows, queries, documents, processing_class=tokenizer)
        >>> output = trainer.train()
        {'loss': ...}
    """

    # The loss is scaled in compute_loss, by rows: exact also where the last accumulated batch is a smaller one.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RankerModel | None,
        args: RankingTrainingArguments,
        train_dataset: TeacherRows | datasets.Dataset | datasets.IterableDataset | None = None,
        queries: TextStore | None = None,
        documents: TextStore | None = None,
        eval_dataset: TeacherRows | datasets.Dataset | Mapping[str, TeacherRows | datasets.Dataset] | None = None,
        evaluator: RerankingEvaluator | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        in_batch_teacher: Ranker | None = None,
        query_clusters: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        check_options(args, model is not None, query_clusters, kwargs)
        if queries is None or documents is None or processing_class is None:
            raise InputError("RankingTrainer needs queries and documents (text stores) and a tokenizer.")
        self.evaluator = evaluator
        self.measures = set()
        self.query_clusters = query_clusters
        self.losses = {} if kwargs.get("compute_loss_func") else get_losses(args.loss)
        training = None
        if isinstance(train_dataset, datasets.IterableDataset):
            train_dataset = endless(train_dataset, args, query_clusters)
        elif train_dataset is not None:
            training = load_teacher_scores(train_dataset)
            train_dataset = training.rows
        held_out = held_out_rows(eval_dataset)
        rows_by_name = {name: rows.rows for name, rows in held_out.items()}
        eval_dataset = rows_by_name.get("", rows_by_name or None)
        check_evaluation(args, held_out, evaluator, self.losses, kwargs.get("compute_metrics") is not None)
        check_data_sets(training, held_out, evaluator, queries, documents, args, self.losses)
        self.queries, self.documents = queries, documents
        self.in_batch_teacher = self.teacher_processor = None
        if in_batch_teacher is not None:
            self.in_batch_teacher, self.teacher_processor = in_batch_teacher.model, in_batch_teacher.processor
        self.statistics = StepStatistics()
        self.sparsity = SparsityStatistics()
        try:
            super().__init__(
                model=model if model is None else self._as_student(model, args),
                args=args,
                train_dataset=train_dataset,
                # Trainer refuses to evaluate without a data set; the evaluator brings its own.
                eval_dataset=[] if eval_dataset is None and evaluator is not None else eval_dataset,
                processing_class=processing_class,
                **kwargs,
            )
        except InputError:
            raise
        except ValueError as error:  # of transformers' own arguments
            raise InputError(str(error)) from error
        self.eval_dataset = eval_dataset
        self._read_settings()
        self._share_layers()
        self.can_return_loss = True  # Trainer looks for `labels` otherwise; scores must never be named so
        self.model_accepts_loss_kwargs = False  # no model takes num_items_in_batch; compute_loss does
        if in_batch_teacher is not None:
            self.in_batch_teacher.to(self.args.device).eval().requires_grad_(False)
        self._add_callbacks()

    def _as_student(self, model: RankerModel, args: RankingTrainingArguments) -> nn.Module:
        student = trainable(model, args)
        check_in_batch(self.losses, student, self.in_batch_teacher)
        check_temperature(self.losses, student.config)
        check_regularization(get_regularizers(args.loss), student.config)
        check_gradient_cache(args.gradient_cache, self.losses, student.config)
        return student

    def _read_settings(self) -> None:
        """Take from `args` and the student's config what a trial of a search may have changed."""
        if self.compute_loss_func is None:
            self.losses = get_losses(self.args.loss)
        self.regularizers = get_regularizers(self.args.loss)
        self.teacher_scale = self.args.teacher_factor()
        vars(self).pop("train_sampler", None)
        processor = RankingProcessor.from_config(self.processing_class, self.model.config)
        self.data_collator = RankingCollator(processor, self.queries, self.documents, self.teacher_processor)
        self.finite_losses = FiniteLosses(self.data_collator.describe, is_late=self.args.device.type != "cpu")

    def _share_layers(self) -> None:
        """Tell the student if processes share its layers (FSDP, ZeRO)."""
        is_shared = self.is_fsdp_enabled or self.is_deepspeed_enabled
        for module in self.model.modules():
            if isinstance(module, RankerModel):
                module.groups_rows = not is_shared
                module.rows_at_once = self.args.gradient_cache
        if is_shared:  # left on the CPU by Trainer, where evaluation before training would take hours
            self.model.to(self.args.device)
        if self.args.lora_r is not None and is_shared:
            raise InputError("lora_r merges adapters into whole weights, which FSDP and ZeRO share; train with DDP.")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the student anew by `model_init`, with float32 weights, and adapters if `lora_r` is set."""
        return self._as_student(super().call_model_init(trial), self.args)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self._share_layers()
        if trial is not None:
            self._read_settings()

    def _add_callbacks(self) -> None:
        self.add_callback(MatchTeacherScale(self))
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.termination = StopOnTermination(self.accelerator)
        self.add_callback(self.termination)
        self.add_callback(LogWithCheckpoints())  # after all that may ask for a checkpoint

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a resumed run ends bit by bit where an uninterrupted one does.

        After SIGTERM the step is finished, a checkpoint saved, and training ends; `termination.is_asked` is then True.
        At the end LoRA adapters are saved in `adapter` of the output folder and merged, so that a ranker remains.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one of the output folder.

        Raises:
            InputError: if the checkpoint is of another model or other data.
            FloatingPointError: if a loss is not finite; names the step and its rows, and says whether the weights were
                changed. No checkpoint is written after it.
            OSError: if a checkpoint cannot be written; the ones before it stay.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise InputError(f"{self.args.output_dir} holds no complete checkpoint to resume; start afresh.")
        if resume_from_checkpoint:
            check_run(resume_from_checkpoint, self._run())
        if self.args.lora_r is not None and self.model_init is None and isinstance(self.model, RankerModel):
            # Merged at the end of an earlier run, whose optimizer has the weights of its adapters.
            self.model = self.model_wrapped = with_adapters(self.model, self.args)
            self.optimizer = self.lr_scheduler = None
        self._loader: DataLoader | None = None
        try:
            with self.termination.listening():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            if self._loader is not None:
                # Ends its workers now. A garbage collection closes their queues first, and then waits 5 s for each.
                self._loader._iterator = None
        if self.args.lora_r is not None:
            model = self.accelerator.unwrap_model(self.model)
            if self.args.should_save:
                model.save_pretrained(Path(self.args.output_dir) / "adapter")
            self.model = self.model_wrapped = model.merge_and_unload()
        return output

    def _run(self) -> dict[str, Any]:
        names = (
            "seed",
            "data_seed",
            "train_sampling_strategy",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "world_size",
        )
        order = {name: getattr(self.args, name) for name in names}
        return describe_run(self.model.config.to_dict(), self.train_dataset, **order)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent's, all or nothing; older ones are removed when this one is complete."""
        self.finite_losses.check()
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
        """The parent's step; training stops where a loss is not a number, see `FiniteLosses`."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.finite_losses.add(self.state.global_step + 1, loss, inputs)
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
        if self.compute_loss_func is not None:
            parts = {}
            labels = filled_in(teacher_scores, mask)
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            parts = self.row_losses(outputs.scores, teacher_scores, mask) | in_batch_losses(self, outputs, targets)
            parts |= regularization_losses(self, outputs, mask)
            loss = sum(parts.values())
            if num_items_in_batch is not None:
                loss = loss * (len(teacher_scores) / num_items_in_batch)
        if model.training:
            self.statistics.add(features, outputs.scores, teacher_scores, parts, mask)
            if self.model.config.vectors_per_text == "sparse":
                self.sparsity.add(outputs, mask)
        return (loss, outputs) if return_outputs else loss

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

    @cached_property
    def train_sampler(self) -> ShuffledSampler | TopicBalancedSampler | SequentialSampler:
        """The order of the training rows, seeded by `data_seed`, else `seed`, unless it is their own."""
        args = self.args
        if args.train_sampling_strategy == "sequential":
            return SequentialSampler(self.train_dataset)
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
        is_shuffled = self.args.train_sampling_strategy == "random"
        if is_shuffled and not isinstance(self.train_dataset, datasets.IterableDataset):
            self.train_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return the parent's, with batches from stored token ids if that saves work, see `with_stored_tokens`.

        Workers stay for all epochs, and survive a SIGTERM to all processes of the job.
        """
        self.data_collator = with_stored_tokens(self.data_collator, self.train_dataset, self.args)
        args, is_persistent = self.args, self.args.dataloader_persistent_workers
        # For this loader only: of the loaders of evaluation Trainer would keep the first one for all data sets.
        args.dataloader_persistent_workers = args.dataloader_num_workers > 0
        try:
            loader = super().get_train_dataloader()
        finally:
            args.dataloader_persistent_workers = is_persistent
        base = loader.base_dataloader  # accelerate's wrapper passes attributes on from it, not to it
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        self._loader = base
        return loader

    def _finalize_training(self, *args: Any) -> TrainOutput:
        self.finite_losses.check()
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
            self.finite_losses.check()
            logs |= self.statistics.pop(self.accelerator) | self.sparsity.pop(self.accelerator, self.args.loss)
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        features, _ = split_batch(inputs)
        for side in sides(features):
            super()._track_num_input_tokens(side)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the parent's estimate needs a single input tensor."""
        return 0
