"""`RankingTrainer`: a transformers Trainer whose loss compares a student's scores with a teacher's."""

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from ..data.collate import RankingCollator, split_batch
from ..data.rows import has_only_margins
from ..data.samplers import ShuffledSampler, TopicBalancedSampler
from ..data.texts import TextStore
from ..evaluation.rerank import RerankingEvaluator
from ..hub.manifest import measures_of, write_manifest
from ..hub.model_card import write_model_card
from ..hub.publish import publish_ranker
from ..losses import IGNORE_TEACHER, IN_BATCH, LOSSES, check_data, get_losses, margins
from ..models import RankerModel, RankingOutput, RankingProcessor
from ..models.base import check_finite
from ..ranker import Ranker
from .arguments import RankingTrainingArguments
from .callbacks import LogWithCheckpoints, MatchTeacherScale, StepStatistics, StopOnTermination, start_worker
from .checkpoints import check_run, describe_run, last_complete, mark_complete, written_whole
from .checks import check_data_sets, endless
from .in_batch import check_in_batch, in_batch_scores, known_positives
from .lora import merge_adapters, with_adapters
from .topics import rows_of_queries, teacher_margins


class RankingTrainer(Trainer):
    """Trains any ranker on teacher rows.

    Args:
        model: a ranker.
        args: the settings.
        train_dataset: teacher rows, see `load_teacher_scores`: pairs, or lists of one length. A stream of them is read
            in its own order, as often as `max_steps` needs, and its ids are looked up as they come.
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
        KeyError, ValueError: for bad rows or scores, see `check_rows`; if what the settings need is missing.
    """

    # The loss is scaled in compute_loss, by rows: exact also where the last accumulated batch is a smaller one.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RankerModel,
        args: RankingTrainingArguments,
        train_dataset: datasets.Dataset | datasets.IterableDataset | None = None,
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
        if isinstance(train_dataset, datasets.IterableDataset):
            if query_clusters is not None:
                raise ValueError("Batches on one topic need all rows at hand, got a stream; leave query_clusters out.")
            train_dataset = endless(train_dataset, args)
        self.evaluator, self.query_clusters = evaluator, query_clusters
        self.losses = get_losses(args.loss)
        if train_dataset is not None:
            row = next(iter(train_dataset), {})
            check_data(self.losses, len(row.get("doc_ids", "pn")), has_only_margins(train_dataset))
        check_data_sets(train_dataset, eval_dataset, evaluator, queries, documents, args)
        check_in_batch(self.losses, model, None if in_batch_teacher is None else in_batch_teacher.model)
        self.teacher_scale = args.teacher_factor()
        self.statistics = StepStatistics()
        tokenizer = RankingProcessor.from_config(processing_class, model.config)
        super().__init__(
            model=with_adapters(model, args),
            args=args,
            data_collator=RankingCollator(
                tokenizer, queries, documents, None if in_batch_teacher is None else in_batch_teacher.processor
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
        if args.lora_r is not None and not model.groups_rows:
            raise ValueError("lora_r merges adapters into whole weights, which FSDP and ZeRO share; train with DDP.")
        self.can_return_loss = True  # Trainer looks for `labels` otherwise; scores must never be named so
        self.model_accepts_loss_kwargs = False  # no model takes num_items_in_batch; compute_loss does
        self.in_batch_teacher = None
        if in_batch_teacher is not None:
            self.in_batch_teacher = in_batch_teacher.model.to(self.args.device).eval().requires_grad_(False)
        if self.teacher_scale is None:
            self.add_callback(MatchTeacherScale(self))
        self.termination = StopOnTermination(self.accelerator)
        self.add_callback(self.termination)
        self.add_callback(LogWithCheckpoints())  # behind all that may ask for a checkpoint

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; a resumed run ends bit by bit where an uninterrupted one does.

        After SIGTERM the step is finished, a checkpoint saved, and training ends; `termination.is_asked` tells.
        LoRA adapters are at the end saved in `adapter` of the output folder and merged, so that a ranker remains.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one of the output folder.

        Raises:
            ValueError: if the checkpoint is of another model or other data.
            FloatingPointError: if a loss is not finite; names the step and its rows.
            OSError: if a checkpoint cannot be written; the ones before it stay.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to go on from; start afresh.")
        if resume_from_checkpoint:
            check_run(resume_from_checkpoint, self._run())
        with self.termination.listening():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.lora_r is not None:
            folder = Path(self.args.output_dir) / "adapter" if self.args.should_save else None
            self.model = self.model_wrapped = merge_adapters(self.accelerator.unwrap_model(self.model), folder)
        return output

    def _run(self) -> dict[str, Any]:
        args = self.args
        names = ("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
        order = {name: getattr(args, name) for name in names}
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
                    mark_complete(checkpoint, self._run())
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        if push:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None) -> Tensor:
        """The parent's step, stopped before the weights change where the loss is not a number."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            rows, texts = inputs["rows"], self.data_collator
            queries = texts.queries.ids_of(rows["query"].cpu().numpy())
            documents = [texts.documents.ids_of(row) for row in rows["document"].cpu().numpy()]
            ids = "; ".join(f"{query}: {', '.join(own)}" for query, own in zip(queries, documents, strict=True))
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; the weights were not changed by it. "
                "Try a lower learning_rate, bf16 in place of fp16, and look at the teacher's scores (`teacher "
                f"diagnose`). Its batch has the queries and documents {ids}."
            )
        return loss

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
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the parent would train one step more
            self.control.should_training_stop = True
            return [], 0
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

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # Resumed within an epoch on several processes, the parent does not reach the sampler, behind accelerate's
        # wrappers that skip and share batches; it would read the first epoch's order again.
        if not isinstance(self.train_dataset, datasets.IterableDataset):
            self.train_sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The parent's, with workers that outlive a SIGTERM to all processes of the job."""
        loader = super().get_train_dataloader()
        base = loader.base_dataloader  # accelerate's wrapper hands attributes on from it, not to it
        base.worker_init_fn = partial(start_worker, base.worker_init_fn)
        return loader

    def _finalize_training(self, *args: Any) -> TrainOutput:
        if self.termination.is_asked:
            # Else the best model is loaded, and with save_total_limit 1 the checkpoint just saved deleted.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

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

    def create_model_card(
        self,
        model_name: str | None = None,
        results: Mapping[str, Any] | None = None,
        files: Mapping[str, str | None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `manifest.json` and the model card beside the saved weights; see `write_manifest` for the arguments.

        Without `results` they are those of the last evaluation.
        """
        if not self.is_world_process_zero():
            return
        if results is None:
            results = {"after": next(filter(None, map(measures_of, reversed(self.state.log_history))), {})}
        write_manifest(self.args.output_dir, self.args.to_dict(), self._training_rows(), results, files or {})
        write_model_card(self.args.output_dir, model_name or self.args.hub_model_id)

    def push_to_hub(self, *args: Any, token: str | None = None, **kwargs: Any) -> str | None:
        """Save weights and card (`kwargs` are `create_model_card`'s), publish the folder, see `publish_ranker`.

        Returns:
            The commit's address; None on other processes than the first.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        options = {"overwrite": True, "token": token or self.args.hub_token}
        return publish_ranker(self.args.output_dir, self.hub_model_id, **options)["address"]

    def _training_rows(self) -> int:
        if isinstance(self.train_dataset, datasets.IterableDataset):  # a stream has no length: the rows of all steps
            args = self.args
            rows = self.state.global_step * args.gradient_accumulation_steps * args.train_batch_size
            return rows * args.world_size
        return 0 if self.train_dataset is None else len(self.train_dataset)
