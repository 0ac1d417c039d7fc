"""The cost of a job before it starts: time, disk and memory of every step.

Probes run the real code on a few of the job's texts; what they measure is scaled to its numbers of pairs, triples and
passages. Steps that are done are not probed and cost nothing.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PrinterCallback, TrainerCallback

from ..artifacts import has_description
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.texts import TextStore
from ..ranker import Ranker, load_tokenizer
from ..reporting.efficiency import peak_mb
from ..retrieval.bm25 import BM25Index
from ..teachers.load import load_teacher
from ..training.trainer import RankingTrainer
from .context import Context, name_sources
from .job import BM25, NO_TEACHER
from .selection import TIMED_QUERIES
from .steps import Teacher
from .students import Recipe, Student, training_arguments, training_job
from .work import Artifact, Workspace

SAMPLED_PASSAGES, SAMPLED_QUERIES, SCORED_PAIRS = 4_000, 100, 64
WARM_UP, STEPS, CPU_BATCH = 1, 3, 8
LINE_BYTES = 60  # of a line of a run, or a row of scores
ROW_SECONDS = 1e-5  # to sample, write or average a row
BM25_BYTES = 2_500  # peak memory of building a BM25 index, per passage


@dataclass(frozen=True)
class Cost:
    """The cost of one step, named by the path of its artifact; 0 if it is done."""

    name: str
    seconds: float = 0.0
    disk: float = 0.0  # bytes that stay
    memory: float = 0.0  # bytes of the process at its peak
    is_done: bool = False


def plan_text(costs: Sequence[Cost]) -> str:
    """Return a plan as a Markdown table with its sum."""
    lines = ["| step | time | disk | memory |", "| --- | --- | --- | --- |"]
    seconds = disk = memory = 0.0
    for cost in costs:
        seconds, disk, memory = seconds + cost.seconds, disk + cost.disk, max(memory, cost.memory)
    for cost in (*costs, Cost("all", seconds, disk, memory)):
        cells = f"{_time_text(cost.seconds)} | {_size_text(cost.disk)} | {_size_text(cost.memory)}"
        if cost.is_done:
            cells = "done |  | "
        lines.append(f"| {cost.name} | {cells} |")
    return "\n".join(lines)


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _size_text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


# ---- Estimates ------------------------------------------------------------------------------------------------------

Estimate = tuple[float, float, float]  # seconds, bytes of disk, bytes of memory


class Plan(Workspace):
    """A workspace that runs no step, and notes what each would cost.

    The method `_NAME` returns the cost of the step function `NAME` and takes its inputs.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(Path(context.job.output))
        self.costs: list[Cost] = []
        self._context, self._job = context, context.job
        self._passages = len(context.documents)
        self._triples = len(context.splits["train"]) * self._job.triples_per_query
        if self._job.brings_rows:
            self._triples = len(load_teacher_scores(self._job.scores[0]))
        self._probes: dict[str, Any] = {}

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Check the folder without writing into it, see `Workspace.claim`."""
        if has_description(self.folder):
            super().claim(inputs)

    def step(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Note the cost of a step, and return the artifact that it would make."""
        artifact = self.locate(name, function, *inputs)
        if self.is_done(artifact):
            self.costs.append(Cost(name, is_done=True))
        else:
            estimate = getattr(self, f"_{function.__name__}", self._move_rows)
            self.costs.append(Cost(name, *estimate(*inputs)))
        return artifact

    def _move_rows(self, *_: Any) -> Estimate:
        return ROW_SECONDS * self._triples, 0.0, 0.0

    def _probe(self, key: str, probe: Callable[..., Any], *arguments: Any) -> Any:
        if key not in self._probes:
            self._probes[key] = probe(*arguments, self._context)
        return self._probes[key]

    def _student(self, recipe: Recipe) -> "Probe":
        return self._probe(f"{recipe.architecture} {recipe.config}", _probe_training, recipe)

    def _index_collection(self, context: Context) -> Estimate:
        seconds, _ = self._probe("bm25", _probe_bm25)
        return seconds * self._passages, 1_000 * self._passages, BM25_BYTES * self._passages

    def _find_candidates(self, index: Artifact, texts: Mapping, k: int, positives: Mapping) -> Estimate:
        _, seconds = self._probe("bm25", _probe_bm25)
        return seconds * len(texts) * self._passages, len(texts) * k * LINE_BYTES, BM25_BYTES * self._passages

    def _rank_candidates(self, teacher: Teacher, candidates: Sequence, query_ids: Sequence, context: Any) -> Estimate:
        return self._score_by(teacher, len(query_ids) * self._job.k)

    def _score_triples(self, teacher: Teacher, *inputs: Any) -> Estimate:
        return self._score_by(teacher, 2 * self._triples)

    def _score_by(self, teacher: Teacher, pairs: int) -> Estimate:
        if self._job.scores or teacher == BM25:
            return pairs * ROW_SECONDS, pairs * LINE_BYTES, 0.0
        if isinstance(teacher, Path):
            seconds = self._probe(f"teacher {teacher}", _probe_teacher, str(teacher))
            return pairs * seconds, pairs * LINE_BYTES, 0.0
        source = name_sources(self._job)[teacher.path.parent.name]  # an architecture that a step of this job trains
        return self._rank_untrained(Recipe.of_job(self._job, source, NO_TEACHER, is_teacher=True), pairs=pairs)

    def _train_student(self, recipe: Recipe, *inputs: Any) -> Estimate:
        probe = self._student(recipe)
        evaluation = self._rank_untrained(recipe, pairs=len(self._context.splits["dev"]) * self._job.k)[0]
        evaluations = 1 + (recipe.epochs if recipe.epochs > 1 else 0)
        seconds = probe.start + self._triples * recipe.epochs * probe.triple + evaluations * evaluation
        return seconds, probe.model_bytes, probe.memory

    def _rank_untrained(self, recipe: Recipe, *inputs: Any, pairs: int | None = None) -> Estimate:
        """Score pairs from text; a passage that is encoded without its query is encoded once."""
        pairs = len(self._context.splits["test"]) * self._job.k if pairs is None else pairs
        probe = self._student(recipe)
        seconds = pairs * max(probe.pair - probe.passage, 0.0) + min(pairs, self._passages) * probe.passage
        return seconds, pairs * LINE_BYTES, probe.memory

    def _rank_test(self, student: Student, *inputs: Any) -> Estimate:
        return self._rank_untrained(student.recipe)

    def _search_collection(self, student: Student, *inputs: Any) -> Estimate:
        probe = self._student(student.recipe)
        vectors = 2_048 * self._passages  # in memory, about 512 values per passage
        return self._passages * probe.passage, 0.0, probe.memory + vectors

    def _time_students(self, students: Mapping[str, Student], *inputs: Any) -> Estimate:
        seconds = 0.0
        for student in students.values():
            probe = self._student(student.recipe)
            rounds = 2 if probe.passage else TIMED_QUERIES + 2
            seconds += rounds * self._job.k * probe.pair
        return seconds, 0.0, 0.0


