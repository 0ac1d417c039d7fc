"""What `distill` delivers: the chosen pipeline with all its parts, in `best`."""

from pathlib import Path
from typing import Any

from ..processes import processes
from ..ranker import Ranker
from ..retrieval.bm25 import BM25Index
from ..searcher import Pipeline, open_vectors, save_pipeline
from .candidates import encode_collection
from .context import Context
from .job import SEARCH
from .material import Material
from .points import Point, System, load_student
from .work import Artifact, Workspace, shared

DESCRIBED = ("chosen", "measure", "test", "interval", "latency_ms", "verdict")


@shared
def encode(folder: Path, training: Artifact, context: Context) -> None:
    """Encode the collection with a ranker, into `vectors`."""
    path = training.path / "ranker"
    encode_collection(folder, Ranker.from_pretrained(path, device=context.device), context.documents)


def deliver(
    work: Workspace, context: Context, data: Material, chosen: Point, system: System | None, outcome: dict[str, Any]
) -> tuple[str, str | None]:
    """Write the chosen pipeline into the folder `best`, and return it and the folder of its ranker, if it has one."""
    best, parts = work.folder / "best", {}
    is_search, is_main = context.job.purpose == SEARCH, processes().is_main_process
    checkpoint = vectors = None
    if system is not None:
        student = system.students[chosen.seed]
        checkpoint = student.checkpoint
        if system.can_store and (context.job.store_vectors or is_search):
            vectors = work.step("vectors", encode, student.training, context)
        if is_main:
            parts["ranker"] = load_student(student, system.precision, context)
    if is_main and vectors is not None:
        parts["store"], index = open_vectors(vectors.path / "vectors", parts["ranker"], is_search)
        parts["index"] = index
    if is_main:
        if not is_search or chosen.weight or system is None:
            parts["first_stage"] = BM25Index.open(data.index.path / "index")
        description = {name: outcome[name] for name in DESCRIBED}
        parts |= {"documents": context.documents, "depth": chosen.depth, "weight": chosen.weight}
        save_pipeline(best, Pipeline(**parts, description=description), checkpoint, overwrite=True)
    processes().wait_for_everyone()
    return str(best), None if system is None else str(best / "ranker")
