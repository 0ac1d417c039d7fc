"""The cost of a job before it starts: time, disk and memory of every step, from probes on its own texts.

A probe runs the real code on a few texts: three steps of training, some scores. What it measures is scaled to the
job's numbers of pairs, triples and passages. Steps that are done are not probed and cost nothing.
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
from .students import Recipe, training_arguments, training_job
from .work import Artifact, Workspace

SAMPLED_PASSAGES, SAMPLED_QUERIES, SCORED_PAIRS = 4_000, 100, 64
WARM_UP, STEPS, CPU_BATCH = 1, 3, 8
LINE_BYTES = 60  # of a line of a run, or a row of scores
ROW_SECONDS = 1e-5  # to sample, write or average a row
BM25_BYTES = 2_500  # peak memory of building a BM25 index, per passage


@dataclass(frozen=True)
class Cost:
    """The cost of one step.

    Args:
        name: path of its artifact.
        seconds: time; 0 if it is done.
        disk: bytes that stay.
        memory: bytes of the process at its peak.
        is_done: True if its artifact exists and was made from the same inputs.
    """

    name: str
    seconds: float = 0.0
    disk: float = 0.0
    memory: float = 0.0
    is_done: bool = False


class Plan(Workspace):
    """A workspace that runs no step, and notes what each would cost.

    Args:
        folder: the output of the job.
        context: the job.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        super().__init__(folder)
        self.costs: list[Cost] = []
        self._estimates = Estimates(context)

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Check the folder without writing into it, see `Workspace.claim`."""
        if has_description(self.folder):
            super().claim(inputs)

    def step(self, name: str, function: Callable[..., object], *inputs: Any) -> Artifact:
        """Note the cost of a step, and return the artifact that it would make."""
        artifact = self.locate(name, function, *inputs)
        if self.is_done(artifact):
            cost = Cost(name, is_done=True)
        else:
            seconds, disk, memory = self._estimates.of_step(function, inputs)
            cost = Cost(name, seconds, disk, memory)
        self.costs.append(cost)
        return artifact


def plan_text(costs: Sequence[Cost]) -> str:
    """Return a plan as a Markdown table with its sum."""
    lines = ["| step | time | disk | memory |", "| --- | --- | --- | --- |"]
    seconds = disk = memory = 0.0
    for cost in costs:
        if cost.is_done:
            lines.append(f"| {cost.name} | done |  |  |")
            continue
        lines.append(
            f"| {cost.name} | {_time_text(cost.seconds)} | {_size_text(cost.disk)} | {_size_text(cost.memory)} |"
        )
        seconds, disk, memory = seconds + cost.seconds, disk + cost.disk, max(memory, cost.memory)
    lines.append(f"| all | {_time_text(seconds)} | {_size_text(disk)} | {_size_text(memory)} |")
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


class Estimates:
    """The cost of every kind of step: a method has the name of the step's function and takes its inputs.

    Args:
        context: the job.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.job = context.job
        self.passages = len(context.documents)
        self.triples = len(context.splits["train"]) * self.job.triples_per_query
        if self.job.brings_rows:
            self.triples = len(load_teacher_scores(self.job.scores[0]))
        self._probes: dict[str, Any] = {}

    def of_step(self, function: Callable[..., object], inputs: Sequence[Any]) -> Estimate:
        """Return the cost of a step; one without a method only moves rows."""
        estimate = getattr(self, f"_{function.__name__}", None)
        return (ROW_SECONDS * self.triples, 0.0, 0.0) if estimate is None else estimate(*inputs)

    def _probe(self, key: str, probe: Callable[..., Any], *arguments: Any) -> Any:
        if key not in self._probes:
            self._probes[key] = probe(*arguments, self.context)
        return self._probes[key]

    def _student(self, recipe: Recipe) -> "Probe":
        return self._probe(f"{recipe.architecture} {recipe.config}", probe_training, recipe)

    def _index_collection(self, context: Context) -> Estimate:
        seconds, _ = self._probe("bm25", probe_bm25)
        return seconds * self.passages, 1_000 * self.passages, BM25_BYTES * self.passages

    def _find_candidates(self, index: Artifact, texts: Mapping, k: int, positives: Mapping) -> Estimate:
        _, seconds = self._probe("bm25", probe_bm25)
        return seconds * len(texts) * self.passages, len(texts) * k * LINE_BYTES, BM25_BYTES * self.passages

    def _rank_candidates(self, teacher: Teacher, candidates: Sequence, query_ids: Sequence, context: Any) -> Estimate:
        return self._score_by(teacher, len(query_ids) * self.job.k)

    def _score_triples(self, teacher: Teacher, *inputs: Any) -> Estimate:
        return self._score_by(teacher, 2 * self.triples)

    def _score_by(self, teacher: Teacher, pairs: int) -> Estimate:
        if self.job.scores or teacher == BM25:
            return pairs * ROW_SECONDS, pairs * LINE_BYTES, 0.0
        if isinstance(teacher, Path):
            seconds = self._probe(f"teacher {teacher}", probe_teacher, str(teacher))
            return pairs * seconds, pairs * LINE_BYTES, 0.0
        source = name_sources(self.job)[teacher.path.parent.name]  # an architecture that a step of this job trains
        return self._rank_untrained(Recipe.of_job(self.job, source, NO_TEACHER, is_teacher=True), pairs=pairs)

    def _train_student(self, recipe: Recipe, *inputs: Any) -> Estimate:
        probe = self._student(recipe)
        evaluation = self._rank_untrained(recipe, pairs=len(self.context.splits["dev"]) * self.job.k)[0]
        evaluations = 1 + (recipe.epochs if recipe.epochs > 1 else 0)
        seconds = probe.start + self.triples * recipe.epochs * probe.triple + evaluations * evaluation
        return seconds, probe.model_bytes, probe.memory

    def _rank_untrained(self, recipe: Recipe, *inputs: Any, pairs: int | None = None) -> Estimate:
        """Score pairs from text; a passage that is encoded without its query is encoded once."""
        pairs = len(self.context.splits["test"]) * self.job.k if pairs is None else pairs
        probe = self._student(recipe)
        seconds = pairs * max(probe.pair - probe.passage, 0.0) + min(pairs, self.passages) * probe.passage
        return seconds, pairs * LINE_BYTES, probe.memory

    def _rank_test(self, student: Artifact, *inputs: Any) -> Estimate:
        return self._rank_untrained(self._recipe(student))

    def _search_collection(self, student: Artifact, *inputs: Any) -> Estimate:
        probe = self._student(self._recipe(student))
        vectors = 2_048 * self.passages  # in memory, about 512 values per passage
        return self.passages * probe.passage, 0.0, probe.memory + vectors

    def _time_students(self, students: Mapping[str, Artifact], *inputs: Any) -> Estimate:
        seconds = 0.0
        for student in students.values():
            probe = self._student(self._recipe(student))
            rounds = 2 if probe.passage else TIMED_QUERIES + 2
            seconds += rounds * self.job.k * probe.pair
        return seconds, 0.0, 0.0

    def _recipe(self, student: Artifact) -> Recipe:
        architecture = student.path.relative_to(Path(self.job.output, "students")).parts[0]
        return Recipe.of_job(self.job, architecture, NO_TEACHER)


# ---- Probes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The cost of an architecture on this machine, in seconds and bytes.

    Args:
        triple: seconds of training per triple.
        pair: seconds of scoring a pair from text.
        passage: seconds of encoding a passage; 0 if that needs the query.
        start: seconds of a training besides its steps.
        model_bytes: size of a checkpoint.
        memory: bytes of the process while it trains.
    """

    triple: float
    pair: float
    passage: float
    start: float
    model_bytes: int
    memory: float


def probe_bm25(context: Context) -> tuple[float, float]:
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


def probe_teacher(name: str, context: Context) -> float:
    """Return the seconds that a teacher takes per pair."""
    return _seconds_per_text(load_teacher(name, device=context.device).score, context)


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def probe_training(recipe: Recipe, context: Context) -> Probe:
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
    """Return texts from all over a store, again from the start if it has fewer."""
    return store.texts.take(pa.array(_some_places(store, count))).to_pylist()


def _some_places(store: TextStore, count: int) -> np.ndarray:
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
