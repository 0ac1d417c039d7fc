"""The steps of `distill` that make what students learn from: the teachers' scores of all candidates, and lists.

A teacher scores all candidates of a split once, which gives a run. Several are averaged by `fuse_runs` "standardized".
The same runs are checked, measured, and sampled for the lists that students see.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import torch

from ..artifacts import write_json
from ..data.passages import choose_passages
from ..data.rows import TeacherRows, load_teacher_scores, write_teacher_scores
from ..data.runs import Run, read_run, write_run
from ..evaluation.metrics import evaluate_run
from ..retrieval.fusion import fuse_runs
from ..teachers import load
from ..teachers.ensemble import ensemble_teachers
from ..teachers.sample import sample_triples
from ..teachers.score import score_teacher
from .candidates import PASSAGES, grades, passage_scores, ranking, write_passages
from .context import Context
from .job import BM25, DistillJob, TargetNotMetError
from .queries import Grades
from .work import Artifact, model_path, shared

logger = logging.getLogger(__name__)

# "bm25" or the address of an endpoint; a folder, a name on the Hub or a run; the step that trained it.
Teacher = str | Path | Artifact


def rows_file(rows: Artifact | Path) -> Path:
    """Return the file of the teacher rows of a step; a file that the user gave is returned as it is."""
    if isinstance(rows, Path):
        return rows
    lists = rows.path / "rows.jsonl"
    return lists if lists.is_file() else rows.path / "rows.tsv"


# ---- Scores of candidates -------------------------------------------------------------------------------------------


@shared
def score_candidates(
    folder: Path, teacher: Teacher, candidates: Artifact, bm25: Artifact | None, is_bf16: bool | None, context: Context
) -> None:
    """Write a teacher's scores of the candidates of a split; those of "bm25" are looked up in its run.

    The pairs per forward pass are those of the job, and change nothing.
    """
    aggregation = context.documents.aggregation
    output = folder / ("run.trec" if aggregation is None else PASSAGES)
    if (folder / "run.trec").is_file():
        return
    if teacher == BM25:
        if context.is_main_process:
            write_run(_look_up(ranking(candidates), ranking(bm25)), folder / "run.trec", tag=BM25)
            if aggregation is not None:
                shutil.copy(bm25.path / PASSAGES, folder)
        return
    dtype = None  # that of the device
    if is_bf16 is not None:
        dtype = torch.bfloat16 if is_bf16 else torch.float32
    batch_size = context.job.teacher_batch_size
    model = load.load_teacher(str(model_path(teacher)), device=context.device, batch_size=batch_size, dtype=dtype)
    if not output.is_file():
        score_teacher(model, ranking(candidates), context.queries, context.documents, output)
    if aggregation is not None and context.is_main_process:
        write_passages(folder, read_run(output), aggregation, "teacher")


def _look_up(candidates: Run, scores: Run) -> Run:
    """Return candidates with the scores of another run; what that lacks has the lowest of its query."""
    found = Run()
    for query_id, listed in candidates.items():
        known = dict(scores.get(query_id, []))
        lowest = min(known.values(), default=0.0)
        scored = [(doc_id, known.get(doc_id, lowest)) for doc_id, _ in listed]
        found[query_id] = sorted(scored, key=lambda pair: -pair[1])
    return found


def select_scores(folder: Path, run: Path, query_ids: Sequence[str], context: Context) -> None:
    """Take the scores of a split's queries from a run that the user gave, of passages if the collection has them."""
    selected = read_run(run).select(query_ids)
    tag = Path(run).stem.replace(" ", "_")
    if context.documents.aggregation is None:
        write_run(selected, folder / "run.trec", tag=tag)
    else:
        write_passages(folder, selected, context.documents.aggregation, tag)


def average_scores(folder: Path, rankings: Sequence[Artifact]) -> None:
    """Average the scores of the teachers over the queries that all of them have."""
    _write_mean(folder / "run.trec", [ranking(artifact) for artifact in rankings])
    passages = [passage_scores(artifact) for artifact in rankings]
    if None not in passages:
        _write_mean(folder / PASSAGES, passages)


def _write_mean(output: Path, runs: Sequence[Run]) -> None:
    common = set.intersection(*(set(run) for run in runs))
    kept = [Run((query_id, scored) for query_id, scored in run.items() if query_id in common) for run in runs]
    mean = fuse_runs(kept, "standardized") if common else Run()
    write_run(mean, output, tag="teacher")


