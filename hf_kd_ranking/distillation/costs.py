"""The cost of a job before it starts: time, disk and memory of every step.

Probes run the real code on a few of the job's texts; what they measure is scaled to its numbers of pairs, triples and
passages. Steps that are done are not probed and cost nothing.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from transformers import PrinterCallback, TrainerCallback

from ..artifacts import has_description
from ..data.passages import split_id
from ..data.rows import TeacherRows, load_teacher_scores
from ..data.texts import TextStore
from ..processes import processes
from ..ranker import Ranker, load_tokenizer
from ..reporting.efficiency import peak_mb
from ..retrieval.bm25 import BM25Index
from ..teachers.endpoint import EndpointSettings, is_endpoint
from ..teachers.load import load_teacher
from ..training.trainer import RankingTrainer
from .context import Context, name_sources
from .job import BM25, NO_TEACHER, RERANK
from .points import TIMED_QUERIES, WEIGHTS, System
from .students import Recipe, Student, training_arguments, training_job
from .teaching import Teacher
from .work import Artifact, Workspace, is_shared

SAMPLED_PASSAGES, SAMPLED_QUERIES, SCORED_PAIRS = 4_000, 100, 64
WARM_UP, STEPS, CPU_BATCH = 1, 3, 8
LINE_BYTES = 60  # of a line of a run, or a row of scores
ROW_SECONDS = 1e-5  # to sample, write or average a row
VECTOR_BYTES = 2_048  # of the stored vectors of a passage, about 512 values
SECONDS_PER_REQUEST = 1.0  # to an endpoint, assumed
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
        self._passages, self._per_document = len(context.documents), 1.0
        if context.documents.aggregation is not None:
            self._per_document = self._passages / len({split_id(id_)[0] for id_ in context.documents.ids()})
        job = self._job
        self._rows = len(context.splits["train"]) * job.lists_per_query
        self._documents = job.documents
        if job.brings_rows:
            self._rows, self._documents = len(load_teacher_scores(job.scores[0])), 2
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
            seconds, disk, memory = estimate(*inputs)
            if is_shared(function):
                seconds /= processes().num_processes
            self.costs.append(Cost(name, seconds, disk, memory))
        return artifact

    def steps(self, wanted: Mapping[str, tuple], parallel: int = 1) -> dict[str, Artifact]:
        """Note the costs of steps of which several run side by side."""
        first = len(self.costs)
        artifacts = super().steps(wanted)
        missing = sum(not cost.is_done for cost in self.costs[first:])
        count = max(min(parallel, missing), 1)
        for place, cost in enumerate(self.costs[first:], first):
            self.costs[place] = replace(cost, seconds=cost.seconds / count, memory=cost.memory * count)
        return artifacts

    def _move_rows(self, *_: Any) -> Estimate:
        return ROW_SECONDS * self._rows, 0.0, 0.0

    def _probe(self, key: str, probe: Callable[..., Any], *arguments: Any) -> Any:
        if key not in self._probes:
            self._probes[key] = probe(*arguments, self._context)
        return self._probes[key]

    def _student(self, recipe: Recipe) -> "Probe":
        return self._probe(f"{recipe.architecture} {recipe.config} {recipe.loss}", _probe_training, recipe)

    def _index_collection(self, language: str | None, context: Context) -> Estimate:
        probe = self._probe("bm25", _probe_bm25)
        return probe.indexing * self._passages, 1_000 * self._passages, BM25_BYTES * self._passages

    def _search_bm25(self, index: Artifact, texts: Mapping, k: int, exclude_same_id: bool) -> Estimate:
        probe = self._probe("bm25", _probe_bm25)
        seconds = len(texts) * (probe.query + probe.comparison * self._passages)
        return seconds, len(texts) * k * LINE_BYTES, 1_000 * self._passages

    def _score_candidates(self, teacher: Teacher, candidates: Artifact, *inputs: Any) -> Estimate:
        split = candidates.path.name
        k = self._job.candidates_per_query if split == "train" else self._job.k
        pairs = len(self._context.splits.get(split, self._context.splits["train"])) * k
        if teacher == BM25:
            return pairs * ROW_SECONDS, pairs * LINE_BYTES, 0.0
        if isinstance(teacher, str | Path):
            seconds = self._probe(f"teacher {teacher}", _probe_teacher, str(teacher))
            pairs = round(pairs * self._per_document)
            if self._context.live_teacher is not None:
                pairs = min(pairs, self._passages)  # it encodes a passage once
            return pairs * seconds, pairs * LINE_BYTES, 0.0
        source = name_sources(self._job)[teacher.path.parent.name]  # an architecture that a step of this job trains
        return self._rank(Recipe.of_job(self._job, source, NO_TEACHER, is_teacher=True), pairs)

    def _train_student(self, recipe: Recipe, *inputs: Any) -> Estimate:
        probe = self._student(recipe)
        evaluation = self._rank(recipe, len(self._context.splits["dev"]) * self._job.k)[0]
        evaluations = max(recipe.evaluations, recipe.epochs)
        if evaluations > 1:
            evaluations += 1  # that of the checkpoint that is kept
        seconds = probe.start + self._rows * recipe.epochs * probe.row + evaluations * evaluation
        return seconds, probe.model_bytes, probe.memory

    def _rank(self, recipe: Recipe, pairs: int) -> Estimate:
        """Score pairs from text, all passages of each document; one that is encoded by itself is encoded once."""
        pairs = round(pairs * self._per_document)
        probe = self._student(recipe)
        seconds = pairs * max(probe.pair - probe.passage, 0.0) + min(pairs, self._passages) * probe.passage
        return seconds, pairs * LINE_BYTES, probe.memory

    def _save_untrained(self, recipe: Recipe, *inputs: Any) -> Estimate:
        probe = self._student(recipe)
        return probe.start, probe.model_bytes, probe.memory

    def _rank_candidates(self, student: Student, precision: str, candidates: Artifact, *inputs: Any) -> Estimate:
        return self._rank(student.recipe, len(self._context.splits[candidates.path.name]) * self._job.k)

    def _search_vectors(
        self, model: Artifact | Path, texts: Mapping, k: int, exclude_same_id: bool, context: Context
    ) -> Estimate:
        seconds = self._encode_by_student()[0]
        if isinstance(model, Path):
            seconds = self._passages * self._probe(f"teacher {model}", _probe_teacher, str(model))
        return seconds, VECTOR_BYTES * self._passages, VECTOR_BYTES * self._passages

    def _encode_by_student(self) -> Estimate:
        seconds = 0.0
        for probe in self._probes.values():
            if isinstance(probe, Probe):
                seconds = max(seconds, probe.passage)  # any of the students may be the one
        return self._passages * seconds, VECTOR_BYTES * self._passages, 0.0

    def add_delivery(self) -> None:
        """Note the cost of the vectors that are delivered: of which ranker the choice decides."""
        if self._job.store_vectors and self._job.purpose == RERANK:
            self.costs.append(Cost("vectors", *self._encode_by_student()))

    def _time_rankers(self, systems: Sequence[System], *inputs: Any) -> Estimate:
        seconds = 0.0
        for system in systems:
            probe = self._student(system.students[0].recipe)
            rounds = 2 if probe.passage else TIMED_QUERIES + 2
            seconds += rounds * self._job.k * self._per_document * probe.pair
        return seconds, 0.0, 0.0

    def _find_points(self, systems: Sequence[System], *inputs: Any) -> Estimate:
        pairs = len(self._context.splits["dev"]) * self._job.k
        return len(systems) * (len(WEIGHTS) + 4) * pairs * ROW_SECONDS, 0.0, 0.0


# ---- Probes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The cost of an architecture on this machine, in seconds and bytes."""

    row: float  # to train on a row
    pair: float  # to score a pair from text
    passage: float  # to encode a passage; 0 if that needs the query
    start: float  # of a training besides its steps
    model_bytes: int  # of a checkpoint
    memory: float  # of the process while it trains


