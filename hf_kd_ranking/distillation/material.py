"""The first half of `distill`: candidates, judgments, the teachers' scores, and the lists that students learn from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..models import ARCHITECTURES
from ..teachers.endpoint import is_endpoint
from . import candidates, teaching
from .context import Context, name_sources
from .job import BM25, FIRST_TEACHER, NO_TEACHER, SPLITS, TEACHER
from .teaching import Teacher
from .work import Artifact, Workspace

MEAN = "mean"  # of the teachers; no teacher is called so
Rows = dict[str, Path | Artifact]  # condition -> what its students learn from


@dataclass
class Material:
    """The data that students learn from and are measured on, filled step by step.

    Args:
        index: BM25's.
        bm25: split -> BM25's ranking.
        candidates: split -> what the teachers score, and what is re-ranked.
        judgments: by split.
        teachers: name -> teacher.
        scores: split -> teacher, and "mean" -> its scores of the candidates.
        rows: condition -> what its students learn from.
    """

    index: Artifact  # BM25's
    bm25: dict[str, Artifact] = field(default_factory=dict)  # split -> BM25's ranking
    candidates: dict[str, Artifact] = field(default_factory=dict)  # split -> what is scored and re-ranked
    judgments: dict[str, Artifact] = field(default_factory=dict)  # by split
    teachers: dict[str, Teacher] = field(default_factory=dict)  # by name
    scores: dict[str, dict[str, Artifact]] = field(default_factory=dict)  # split -> teacher, and "mean" -> its scores
    rows: Rows = field(default_factory=dict)


def prepare(work: Workspace, context: Context, train_teacher: Callable[[str, str, Material], Artifact]) -> Material:
    """Make everything that students learn from.

    `train_teacher` trains an architecture on the labels, given its name, the name of the teacher and the material.
    """
    data = Material(work.step("bm25", candidates.index_collection, context.job.language, context))
    find_candidates(work, context, data)
    if not context.job.brings_rows:
        score(work, context, data, train_teacher)
    sample(work, context, data)
    return data


# ---- Candidates and judgments ---------------------------------------------------------------------------------------


def find_candidates(work: Workspace, context: Context, data: Material) -> None:
    """Find the candidates of all splits, and write down the judgments; scores bring what is trained on."""
    job = context.job
    for split in SPLITS[1:] if job.scores else SPLITS:
        k = job.candidate_depth if split == "train" else job.k
        inputs = (data.index, context.texts(split), k, job.exclude_same_id)
        data.bm25[split] = work.step(f"bm25_search/{split}", candidates.search_bm25, *inputs)
        data.candidates[split] = data.bm25[split]
        if job.candidates is not None:
            inputs = (Path(job.candidates), context.splits[split], k, job.exclude_same_id)
            given = work.step(f"given_candidates/{split}", candidates.select_candidates, *inputs)
            data.candidates[split] = given
    if job.is_judged:
        for split in SPLITS:
            if split not in job.agreement_splits:
                inputs = (context.grades(split),)
                data.judgments[split] = work.step(f"judgments/{split}", candidates.write_judgments, *inputs)
    if "train" in data.candidates:
        sources = {BM25: data.bm25["train"], "candidates": data.candidates["train"]}
        if "dense" in job.shares:
            depth = job.candidate_depth
            inputs = (Path(context.dense_model), context.texts("train"), depth, job.exclude_same_id, context)
            sources["dense"] = work.step("dense_search", candidates.search_vectors, *inputs)
        chosen = {name: sources[name] for name in job.shares}
        data.candidates["train"] = mix(work, context, "candidates/train", chosen, job.shares)


def mix(
    work: Workspace, context: Context, name: str, sources: Mapping[str, Artifact], shares: Mapping[str, float]
) -> Artifact:
    """Mix training candidates from all sources by their shares."""
    inputs = (sources, shares, context.job.candidates_per_query, context.grades("train"))
    return work.step(name, candidates.mix_candidates, *inputs)


# ---- Teachers -------------------------------------------------------------------------------------------------------


def score(work: Workspace, context: Context, data: Material, train_teacher: Callable[..., Artifact]) -> None:
    """Let the teachers score all candidates; those that are architectures are trained first.

    The validation queries come first: a weak teacher stops the job before the long work.
    """
    job = context.job
    if set(job.teachers) & set(ARCHITECTURES):
        data.rows[NO_TEACHER] = label(work, context, data)
    for name, source in name_sources(job).items():
        if source == BM25:
            data.teachers[name] = BM25
        elif source in ARCHITECTURES:
            data.teachers[name] = train_teacher(source, name, data)
        elif is_endpoint(source):
            data.teachers[name] = source
        else:
            data.teachers[name] = Path(source)
    data.scores["dev"] = score_split(work, context, data, "dev")
    if "dev" in data.judgments:
        each = {name: scored for name, scored in data.scores["dev"].items() if name != MEAN}
        inputs = (data.scores["dev"][MEAN], each, data.candidates["dev"], data.judgments["dev"])
        work.step("teacher_check", teaching.check_teacher, *inputs, job.measure, job.force)
    for split in ("train", "test"):
        data.scores[split] = score_split(work, context, data, split)
    for split in job.agreement_splits:
        inputs = (data.scores[split][MEAN],)
        data.judgments[split] = work.step(f"judgments/{split}", candidates.judge_by_agreement, *inputs)


def score_split(
    work: Workspace, context: Context, data: Material, split: str, folder: str = "teacher_scores"
) -> dict[str, Artifact]:
    """Score the candidates of a split by every teacher, and average: teacher, and "mean" -> scores."""
    job, scores = context.job, {}
    for name, teacher in data.teachers.items():
        step, inputs = teaching.select_scores, (teacher, context.splits[split], context)
        if not job.scores:
            inputs = (teacher, data.candidates[split], data.bm25[split], job.teacher_bf16, context)
            step = teaching.score_candidates
        scores[name] = work.step(f"{folder}/{name}/{split}", step, *inputs)
    each = list(scores.values())
    scores[MEAN] = each[0]
    if len(each) > 1:
        scores[MEAN] = work.step(f"{folder}/mean/{split}", teaching.average_scores, each)
    return scores


# ---- Lists ----------------------------------------------------------------------------------------------------------


def sample(work: Workspace, context: Context, data: Material) -> None:
    """Make the lists of every condition."""
    job = context.job
    if job.brings_rows:
        files = [Path(path) for path in job.scores]
        data.rows[NO_TEACHER] = work.step("lists/no_teacher", teaching.label_rows, files[0])
        data.rows[FIRST_TEACHER] = data.rows[TEACHER] = files[0]
        if len(files) > 1:
            data.rows[TEACHER] = work.step("lists/teacher", teaching.average_rows, files)
        return
    if NO_TEACHER in job.conditions and NO_TEACHER not in data.rows:
        data.rows[NO_TEACHER] = label(work, context, data)
    scored = {TEACHER: MEAN, FIRST_TEACHER: next(iter(data.teachers))}
    for condition in job.conditions:
        if condition != NO_TEACHER:
            teacher = data.scores["train"][scored[condition]]
            data.rows[condition] = sample_lists(work, context, data, f"lists/{condition}", teacher)


def sample_lists(work: Workspace, context: Context, data: Material, name: str, teacher: Artifact) -> Artifact:
    """Sample lists by a teacher's scores."""
    inputs = (teacher, data.judgments.get("train"), teaching.sampling_settings(context.job), context)
    return work.step(name, teaching.sample_lists, *inputs)


def label(work: Workspace, context: Context, data: Material) -> Artifact:
    """Sample lists with labels; their documents are those of the first run of scores, if the job brings runs."""
    listed = data.candidates.get("train")
    if listed is None:
        listed = data.scores["train"][next(iter(data.teachers))]
    inputs = (
        listed,
        data.bm25.get("train"),
        data.judgments["train"],
        teaching.sampling_settings(context.job),
        context,
    )
    return work.step("lists/no_teacher", teaching.label_lists, *inputs)