def check_teacher(
    folder: Path,
    mean: Artifact,
    rankings: Mapping[str, Artifact],
    candidates: Artifact,
    judgments: Artifact,
    measure: str,
    is_forced: bool,
) -> None:
    """Stop a job whose teacher ranks the validation queries no better than their first stage, before any training.

    Raises:
        TargetNotMetError: with both values, unless `is_forced`.
    """
    common = ranking(candidates).keys() & ranking(mean).keys()
    judged = {query_id: of_query for query_id, of_query in grades(judgments).items() if query_id in common}
    if not judged:
        return

    def value(artifact: Artifact) -> float:
        return evaluate_run(ranking(artifact), judged, (measure,))[measure]

    first_stage, teacher = value(candidates), value(mean)
    if teacher <= first_stage and not is_forced:
        raise TargetNotMetError(
            f"The teacher ranks the {len(judged)} validation queries no better than their candidates were ranked "
            f"({measure} {teacher:.4f}, first stage {first_stage:.4f}), and students would learn that; give another "
            "teacher, or --force."
        )
    values = {name: value(artifact) for name, artifact in rankings.items()}
    best = max(values, key=values.get)
    if values[best] > teacher:
        figures = f"{measure} {values[best]:.4f}, mean {teacher:.4f}"
        logger.warning(
            f"{best} ranks the {len(judged)} validation queries better than the mean of the teachers ({figures}): a "
            "mean pays where teachers are about equally good."
        )


# ---- Lists ----------------------------------------------------------------------------------------------------------


def sampling_settings(job: DistillJob) -> dict:
    """Return what the sampling of lists depends on."""
    names = ("documents", "lists_per_query", "sampling", "relative_margin", "minimum_grade")
    return {name: getattr(job, name) for name in names}


def sample_lists(
    folder: Path, teacher: Artifact, judgments: Artifact | None, settings: dict, context: Context
) -> None:
    """Sample the lists that students learn from, with the teacher's scores; `settings` are `sampling_settings`.

    Of each document the passage is listed that the teacher scores best.
    The positive of a query without judgments is the teacher's best candidate. A judged document that the teacher did
    not score, which only happens with runs that the user gave, is as one without judgment.
    """
    scored, left_out, passages = ranking(teacher), Counter(), passage_scores(teacher)
    labels = {} if judgments is None else _scored_labels(grades(judgments), scored)
    if passages is not None:
        scored, labels = choose_passages(scored, passages, labels, context.documents)
    lists = settings["lists_per_query"]
    options = {name: settings[name] for name in ("documents", "sampling", "relative_margin", "minimum_grade")}
    rows = sample_triples(scored, labels, lists, scored, context.documents, left_out, takes_unjudged=True, **options)
    write_teacher_scores(rows, folder / "rows.jsonl")
    write_json(folder / "left_out.json", left_out)


def _scored_labels(labels: Grades, scored: Run) -> Grades:
    kept = {}
    for query_id, of_query in labels.items():
        known = dict(scored.get(query_id, ()))
        kept[query_id] = {doc_id: grade for doc_id, grade in of_query.items() if doc_id in known}
    return kept


def label_lists(
    folder: Path, candidates: Artifact, bm25: Artifact | None, judgments: Artifact, settings: dict, context: Context
) -> None:
    """Sample lists of queries with judgments without a teacher, with the labels 1 and 0 as scores.

    Of each document the passage is listed that BM25 scores best; of one that BM25 did not find, the first.
    """
    lists = settings["lists_per_query"]
    options = {name: settings[name] for name in ("documents", "minimum_grade")}
    listed, labels = ranking(candidates), grades(judgments)
    if context.documents.aggregation is not None:
        passages = passage_scores(candidates if bm25 is None else bm25)
        listed, labels = choose_passages(listed, passages, labels, context.documents)
    rows = sample_triples(listed, labels, lists, texts=context.documents, **options)
    _write_labels(rows, folder / "rows.jsonl")


def label_rows(folder: Path, rows: Path) -> None:
    """Write the rows that the user gave with the labels 1 and 0 as scores."""
    _write_labels(load_teacher_scores(rows), folder / "rows.tsv")


def _write_labels(rows: TeacherRows, output: Path) -> None:
    labels = []
    for doc_ids in rows.rows["doc_ids"]:
        labels.append([1.0] + [0.0] * (len(doc_ids) - 1))
    columns = {"query_id": rows.rows["query_id"], "doc_ids": rows.rows["doc_ids"], "teacher_scores": labels}
    write_teacher_scores(TeacherRows(datasets.Dataset.from_dict(columns)), output)


def count_rows(rows: Artifact | Path) -> int:
    """Return the number of rows of a step, or of a file that the user gave."""
    return len(load_teacher_scores(rows_file(rows)))


def average_rows(folder: Path, files: Sequence[Path]) -> None:
    """Average the scores of the rows that the user gave, each standardised over its file."""
    ensemble_teachers(files, folder / "rows.tsv", "standardized", overwrite=True)
