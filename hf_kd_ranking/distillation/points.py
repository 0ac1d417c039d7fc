"""The pipelines that `distill` chooses from: a ranker, a depth and a weight of the first stage, measured and timed.

First stages by themselves, and students before their training, can be chosen too. Everything here reads the validation
queries only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..artifacts import read_json, write_json
from ..data.passages import texts_of
from ..data.runs import Run, read_run, write_run
from ..evaluation.metrics import evaluate_queries, mean_values
from ..evaluation.rerank import rerank_run
from ..hub.model_card import RankerCard, write_card
from ..interop.export import export_ranker
from ..interop.onnx import OnnxRanker
from ..models import ARCHITECTURES
from ..ranker import Ranker
from ..reporting.efficiency import measure_efficiency
from ..retrieval.base import Index
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import fuse_runs
from ..searcher import combine, open_vectors
from ..teachers.load import load_teacher
from .candidates import grades, ranking
from .context import Context
from .job import FLOAT32, INT8, RERANK, TargetNotMetError
from .students import Recipe, Student, untrained_ranker, validation_value
from .teaching import Teacher
from .work import Artifact, model_path, shared

TIMED_QUERIES = 20
WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the first stage's scores


@dataclass(frozen=True)
class System:
    """A ranker that can be chosen: trained once per seed, or not trained.

    Args:
        name: "colbert teacher", "bert_dot untrained".
        students: the folders of its checkpoints, one per seed.
        label: the architecture, with its number of layers if several are tried.
        precision: "float32" or "int8".
        is_trained: False for a student before its training.
        control: name of the ranker that it is tested against, such as the same student without a teacher.
    """

    name: str  # "colbert teacher", "bert_dot untrained"
    students: tuple[Student, ...]  # one per seed
    label: str  # the architecture, with its number of layers if several are tried
    precision: str = FLOAT32
    is_trained: bool = True
    control: str | None = None  # the ranker that it is tested against, such as the same student without a teacher

    @property
    def can_store(self) -> bool:
        """True if the vectors of documents can be computed before a query is known."""
        config = ARCHITECTURES[self.students[0].recipe.architecture].config_class
        return config.vectors_per_text != "none" and self.precision == FLOAT32


@dataclass(frozen=True)
class Point:
    """One pipeline: a first stage, and a ranker with its depth and the weight of the first stage's scores.

    Args:
        first_stage: name of what finds the candidates, "BM25" or "candidates".
        system: name of the ranker; None for the first stage by itself.
        seed: number of the training that is delivered, the best on dev.
        depth: candidates that are re-ranked, or documents that are found.
        weight: of the first stage's scores in the sum, 0 to 1.
        precision: of the ranker.
        dev: measure on the validation queries.
        latency_ms: median per query, with BM25 if that is the first stage; the user's engine is not timed.
    """

    first_stage: str  # "BM25" or "candidates"
    system: str | None  # name of the ranker; None for the first stage by itself
    seed: int  # number of the training that is delivered, the best on dev
    depth: int  # candidates that are re-ranked, or documents that are found
    weight: float  # of the first stage's scores in the sum, 0 to 1
    precision: str  # of the ranker
    dev: float  # measure on the validation queries
    latency_ms: float  # median per query, with BM25 if that is the first stage; the user's engine is not timed

    def name(self, k: int) -> str:
        """Return the name of the pipeline in tables; a depth of k is not named."""
        if self.system is None:
            return self.first_stage
        name = self.system
        if self.weight:
            name += f" + {self.first_stage}"
        if self.depth < k:
            name += f", depth {self.depth}"
        return name


# ---- Rankings -------------------------------------------------------------------------------------------------------


def save_untrained(folder: Path, recipe: Recipe, context: Context) -> None:
    """Save a student as it is before its training, which is a candidate of the choice."""
    ranker = untrained_ranker(recipe, context)
    ranker.save_pretrained(folder / "ranker")
    card = RankerCard(
        repository=f"{recipe.architecture}-untrained",
        model_type=ranker.model.config.model_type,
        teacher="nobody, the ranker is not trained",
        loss="none",
        data=context.job.data_of("test"),
        rows=0,
        settings={},
        results=[],
        max_query_length=recipe.max_query_length,
        max_document_length=recipe.max_document_length,
        base_model=context.job.base_model,
    )
    write_card(folder / "ranker", card)


def quantise(folder: Path, students: Sequence[Student], measure: str) -> None:
    """Export the seed that is best on the validation queries as a graph with 8-bit weights."""
    best = max(students, key=lambda student: validation_value(student.training, measure))
    export_ranker(best.checkpoint, "onnx-int8", folder / "ranker", overwrite=True)


@shared
def rank_candidates(folder: Path, student: Student, precision: str, candidates: Artifact, context: Context) -> None:
    """Rank the candidates of a split with a ranker."""
    ranker = load_student(student, precision, context, is_distributed=True)
    listed, run = ranking(candidates), Run()
    parts = [listed]
    if precision == INT8:  # scores depend on the batch, which is one query in the pipeline
        parts = [Run({query_id: found}) for query_id, found in listed.items()]
    for part in parts:
        run.update(rerank_run(ranker, part, context.queries, context.documents))
    if context.is_main_process:
        write_run(run, folder / "run.trec", tag=folder.name.replace(" ", "_"))


def load_student(
    student: Student, precision: str, context: Context, is_distributed: bool = False
) -> Ranker | OnnxRanker:
    """Load a student as it will be delivered; `is_distributed` as of `Ranker`, an int8 graph shares no work."""
    if precision == INT8:
        return OnnxRanker(student.checkpoint)
    return Ranker.from_pretrained(student.checkpoint, device=context.device, is_distributed=is_distributed)


def dev_ranking(artifact: Artifact) -> Run:
    """Read the ranking of the validation queries of a step, or that which a training left."""
    if (artifact.path / "run.trec").is_file():
        return ranking(artifact)
    return read_run(artifact.path / "ranker" / "runs" / "held_out.trec")


# ---- Latency --------------------------------------------------------------------------------------------------------


def time_rankers(
    folder: Path,
    systems: Sequence[System],
    teachers: Mapping[str, Teacher],
    candidates: Artifact,
    index: Artifact,
    searches: Mapping[str, Artifact],
    depths: Sequence[int],
    device: str,
    context: Context,
) -> None:
    """Measure latency, memory and storage of all rankers, of teachers that are models, and of the first stages.

    The candidates are those of some validation queries; first stages search with the largest depth. `searches` are
    ranker -> its search of the collection, if that is what is chosen.
    """
    rankers: dict[str, Callable[[], Any]] = {}
    for system in systems:
        rankers[system.name] = partial(load_student, system.students[0], system.precision, context)
    for name, teacher in teachers.items():
        if context.job.scores or isinstance(teacher, str):  # BM25, and what answers over a network
            continue
        label = "teacher" if len(teachers) == 1 else f"teacher {name}"
        rankers[label] = partial(_load_teacher, teacher, context)
    timed = ranking(candidates).top(max(depths))
    query_ids = [query_id for query_id, found in timed.items() if found][:TIMED_QUERIES]
    documents, counts = [], []
    for query_id in query_ids:
        passages, of_documents = texts_of(context.documents, [doc_id for doc_id, _ in timed[query_id]])
        documents.append(passages)
        counts.append(of_documents)
    bm25 = BM25Index.open(index.path / "index")
    first_stages = {"BM25": lambda query: bm25.search({"query": query}, max(depths))}
    for name, searched in searches.items():
        student = next(system.students[0] for system in systems if system.name == name)
        ranker = Ranker.from_pretrained(student.checkpoint, device=device)
        vectors = open_vectors(searched.path / "vectors", ranker, is_searched=True)[1]
        first_stages[name] = partial(_search_one, vectors, max(depths))
    queries = context.queries[query_ids]
    options = {"depths": depths, "first_stages": first_stages, "counts": counts}
    figures = measure_efficiency(rankers, queries, documents, **options)
    write_json(folder / "efficiency.json", figures)


def _search_one(index: Index, k: int, query: str) -> None:
    index.search({"query": query}, k)


def _load_teacher(teacher: Teacher, context: Context) -> Any:
    """Load a teacher, as a ranker if it is one."""
    path = model_path(teacher)
    try:
        return Ranker.from_pretrained(path, device=context.device)
    except (ValueError, OSError):  # a model of another kind
        return load_teacher(str(path), device=context.device)


# ---- Points ---------------------------------------------------------------------------------------------------------


def find_points(
    folder: Path,
    systems: Sequence[System],
    rankings: Mapping[str, Sequence[Artifact]],
    first_stages: Mapping[str, Artifact],
    judgments: Artifact,
    timing: Artifact,
    settings: Mapping[str, Any],
) -> None:
    """Measure every pipeline on the validation queries, into `points.json`.

    For each ranker the weight of the first stage is fitted at the full depth; every depth is tried with and without.
    `rankings` are ranker -> one per seed; the first of `first_stages` gives the candidates; `settings` are `measure`,
    `depths`, `fusion` and `purpose` of the job.
    """
    measure, depths, qrels = settings["measure"], settings["depths"], grades(judgments)
    timed = read_json(timing.path / "efficiency.json")
    first_stage, first = next(iter(first_stages.items()))
    candidates, points, by_seed = ranking(first), [], {}

    def value(run: Run) -> float:
        return mean_values(evaluate_queries(run, qrels, (measure,)))[measure]  # 0 if nothing relevant is found

    for name, artifact in first_stages.items():
        latency = _search_latency(timed, name)
        points.append(Point(name, None, 0, max(depths), 0.0, FLOAT32, value(ranking(artifact)), latency))
    for system in systems:
        runs = [dev_ranking(artifact) for artifact in rankings[system.name]]
        values = by_seed[system.name] = [value(run) for run in runs]
        seed = values.index(max(values))
        fused = partial(fuse, candidates, runs[seed], settings["purpose"])
        weights = [0.0]
        if settings["fusion"]:
            fitted = max(WEIGHTS, key=lambda weight: value(fused(max(depths), weight)))
            weights.append(fitted)
        for depth, weight in product(depths, weights):
            latency = _latency(timed, system.name, depth)
            if settings["purpose"] == RERANK or weight > 0:
                latency += _search_latency(timed, first_stage)
            dev = value(fused(depth, weight))
            points.append(Point(first_stage, system.name, seed, depth, weight, system.precision, dev, latency))
    content = {"points": [asdict(point) for point in points], "seeds": by_seed}
    write_json(folder / "points.json", content)


def _latency(timed: Mapping[str, Any], name: str, depth: int) -> float:
    """Return the median milliseconds of a ranker, of its search if that was timed."""
    if name in timed["first_stages"]:
        return _search_latency(timed, name)
    return timed["rankers"][name]["total_ms_by_depth"][str(depth)]["p50"]


def _search_latency(timed: Mapping[str, Any], name: str) -> float:
    """Return the median milliseconds of a search; 0 for the user's engine, which cannot be timed here."""
    searched = timed["first_stages"].get(name)
    return 0.0 if searched is None else searched["total_ms"]["p50"]


