"""The steps of `distill` up to the scores that students learn from: candidates, judgments, labels, teachers.

Each function makes the files of one folder from its inputs, see `work.Workspace`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from ..data.rows import TeacherRows, load_teacher_scores, write_teacher_scores
from ..data.runs import Run, read_qrels, read_run, write_qrels, write_run
from ..evaluation.metrics import evaluate_run
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import fuse_runs
from ..teachers import load
from ..teachers.ensemble import ensemble_teachers
from ..teachers.sample import sample_triples
from ..teachers.score import score_teacher
from .context import Context, Grades
from .job import BM25, is_run
from .work import Artifact

logger = logging.getLogger(__name__)

Teacher = str | Path | Artifact  # "bm25"; a folder, a name on the Hub or a file of scores; the step that trained it
AGREED = 3  # the teachers' best candidates that count as relevant where there are no judgments


def ranking(artifact: Artifact) -> Run:
    """Read the run of a step; it has no query where a system ranked training queries only."""
    path = artifact.path / "run.trec"
    return read_run(path) if path.stat().st_size else Run()


def grades(artifact: Artifact) -> Grades:
    """Read the judgments of a step."""
    return read_qrels(artifact.path / "qrels.txt")


def rows_file(scores: Artifact | Path) -> Path:
    """Return the file of the teacher rows of a step; a file that the user gave is returned as it is."""
    return scores.path / "rows.tsv" if isinstance(scores, Artifact) else scores


# ---- Candidates and judgments ---------------------------------------------------------------------------------------


def index_collection(folder: Path, context: Context) -> None:
    """Build the BM25 index of the collection."""
    BM25Index.build(context.documents).save(folder / "index", overwrite=True)


def find_candidates(folder: Path, index: Artifact, texts: Mapping[str, str], k: int, positives: Grades) -> None:
    """Search for the candidates of queries; relevant documents that BM25 missed are added with its lowest score."""
    run = BM25Index.open(index.path / "index").search(texts, k)
    for query_id, candidates in run.items():
        found = {doc_id for doc_id, _ in candidates}
        lowest = candidates[-1][1] if candidates else 0.0
        for doc_id, grade in positives.get(query_id, {}).items():
            if grade > 0 and doc_id not in found:
                candidates.append((doc_id, lowest))
    write_run(run, folder / "run.trec", tag="BM25")


def write_judgments(folder: Path, judgments: Grades) -> None:
    """Write the judgments of a split."""
    write_qrels(judgments, folder / "qrels.txt")


def judge_by_agreement(folder: Path, teacher: Artifact, query_ids: Sequence[str]) -> None:
    """Take the teacher's best candidates of each query for relevant, the best with the highest grade."""
    run, judgments = ranking(teacher).top(AGREED), {}
    for query_id in query_ids:
        doc_ids = dict(run.get(query_id, []))
        judgments[query_id] = dict(zip(doc_ids, range(AGREED, 0, -1), strict=False))
    write_qrels(judgments, folder / "qrels.txt")


# ---- Labels ---------------------------------------------------------------------------------------------------------


def label_triples(
    folder: Path, scores: Sequence[Path], candidates: Artifact | None, judgments: Artifact, per_query: int
) -> None:
    """Write triples with the labels 1 and 0 as scores.

    They are the rows of the user's scores, or sampled from the documents of all the user's runs, or from candidates.
    """
    if scores and not is_run(scores[0]):
        triples = load_teacher_scores(scores[0])
    elif scores:
        triples = sample_triples(*_common_documents(scores, grades(judgments)), per_query)
    else:
        triples = sample_triples(ranking(candidates), grades(judgments), per_query)
    _write_rows(triples, [[1.0, 0.0]] * len(triples), folder / "rows.tsv")


def _common_documents(scores: Sequence[Path], judged: Grades) -> tuple[Run, Grades]:
    """Return a run and judgments of the documents that all runs have."""
    runs = [read_run(path) for path in scores]
    common, known = Run(), {}
    for query_id, of_query in judged.items():
        listed = [dict(run.get(query_id, ())) for run in runs]
        doc_ids = set(listed[0]).intersection(*listed[1:])
        common[query_id] = [(doc_id, score) for doc_id, score in listed[0].items() if doc_id in doc_ids]
        known[query_id] = {doc_id: grade for doc_id, grade in of_query.items() if doc_id in doc_ids}
    return common, known