class Bm25Probe(NamedTuple):
    """Seconds of BM25."""

    indexing: float  # a passage
    query: float  # a query, whatever the collection
    comparison: float  # of a query with a passage


def _probe_bm25(context: Context) -> Bm25Probe:
    """Build indexes of two sizes and search them: a query has a fixed cost and one that grows with the passages."""
    count = min(SAMPLED_PASSAGES, len(context.documents))
    sizes = (max(count // 4, 1), count)
    queries = dict(enumerate(_some_texts(context.queries, SAMPLED_QUERIES)))
    indexing, per_query = 0.0, []
    for size in sizes:
        columns = {"id": np.arange(size).astype(str).tolist(), "text": _some_texts(context.documents, size)}
        with tempfile.TemporaryDirectory() as folder:
            store = TextStore.from_dataset(datasets.Dataset.from_dict(columns), folder=folder)
            start = time.perf_counter()
            index = BM25Index.build(store)
            built = time.perf_counter()
            index.search(queries, min(context.job.k, size))
            per_query.append((time.perf_counter() - built) / len(queries))
        indexing = (built - start) / size
    comparison = max(per_query[1] - per_query[0], 0.0) / max(sizes[1] - sizes[0], 1)
    return Bm25Probe(indexing, max(per_query[1] - comparison * sizes[1], 0.0), comparison)


def _probe_teacher(name: str, context: Context) -> float:
    """Return the seconds that a teacher takes per pair; an endpoint, which may cost money, is not asked."""
    if is_endpoint(name):
        return SECONDS_PER_REQUEST / (context.job.teacher_batch_size * EndpointSettings().concurrency)
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
        args.early_stopping_patience = None
        args.load_best_model_at_end, args.disable_tqdm, args.report_to = False, True, []
        trainer = RankingTrainer(
            model,
            args,
            train_dataset=_some_rows(context, batch * STEPS, context.job.documents),
            queries=context.queries,
            documents=context.documents,
            processing_class=tokenizer,
            callbacks=[times],
            in_batch_teacher=job.load_in_batch_teacher(args),
        )
        trainer.remove_callback(PrinterCallback)  # it would print before the table
        trainer.train()
        if trainer.termination.is_asked:
            raise SystemExit("Stopped by SIGTERM while the plan was made; nothing was written.")
        # The fastest step, here and below: what other programs do for a moment only makes a probe slower.
        row = float(np.diff(times.ends[WARM_UP - 1 :]).min()) / batch
        trainer.save_model(_internal_call=True)
        start = time.perf_counter() - began - row * batch * STEPS
    ranker, passage = Ranker(model.eval(), tokenizer), 0.0
    pair = _seconds_per_text(ranker.score, context)
    if model.config.is_storable:
        passage = _seconds_per_text(lambda _, passages: ranker.encode_documents(passages), context)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    state = 16 * parameters  # weights, gradients and two moments in float32
    activations = max(peak_mb() * 2**20 - before - state, 0) / batch * recipe.batch_size
    return Probe(row, pair, passage, start, 4 * parameters, before + state + activations)


def _some_texts(store: TextStore, count: int) -> list[str]:
    return store.take(_some_places(store, count))


def _some_places(store: TextStore, count: int) -> np.ndarray:
    """Return rows from all over a store, again from the start if it has fewer."""
    return np.linspace(0, max(len(store), count) - 1, count).astype(int) % len(store)


def _some_rows(context: Context, count: int, documents: int) -> TeacherRows:
    """Return lists of random texts."""
    places = _some_places(context.documents, count)
    columns: dict[str, list] = {"query_id": context.queries.ids_of(_some_places(context.queries, count))}
    columns["doc_ids"], columns["teacher_scores"] = [], []
    for place in places:
        columns["doc_ids"].append(context.documents.ids_of((place + np.arange(documents)) % len(context.documents)))
        columns["teacher_scores"].append([9.0 - number for number in range(documents)])
    return TeacherRows(datasets.Dataset.from_dict(columns))


def _seconds_per_text(call: Callable[[list[str], list[str]], object], context: Context) -> float:
    query, passages = _some_texts(context.queries, 1), _some_texts(context.documents, 3 * SCORED_PAIRS)
    # The first call is slower; it has other passages, since a teacher may remember those that it has encoded.
    seconds = []
    for first in range(3):
        start = time.perf_counter()
        call(query * SCORED_PAIRS, passages[first::3])
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / SCORED_PAIRS
