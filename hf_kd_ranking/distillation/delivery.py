"""The delivery of `distill`: the chosen pipeline with all its parts, in `best`."""

from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts import remove_folder
from ..processes import processes
from ..ranker import Ranker
from ..retrieval.bm25 import BM25Index
from ..searcher import Pipeline, open_vectors, save_pipeline
from .candidates import encode_collection
from .context import Context
from .job import SEARCH
from .material import Material
from .points import Point, System, load_student
from .work import Artifact, Workspace, model_path, shared

DESCRIBED = ("chosen", "measure", "test", "interval", "latency_ms", "verdict")


class Made(NamedTuple):
    """Everything that the steps of a job made."""

    data: Material
    systems: list[System]
    rankings: dict[str, dict[str, list[Artifact]]]  # system -> split -> rankings, one per seed
    outcome: Artifact


@shared
def encode(folder: Path, training: Artifact, context: Context) -> None:
    """Encode the collection with a ranker, into `vectors`."""
    ranker = Ranker.from_pretrained(model_path(training), device=context.device)
    encode_collection(folder, ranker, context.documents)


def deliver(work: Workspace, context: Context, made: Made, outcome: dict[str, Any]) -> tuple[str | None, str | None]:
    """Write the chosen pipeline into the folder `best`, and return it and the folder of its ranker.

    The user's own engine is not in the pipeline, which then re-ranks the candidates that it is given. If that engine
    alone is best there is nothing to deliver, and both are None.
    """
    best, chosen = work.folder / "best", Point(**outcome["pipeline"])
    system = next((system for system in made.systems if system.name == chosen.system), None)
    is_main, is_search = processes().is_main_process, context.job.purpose == SEARCH
    if chosen.first_stage != "BM25" and system is None:
        if is_main and best.exists():
            remove_folder(best)  # of an earlier choice
        return None, None
    parts: dict[str, Any] = {"documents": context.documents, "depth": chosen.depth, "weight": chosen.weight}
    parts["description"] = {name: outcome[name] for name in DESCRIBED}
    if chosen.first_stage == "BM25" and not (is_search and system is not None and chosen.weight == 0):
        parts["first_stage"] = BM25Index.open(made.data.index.path / "index")
    checkpoint = None
    if system is not None:
        student = system.students[chosen.seed]
        checkpoint, parts["ranker"] = student.checkpoint, load_student(student, system.precision, context)
        vectors = None
        if is_search:
            vectors = made.rankings[system.name]["test"][chosen.seed]
        elif system.can_store and context.job.store_vectors:
            vectors = work.step("vectors", encode, student.training, context)
        if vectors is not None:
            parts["store"], parts["index"] = open_vectors(vectors.path / "vectors", parts["ranker"], is_search)
    if is_main:
        save_pipeline(best, Pipeline(**parts), checkpoint, overwrite=True)
    processes().wait_for_everyone()
    return str(best), None if system is None else str(best / "ranker")