def _write_rows(triples: TeacherRows, scores: list[list[float]], output: Path) -> None:
    columns = {"query_id": triples.rows["query_id"], "doc_ids": triples.rows["doc_ids"], "teacher_scores": scores}
    write_teacher_scores(TeacherRows(datasets.Dataset.from_dict(columns)), output)


# ---- Teachers -------------------------------------------------------------------------------------------------------


def rank_candidates(
    folder: Path, teacher: Teacher, candidates: Sequence[Artifact], query_ids: Sequence[str], context: Context
) -> None:
    """Write a teacher's ranking of the candidates, "bm25" for their own order, or a run's ranking of the queries."""
    output = folder / "run.trec"
    if output.is_file():
        return
    run = Run()
    for artifact in candidates:
        run.update(ranking(artifact))
    if context.job.scores:
        scores = read_run(teacher)
        write_run(Run((query_id, scores[query_id]) for query_id in query_ids if query_id in scores), output)
    elif teacher == BM25:
        write_run(run, output, tag=BM25)
    else:
        score_teacher(_load(teacher, context), run, context.queries, context.documents, output)


def average_rankings(folder: Path, rankings: Sequence[Artifact]) -> None:
    """Average the rankings of the teachers, each scaled to 0..1 per query."""
    mean = ranking(rankings[0])
    if len(rankings) > 1:
        mean = fuse_runs([ranking(artifact) for artifact in rankings], "weighted_sum")
    write_run(mean, folder / "run.trec", tag="teacher")


def check_teacher(
    folder: Path,
    mean: Artifact,
    rankings: Mapping[str, Artifact],
    candidates: Artifact,
    judgments: Artifact,
    measure: str,
    is_forced: bool,
) -> None:
    """Stop a job whose teacher ranks the validation queries no better than BM25, before any student is trained.

    Raises:
        ValueError: with both values, unless `is_forced`.
    """
    common = ranking(candidates).keys() & ranking(mean).keys()
    judged = {query_id: of_query for query_id, of_query in grades(judgments).items() if query_id in common}
    if not judged:
        return

    def value(artifact: Artifact) -> float:
        return evaluate_run(ranking(artifact), judged, (measure,))[measure]

    bm25, teacher = value(candidates), value(mean)
    if teacher <= bm25 and not is_forced:
        raise ValueError(
            f"The teacher ranks the {len(judged)} validation queries no better than BM25 ({measure} {teacher:.4f}, "
            f"BM25 {bm25:.4f}), and students would learn that; give another teacher, or --force."
        )
    values = {name: value(artifact) for name, artifact in rankings.items()}
    best = max(values, key=values.get)
    if values[best] > teacher:
        figures = f"{measure} {values[best]:.4f}, mean {teacher:.4f}"
        logger.warning(
            f"{best} ranks the {len(judged)} validation queries better than the mean of the teachers ({figures}): a "
            "mean pays where teachers are about equally good."
        )


def score_triples(
    folder: Path, teacher: Teacher, labels: Artifact, candidates: Artifact | None, context: Context
) -> None:
    """Write a teacher's scores of the triples; "bm25" and runs are looked up, see `rank_candidates`."""
    output = folder / "rows.tsv"
    if output.is_file():
        return
    if context.job.scores:
        _look_up_scores(read_run(teacher), labels, output)
    elif teacher == BM25:
        _look_up_scores(ranking(candidates), labels, output)
    else:
        score_teacher(_load(teacher, context), rows_file(labels), context.queries, context.documents, output)


def _look_up_scores(run: Run, labels: Artifact, output: Path) -> None:
    score_of = {query_id: dict(scored) for query_id, scored in run.items()}
    triples = load_teacher_scores(rows_file(labels))
    scores = []
    for row in triples.rows:
        known = score_of[str(row["query_id"])]
        scores.append([known[str(doc_id)] for doc_id in row["doc_ids"]])
    _write_rows(triples, scores, output)


def _load(teacher: Teacher, context: Context) -> load.Teacher:
    if isinstance(teacher, Artifact):
        teacher = teacher.path / "ranker"
    return load.load_teacher(str(teacher), device=context.device)


def average_scores(folder: Path, scores: Sequence[Path | Artifact]) -> None:
    """Average the scores of the teachers, each standardised over its file."""
    ensemble_teachers([rows_file(file) for file in scores], folder / "rows.tsv", "standardized", overwrite=True)
