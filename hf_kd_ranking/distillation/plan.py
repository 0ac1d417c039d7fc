"""What a job will take, before it starts: time, disk and memory of every stage, from probes on its own texts.

A probe runs the real code on a few texts: three steps of training, some scores. What it measures is scaled to the
job's numbers of pairs, triples and passages. Stages that are done are not probed and take nothing.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PrinterCallback, TrainerCallback

from ..data.rows import load_teacher_scores
from ..data.texts import TextStore
from ..models import ARCHITECTURES
from ..ranker import Ranker, load_tokenizer
from ..reporting.efficiency import peak_mb
from ..retrieval.bm25 import BM25Index
from ..teachers.load import load_teacher
from ..training.trainer import RankingTrainer
from .job import BM25, NO_TEACHER, DistillJob
from .outcome import TIMED_QUERIES
from .stage import read_state
from .students import Distillation

SAMPLED_PASSAGES, SCORED_PAIRS = 4_000, 64
WARM_UP, STEPS, CPU_BATCH = 1, 3, 8
LINE = 60  # bytes of a line of a run or a row of scores


@dataclass
class Stage:
    """What one stage takes.

    Args:
        name: of its folder.
        seconds: 0 where it is done.
        disk: bytes that stay.
        memory: bytes of the process at its peak.
        is_done: nothing is left to do, unless an option changed.
    """

    name: str
    seconds: float
    disk: float = 0.0
    memory: float = 0.0
    is_done: bool = False


@dataclass
class _Probe:
    """What an architecture costs here."""

    triple: float  # seconds, of training
    pair: float  # seconds, of scoring from text
    passage: float | None  # seconds, of encoding ahead; None where the query is needed
    start: float  # seconds a training takes besides its steps
    model: int  # bytes
    memory: float  # bytes while training


def make_plan(job: DistillJob) -> list[Stage]:
    """Probe what a job's stages cost.

    Returns:
        The stages in their order.

    Raises:
        ValueError, FileNotFoundError: as `distill` does before any work.
    """
    return list(_stages(Distillation(job)))


def plan_text(stages: Sequence[Stage]) -> str:
    """A plan as a Markdown table, with its sum."""
    lines = ["| stage | time | disk | memory |", "| --- | --- | --- | --- |"]
    for stage in stages:
        cells = ["done", "", ""] if stage.is_done else [_time(stage.seconds), *map(_size, (stage.disk, stage.memory))]
        lines.append(f"| {' | '.join([stage.name, *cells])} |")
    left = [stage for stage in stages if not stage.is_done]
    total = [_time(sum(stage.seconds for stage in left)), _size(sum(stage.disk for stage in left))]
    memory = _size(max((stage.memory for stage in left), default=0.0))
    return "\n".join([*lines, f"| all | {' | '.join(total)} | {memory} |"])


def _stages(parts: Distillation) -> Iterator[Stage]:
    job = parts.job
    queries = {split: len(ids) for split, ids in parts.splits.items()}
    held_out = (queries["dev"] + queries["test"]) * job.candidates
    triples = queries["train"] * job.triples_per_query
    if job.brings_rows:
        triples = len(load_teacher_scores(job.scores[0]))
    probes = {}

    def probe(architecture: str, is_teacher: bool = False) -> _Probe:
        key = architecture, is_teacher
        if key not in probes:
            probes[key] = _probe(parts, architecture, is_teacher)
        return probes[key]

    def training(architecture: str, folder: Path, is_teacher: bool = False) -> Stage:
        name = str(folder.relative_to(job.output))
        if any(read_state(found).get("is_done") for found in folder.parent.glob(folder.name)):
            return Stage(name, 0.0, is_done=True)
        cost, epochs = probe(architecture, is_teacher), job.options_of(architecture, is_teacher)[0]["epochs"]
        texts = _texts(cost, queries["dev"] * job.candidates, len(parts.documents))
        seconds = cost.start + triples * epochs * cost.triple + max(epochs, 1) * texts  # measured after every epoch
        return Stage(name, seconds, cost.model, cost.memory)

    searched = sum(queries.values()) - (queries["train"] if job.scores else 0)
    pairs = searched * job.candidates
    yield _candidates(parts, searched, pairs * LINE)
    yield Stage("triples", triples * 1e-5, triples * LINE, is_done=_is_done(parts, "triples"))
    scored = held_out + 2 * triples if parts.judged else pairs + 2 * triples
    for name, source in parts.sources.items() if job.teachers else ():
        is_done = _is_done(parts, "scores", name)
        if source in ARCHITECTURES:
            for rate in job.options_of(source, is_teacher=True)[0]["learning_rates"]:
                yield training(source, parts.folder("teachers", "trained", f"{source}-{rate:g}"), is_teacher=True)
            seconds = 0.0 if is_done else _texts(probe(source, is_teacher=True), scored, len(parts.documents))
        else:
            seconds = 0.0 if is_done or source == BM25 else scored * _pair_of_teacher(parts, source)
        yield Stage(f"teachers/{name}", seconds, scored * LINE, is_done=is_done)
    stages = []
    for architecture in job.architectures:
        for condition in job.conditions:
            loss = "ranknet" if condition == NO_TEACHER else job.loss
            rates = [f"{rate:g}-seed0" for rate in job.options_of(architecture)[0]["learning_rates"]]
            for run in [*rates, *(f"*-seed{seed}" for seed in range(1, job.seeds))]:  # others have the chosen rate
                stages.append(
                    training(architecture, parts.folder("students", architecture, f"{condition}-{loss}-{run}"))
                )
                yield stages[-1]
    is_done = _is_done(parts, "report") and all(stage.is_done for stage in stages)
    yield Stage("report", 0.0, is_done=True) if is_done else _report(parts, probe, queries["test"] * job.candidates)


def _is_done(parts: Distillation, *folder: str) -> bool:
    return read_state(parts.folder(*folder)).get("is_done", False)


def _texts(cost: _Probe, pairs: int, passages: int) -> float:
    """Seconds of scoring pairs from text; a passage that is encoded alone is encoded once."""
    alone = cost.passage or 0.0
    return pairs * max(cost.pair - alone, 0.0) + min(pairs, passages) * alone


def _candidates(parts: Distillation, queries: int, disk: int) -> Stage:
    if _is_done(parts, "candidates"):
        return Stage("candidates", 0.0, is_done=True)
    count = min(SAMPLED_PASSAGES, len(parts.documents))
    with tempfile.TemporaryDirectory() as folder:
        columns = {"id": list(map(str, range(count))), "text": _some(parts.documents, count)}
        store = TextStore.from_dataset(datasets.Dataset.from_dict(columns), folder=folder)
        start = time.perf_counter()
        index = BM25Index.build(store)
        built = time.perf_counter()
        asked = {str(i): text for i, text in enumerate(_some(parts.queries, 100))}
        index.search(asked, min(parts.job.candidates, count))
        searched = time.perf_counter()
    growth = len(parts.documents) / count
    seconds = (built - start) * growth + (searched - built) / len(asked) * queries * max(growth**0.5, 1.0)
    return Stage("candidates", seconds, disk, peak_mb() * 2**20 + 500 * len(parts.documents))


def _report(parts: Distillation, probe: Any, pairs: int) -> Stage:
    job, seconds, disk, memory = parts.job, 0.0, 0.0, 0.0
    for architecture in job.architectures:
        cost, students = probe(architecture), len(job.conditions)
        ranked = students * job.seeds + 1  # and untrained
        timed = (
            students * (TIMED_QUERIES + 2) * job.candidates if cost.passage is None else students * job.candidates * 2
        )
        seconds += ranked * _texts(cost, pairs, len(parts.documents)) + timed * cost.pair
        disk += ranked * pairs * LINE
        memory = max(memory, cost.memory)
        if job.retrieve and architecture == "bert_dot":
            seconds += students * len(parts.documents) * cost.passage
            memory = max(memory, cost.memory + 2_048 * len(parts.documents))  # vectors of 512 values
    return Stage("report", seconds, disk, memory)


# ---- Probes ---------------------------------------------------------------------------------------------------------


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def _rows(store: TextStore, count: int) -> np.ndarray:
    """So many rows, from all over a store; again from the start where it has fewer."""
    return np.linspace(0, max(len(store), count) - 1, count).astype(int) % len(store)


def _some(store: TextStore, count: int) -> list[str]:
    return store.texts.take(pa.array(_rows(store, count))).to_pylist()


def _some_rows(parts: Distillation, count: int) -> datasets.Dataset:
    """Triples of random texts."""
    rows = _rows(parts.documents, count)
    columns = {"query_id": parts.queries.ids_of(_rows(parts.queries, count)), "pos_id": parts.documents.ids_of(rows)}
    columns["neg_id"] = parts.documents.ids_of((rows + 1) % len(parts.documents))
    return datasets.Dataset.from_dict(columns | {"pos_score": [1.0] * count, "neg_score": [0.0] * count})


def _probe(parts: Distillation, architecture: str, is_teacher: bool) -> _Probe:
    """Three steps of training on random pairs, and some scores."""
    began, batch = time.perf_counter(), CPU_BATCH if parts.device == "cpu" else parts.job.batch_size
    before = peak_mb() * 2**20
    with tempfile.TemporaryDirectory() as folder:
        job, args = parts.training_of(architecture, NO_TEACHER, 1e-9, 0, Path(folder), is_teacher)
        settings = {"max_steps": STEPS, "per_device_train_batch_size": batch, "save_strategy": "no"}
        settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True, "report_to": []}
        for name, value in settings.items():
            setattr(args, name, value)
        times, model, tokenizer = _StepTimes(), job.load_model(), load_tokenizer(job.model_name)
        trainer = RankingTrainer(
            model,
            args,
            train_dataset=_some_rows(parts, batch * STEPS),
            queries=parts.queries,
            documents=parts.documents,
            processing_class=tokenizer,
            callbacks=[times],
        )
        trainer.remove_callback(PrinterCallback)  # what it says would stand before the table
        trainer.train()
        triple = (times.ends[-1] - times.ends[WARM_UP - 1]) / (len(times.ends) - WARM_UP) / batch
        trainer.save_model(_internal_call=True)
        start = time.perf_counter() - began - triple * batch * STEPS
    ranker = Ranker(model.eval(), tokenizer)
    query, passages = _some(parts.queries, 1), _some(parts.documents, SCORED_PAIRS)
    pair = _seconds(lambda: ranker.score(query * SCORED_PAIRS, passages)) / SCORED_PAIRS
    is_apart = model.config.is_storable
    passage = _seconds(lambda: ranker.encode_documents(passages)) / SCORED_PAIRS if is_apart else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    activations = max(peak_mb() * 2**20 - before - 16 * parameters, 0) / batch * parts.job.batch_size
    return _Probe(triple, pair, passage, start, 4 * parameters, before + 16 * parameters + activations)


def _seconds(call: Any) -> float:
    call()  # the first is slower
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _pair_of_teacher(parts: Distillation, name: str) -> float:
    teacher = load_teacher(name, device=parts.device)
    query, passages = _some(parts.queries, 1), _some(parts.documents, SCORED_PAIRS)
    return _seconds(lambda: teacher.score(query * SCORED_PAIRS, passages)) / SCORED_PAIRS


# ---- Words ----------------------------------------------------------------------------------------------------------


def _time(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _size(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
