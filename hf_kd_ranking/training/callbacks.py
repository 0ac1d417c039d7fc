"""Statistics of the log lines, the teacher's scale, and SIGTERM, while training runs."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..data.collate import split_batch
from ..errors import InputError
from ..losses import listed_margins, spread


class StepStatistics:
    """Sum statistics over the steps between two log lines, on the device, so that no step waits for a sum.

    Logged: `pairwise_agreement`, the share of pairs that student and teacher order alike; mean and standard deviation
    of `student_margin` and `teacher_margin` (positive minus negative, the teacher's after scaling); `padding_share`,
    the share of token positions that are padding; `tokens_per_second`, real tokens over all processes;
    `data_wait_share`, the share of the time that this process waited for batches; and with several losses the weighted
    mean of each, as `loss_NAME`.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._names: tuple[str, ...] = ()  # names of the losses
        self._started: float | None = None
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data; start the clock if it is not running."""
        started = time.perf_counter()
        if self._started is None:
            self._started = started
        yield
        self._waited += time.perf_counter() - started

    @torch.no_grad()
    def add(
        self,
        features: Mapping[str, Any],
        student_scores: Tensor,
        teacher_scores: Tensor,
        losses: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Count a batch: the student's inputs, scores (B, n) and mask as for losses, and the value of each loss."""
        student, teacher = listed_margins(student_scores, teacher_scores, mask)
        sides = [side for side in features.values() if isinstance(side, Mapping)] or [features]
        sums = [student.numel(), ((student > 0) == (teacher > 0)).sum()]
        sums.append(sum(side["attention_mask"].sum() for side in sides))
        sums.append(sum(side["attention_mask"].numel() for side in sides))
        sums += [student.sum(), student.square().sum(), teacher.sum(), teacher.square().sum()]
        if losses is not None and len(losses) > 1:
            self._names = tuple(losses)
            rows = len(student_scores)
            sums.append(rows)
            for value in losses.values():
                sums.append(rows * value)
        # float64, if the device has it: in float32 sums of squares lose the variance after some thousand batches.
        dtype = torch.float32 if student.device.type == "mps" else torch.float64
        sums = torch.stack([torch.as_tensor(value, device=student.device).to(dtype) for value in sums])
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the statistics since the last call, over all processes."""
        if self._sums is None or self._started is None:
            return {}
        seconds = time.perf_counter() - self._started
        totals = accelerator.reduce(self._sums, "sum").tolist()
        pairs, agreement, tokens, positions, *moments = totals[:8]
        statistics = {"pairwise_agreement": agreement / pairs}
        for name, total, squares in zip(("student", "teacher"), moments[::2], moments[1::2], strict=True):
            statistics[f"{name}_margin"] = total / pairs
            statistics[f"{name}_margin_std"] = max(squares / pairs - (total / pairs) ** 2, 0.0) ** 0.5
        for name, total in zip(self._names, totals[9:], strict=True):
            statistics[f"loss_{name}"] = total / totals[8]
        statistics["padding_share"] = 1 - tokens / positions
        statistics["tokens_per_second"] = tokens / seconds
        statistics["data_wait_share"] = self._waited / seconds
        self._sums = self._started = None
        self._waited = 0.0
        return statistics


class MatchTeacherScale(TrainerCallback):
    """Set the trainer's factor on teacher scores so that the teacher's margins have the student's spread.

    The factor is the ratio of root mean square margins, student over teacher, on the first rows that training reads,
    before the first step and without dropout. It is logged, and so kept in `trainer_state.json`, from where a resumed
    run takes it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the factor from the state, or measure it, unless it is given."""
        if args.teacher_factor() is not None:
            return
        for entry in reversed(state.log_history):
            if "teacher_scale" in entry:
                self.trainer.teacher_scale = entry["teacher_scale"]
                return
        student, teacher = self._margins()
        spreads = {"student_spread": spread(student), "teacher_spread": spread(teacher)}
        if 0 in spreads.values():
            raise InputError(
                f"teacher_scale 'match' needs margins that are not all zero on the first {len(student)} pairs, got "
                f"{spreads}; give a number."
            )
        self.trainer.teacher_scale = spreads["student_spread"] / spreads["teacher_spread"]
        self.trainer.log({"teacher_scale": self.trainer.teacher_scale, **spreads})

    @torch.no_grad()
    def _margins(self) -> tuple[Tensor, Tensor]:
        """Return the listed margins of student and teacher on the rows of 8 steps; every process reads all of them."""
        trainer = self.trainer
        if not isinstance(trainer.train_dataset, Sized):
            raise InputError("teacher_scale 'match' needs rows that can be read twice, got a stream; give a number.")
        model = trainer.model_wrapped.eval()
        rows = iter(trainer.train_sampler)
        student_margins, teacher_margins = [], []
        for _ in range(8 * trainer.args.world_size):
            chosen = list(islice(rows, trainer.args.per_device_train_batch_size))
            if not chosen:
                break
            batch = trainer.data_collator([trainer.train_dataset[row] for row in chosen])
            features, targets = split_batch(trainer._prepare_inputs(batch))
            scores = model(**features).scores
            student, teacher = listed_margins(scores, targets["teacher_scores"], targets.get("is_listed"))
            student_margins.append(student)
            teacher_margins.append(teacher)
        return torch.cat(student_margins), torch.cat(teacher_margins)


class LogWithCheckpoints(TrainerCallback):
    """Write a log line with every checkpoint, because a checkpoint does not hold the sums since the last line."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint will be saved."""
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class StopOnTermination(TrainerCallback):
    """Finish the step, save a checkpoint and stop on SIGTERM, which clusters send before they take a machine away.

    Processes agree on the step, since each gets its signal at another moment.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signal within a block; only the main thread can, others change nothing."""
        self.is_asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)

    def _ask(self, *_: Any) -> None:
        self.is_asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        if self.accelerator.num_processes > 1:
            asked = torch.tensor(int(self.is_asked), device=self.accelerator.device)
            self.is_asked = bool(self.accelerator.reduce(asked, "sum"))
        if self.is_asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the time until SIGKILL is short: 30 seconds under torchrun

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Neither evaluate nor save a second time."""
        if self.is_asked:
            control.should_evaluate = control.should_save = False


def start_worker(initialize: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a dataloader worker that lets the first SIGTERM pass.

    torchrun sends it to workers as well, and the current step needs their batches. A second one ends them.
    """
    if initialize is not None:
        initialize(worker)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