def fuse(candidates: Run, scored: Run, purpose: str, depth: int, weight: float) -> Run:
    """Return what a pipeline returns, from the first stage's candidates and the ranker's scores."""
    fused = Run()
    if purpose == RERANK:
        for query_id, found in candidates.items():
            fused[query_id] = combine(found, dict(scored.get(query_id, ())), depth, weight)
        return fused
    if weight == 0:
        return scored.top(depth)
    return fuse_runs([scored.top(depth), candidates.top(depth)], "weighted_sum", [1 - weight, weight])


def read_points(found: Artifact) -> list[Point]:
    """Read the points of a step."""
    content = read_json(found.path / "points.json")
    return [Point(**point) for point in content["points"]]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both value and latency, fastest first."""
    best, kept = float("-inf"), []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.dev)):
        if point.dev > best:
            kept.append(point)
            best = point.dev
    return kept


def choose(points: Sequence[Point], budget_ms: float | None) -> Point:
    """Return the point that is best on the validation queries within a budget; of equal ones the fastest.

    Raises:
        TargetNotMetError: if no point is within the budget; it names the fastest.
    """
    within = [point for point in points if budget_ms is None or point.latency_ms <= budget_ms]
    if not within:
        fastest = min(points, key=lambda point: point.latency_ms)
        raise TargetNotMetError(
            f"No pipeline is within {budget_ms:g} ms per query; the fastest, {fastest.name(fastest.depth)} at depth "
            f"{fastest.depth}, takes {fastest.latency_ms:.1f} ms: raise --budget-ms, lower --k, or add a faster "
            "architecture."
        )
    return frontier(within)[-1]
