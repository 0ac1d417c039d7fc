"""Statistics of the log lines, losses that are not numbers, the teacher's scale, and SIGTERM, while training runs.

No step waits for a GPU: numbers of a step stay on the device until a log line or a later step reads them.
"""

import math
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
from transformers import ProgressCallback, Trainer, TrainerCallback

from ..data.collate import sides, split_batch
from ..errors import InputError
from ..losses import listed_margins, margins, spread

AGREEMENT_SECONDS = 5.0  # between two steps at which processes agree whether to stop, out of torchrun's 30 seconds
MOST_STEPS = 50  # between two of them


class StepStatistics:
    """Sum statistics over the steps between two log lines, on the device, so that no step waits for a sum.

    Logged: `pairwise_agreement`, the share of pairs that student and teacher order alike; mean and standard deviation
    of `student_margin` and `teacher_margin` (positive minus negative, the teacher's after scaling); `padding_share`,
    the share of token positions that are padding; `tokens_per_second`, real tokens over all processes;
    `data_wait_share`, the share of the time that this process waited for batches; and with several losses the weighted
    mean of each, as `loss_NAME`.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # on the device
        self._positions = self._rows = 0  # of tokens, of batches
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
        student, teacher = margins(student_scores, teacher_scores, mask)
        is_listed = torch.ones_like(student) if mask is None else mask[:, 1:].float()
        student, teacher = student * is_listed, teacher * is_listed  # a selection of elements would wait for its size
        is_alike = ((student > 0) == (teacher > 0)) * is_listed
        sums = [is_listed.sum(), is_alike.sum()]
        sums += [student.sum(), student.square().sum(), teacher.sum(), teacher.square().sum()]
        sums.append(sum(side["attention_mask"].sum() for side in sides(features)))
        self._positions += sum(side["attention_mask"].numel() for side in sides(features))
        if losses is not None and len(losses) > 1:
            self._names = tuple(losses)
            for value in losses.values():
                sums.append(len(student_scores) * value)
        self._rows += len(student_scores)
        # float64, if the device has it: in float32 sums of squares lose the variance after some thousand batches.
        dtype = torch.float32 if student.device.type == "mps" else torch.float64
        sums = torch.stack([value.to(dtype) for value in sums])
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the statistics since the last call, over all processes."""
        if self._sums is None or self._started is None:
            return {}
        seconds = time.perf_counter() - self._started
        counts = torch.tensor([self._positions, self._rows], dtype=self._sums.dtype, device=self._sums.device)
        totals = accelerator.reduce(torch.cat([counts, self._sums]), "sum").tolist()
        positions, rows, pairs, agreement, *moments = totals[:8]
        tokens, *losses = totals[8:]
        statistics = {"pairwise_agreement": agreement / pairs}
        for name, total, squares in zip(("student", "teacher"), moments[::2], moments[1::2], strict=True):
            statistics[f"{name}_margin"] = total / pairs
            statistics[f"{name}_margin_std"] = max(squares / pairs - (total / pairs) ** 2, 0.0) ** 0.5
        for name, total in zip(self._names, losses, strict=True):
            statistics[f"loss_{name}"] = total / rows
        statistics["padding_share"] = 1 - tokens / positions
        statistics["tokens_per_second"] = tokens / seconds
        statistics["data_wait_share"] = self._waited / seconds
        self._sums = self._started = None
        self._positions = self._rows = 0
        self._waited = 0.0
        return statistics


class FiniteLosses:
    """Stops training at a loss that is not a number: on a GPU one batch late, so that no step waits for its loss.

    Args:
        describe: returns the queries and documents of a batch, for the message.
        is_late: False checks each loss before the weights change, which costs nothing on the CPU.
    """

    def __init__(self, describe: Callable[[Mapping[str, Any]], str], is_late: bool) -> None:
        self.describe = describe
        self.is_late = is_late
        self._last: tuple[int, Tensor, Mapping[str, Any]] | None = None  # step, loss, batch without its inputs
        self._is_copied: torch.Event | None = None

    def add(self, step: int, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Take the loss of a batch; check the one before it, and this one unless the check is late."""
        self.check()
        if loss.device.type != "cpu":
            # Copied now: reading it from the device later would wait for all work that is added until then.
            self._is_copied = torch.Event(loss.device.type)
            loss = loss.to("cpu", non_blocking=True)
            self._is_copied.record()
        self._last = (step, loss, {"rows": batch["rows"]})
        if not self.is_late:
            self.check()

    def check(self) -> None:
        """Raise a FloatingPointError if the last loss is not a number."""
        if self._last is None:
            return
        (step, loss, batch), self._last = self._last, None
        if self._is_copied is not None:
            self._is_copied.synchronize()
        if math.isfinite(loss):
            return
        effect = "the weights were not changed by it"
        if self.is_late:
            effect = "the weights were changed by it, and the checkpoints before it were not"
        raise FloatingPointError(
            f"The loss of step {step} is {loss.item()}; {effect}. Try a lower learning_rate, bf16 in place of fp16, "
            f"and `teacher diagnose`. The queries and documents of its batch: {self.describe(batch)}."
        )


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


class TitledProgress(ProgressCallback):
    """Show a title and the loss beside the progress bar; log lines stay in `trainer_state.json` only."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping | None = None, **kwargs: Any) -> None:
        """Show the loss of the steps since the last log line."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


class LogWithCheckpoints(TrainerCallback):
    """Write a log line with every checkpoint, because a checkpoint does not hold the sums since the last line."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log where a checkpoint will be saved."""
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end


class StopOnTermination(TrainerCallback):
    """Finish the step, save a checkpoint and stop on SIGTERM, which clusters send before they take a machine away.

    Processes agree on the step, since each gets its signal at another moment. They do so about every
    `AGREEMENT_SECONDS`, because each agreement makes the CPU wait for the GPU: all of them count the same number of
    steps, from the mean time of a step, up to the next one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_asked = False  # the same on all processes
        self._is_signalled = False  # of this process
        self._steps = 0  # since the last agreement
        self._interval = 1
        self._started = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signal within a block; only the main thread can, others change nothing."""
        self.is_asked = self._is_signalled = False
        self._steps, self._interval, self._started = 0, 1, time.perf_counter()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)

    def _ask(self, *_: Any) -> None:
        self._is_signalled = True

    def _agree(self) -> None:
        seconds = (time.perf_counter() - self._started) / self._steps
        mine = torch.tensor([float(self._is_signalled), seconds], device=self.accelerator.device)
        asked, seconds = self.accelerator.reduce(mine, "sum").tolist()
        self.is_asked = asked > 0
        per_step = seconds / self.accelerator.num_processes
        self._interval = max(1, min(MOST_STEPS, int(AGREEMENT_SECONDS / max(per_step, 1e-9))))
        self._steps, self._started = 0, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any process was asked to."""
        self._steps += 1
        if self.accelerator.num_processes == 1:
            self.is_asked = self._is_signalled
        elif self._steps >= self._interval or control.should_training_stop:
            self._agree()
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