# ---- Probes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The cost of an architecture on this machine, in seconds and bytes."""

    triple: float  # to train on a triple
    pair: float  # to score a pair from text
    passage: float  # to encode a passage; 0 if that needs the query
    start: float  # of a training besides its steps
    model_bytes: int  # of a checkpoint
    memory: float  # of the process while it trains


def _probe_bm25(context: Context) -> tuple[float, float]:
    """Return the seconds to index a passage, and to compare a query with a passage."""
    count = min(SAMPLED_PASSAGES, len(context.documents))
    columns = {"id": np.arange(count).astype(str).tolist(), "text": _some_texts(context.documents, count)}
    queries = dict(enumerate(_some_texts(context.queries, SAMPLED_QUERIES)))
    with tempfile.TemporaryDirectory() as folder:
        store = TextStore.from_dataset(datasets.Dataset.from_dict(columns), folder=folder)
        start = time.perf_counter()
        index = BM25Index.build(store)
        built = time.perf_counter()
        index.search(queries, min(context.job.k, count))
        searched = time.perf_counter()
    return (built - start) / count, (searched - built) / (len(queries) * count)


def _probe_teacher(name: str, context: Context) -> float:
    """Return the seconds that a teacher takes per pair."""
    return _seconds_per_text(load_teacher(name, device=context.device).score, context)


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def _probe_training(recipe: Recipe, context: Context) -> Probe:
    """Train three steps on random pairs, and score and encode some texts."""
    began = time.perf_counter()
    before = peak_mb() * 2**20
    batch = CPU_BATCH if context.device == "cpu" else recipe.batch_size
    job, times = training_job(recipe, context), _StepTimes()
    model, tokenizer = job.load_model(), load_tokenizer(job.model_name)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(recipe, 1e-9, "1", context, Path(folder))
        args.max_steps, args.per_device_train_batch_size = STEPS, batch
        args.save_strategy = args.eval_strategy = "no"
        args.load_best_model_at_end, args.disable_tqdm, args.report_to = False, True, []
        trainer = RankingTrainer(
            model,
            args,
            train_dataset=_some_rows(context, batch * STEPS),
            queries=context.queries,
            documents=context.documents,
            processing_class=tokenizer,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)  # it would print before the table
        trainer.train()
        triple = (times.ends[-1] - times.ends[WARM_UP - 1]) / (len(times.ends) - WARM_UP) / batch
        trainer.save_model(_internal_call=True)
        start = time.perf_counter() - began - triple * batch * STEPS
    ranker, passage = Ranker(model.eval(), tokenizer), 0.0
    pair = _seconds_per_text(ranker.score, context)
    if model.config.is_storable:
        passage = _seconds_per_text(lambda _, passages: ranker.encode_documents(passages), context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = 16 * parameters  # weights, gradients and two moments in float32
    activations = max(peak_mb() * 2**20 - before - state, 0) / batch * recipe.batch_size
    return Probe(triple, pair, passage, start, 4 * parameters, before + state + activations)


def _some_texts(store: TextStore, count: int) -> list[str]:
    return store.texts.take(pa.array(_some_places(store, count))).to_pylist()


def _some_places(store: TextStore, count: int) -> np.ndarray:
    """Return rows from all over a store, again from the start if it has fewer."""
    return np.linspace(0, max(len(store), count) - 1, count).astype(int) % len(store)


def _some_rows(context: Context, count: int) -> TeacherRows:
    """Return triples of random texts."""
    places = _some_places(context.documents, count)
    positives = context.documents.ids_of(places)
    negatives = context.documents.ids_of((places + 1) % len(context.documents))
    columns = {
        "query_id": context.queries.ids_of(_some_places(context.queries, count)),
        "doc_ids": [list(pair) for pair in zip(positives, negatives, strict=True)],
        "teacher_scores": [[9.0, 4.0]] * count,
    }
    return TeacherRows(datasets.Dataset.from_dict(columns))


def _seconds_per_text(call: Callable[[list[str], list[str]], object], context: Context) -> float:
    queries, passages = _some_texts(context.queries, SCORED_PAIRS), _some_texts(context.documents, SCORED_PAIRS)
    call(queries[:1] * SCORED_PAIRS, passages)  # the first call is slower
    start = time.perf_counter()
    call(queries[:1] * SCORED_PAIRS, passages)
    return (time.perf_counter() - start) / SCORED_PAIRS
