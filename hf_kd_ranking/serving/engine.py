"""The engine: one thread that owns the model and runs the work of all clients, in batches across their requests.

On most processors a few large batches take less time than many small ones: fewer calls, and less padding where texts
of similar length share a forward pass.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[list[Any]], Sequence[Any]]  # the inputs of a batch -> the results in the same order


class OverloadedError(Exception):
    """The queue is full; the work was not accepted."""


@dataclass
class Job:
    """A piece of work, and the estimate of its tokens; jobs with equal functions may share a batch.

    A job whose future is cancelled before its batch begins is left out.
    """

    run: Run
    input: Any
    tokens: int
    future: Future = field(default_factory=Future)


class Engine:
    """A thread with a bounded queue.

    When the thread is free it takes the job that has waited longest, with all others of its kind up to the budget. If
    the last batch had several jobs, their clients are about to send the next ones: then it first waits for as many
    jobs, at most for the window. A single client never waits.

    Args:
        window_ms: longest wait for a batch to fill, in milliseconds.
        batch_tokens: estimated tokens per batch; 1 runs every job by itself.
        max_waiting: number of jobs that wait; more are refused.
        on_batch: called with the jobs of each batch before it runs.
    """

    def __init__(
        self,
        window_ms: float = 5.0,
        batch_tokens: int = 16_384,
        max_waiting: int = 256,
        on_batch: Callable[[list[Job]], None] = lambda jobs: None,
    ) -> None:
        self.window_ms = window_ms
        self.batch_tokens = batch_tokens
        self.max_waiting = max_waiting
        self._on_batch = on_batch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._last_count = 1  # jobs of the last batch
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return the number of jobs that wait."""
        return len(self._waiting)

    def submit(self, run: Run, inputs: Sequence[Any], tokens: Sequence[int]) -> list[Future]:
        """Queue the parts of one request, all of them or none.

        Args:
            run: see `Job`.
            inputs: input of each part.
            tokens: estimated tokens of each part.

        Raises:
            OverloadedError: if they do not fit into the queue, or the engine is closed.
        """
        jobs = [Job(run, part, count) for part, count in zip(inputs, tokens, strict=True)]
        with self._changed:
            if self._is_closed:
                raise OverloadedError("The server is shutting down.")
            if self._waiting and len(self._waiting) + len(jobs) > self.max_waiting:
                self._forget_cancelled()
                if len(self._waiting) + len(jobs) > self.max_waiting:
                    raise OverloadedError(f"{len(self._waiting)} parts of requests are waiting, the most that may.")
            self._waiting.extend(jobs)
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self, is_awaited: bool = True) -> None:
        """Refuse later work, finish what waits, and end the thread; return at once if it is not awaited."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if is_awaited:
            self._thread.join()

    def _work(self) -> None:
        while (jobs := self._take_batch()) is not None:
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._on_batch(running)
                _answer(running)

    def _take_batch(self) -> list[Job] | None:
        """Wait for work and return a batch; None when the engine is closed and all is done."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            end = time.monotonic() + self.window_ms / 1_000
            while len(self._waiting) < self._last_count and not self._is_closed and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
            if not self._waiting and self._is_closed:
                return None
            self._forget_cancelled()
            batch: list[Job] = []
            others: deque[Job] = deque()
            tokens = 0
            for job in self._waiting:
                fits = not batch or (job.run == batch[0].run and tokens + job.tokens <= self.batch_tokens)
                if fits:
                    batch.append(job)
                    tokens += job.tokens
                else:
                    others.append(job)
            self._waiting = others
            self._last_count = len(batch)
            return batch

    def _forget_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.future.cancelled())


def _answer(jobs: list[Job]) -> None:
    """Run jobs together; if that fails, each by itself, so that one client's error is not another's."""
    try:
        results = list(jobs[0].run([job.input for job in jobs]))
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
    except Exception as error:  # whatever a model raises belongs to its client, and must not end the thread
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            return
        for job in jobs:
            _answer([job])
