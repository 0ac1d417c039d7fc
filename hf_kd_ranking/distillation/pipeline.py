"""`distill`: every step in order, from a collection and a teacher to the best ranker within a latency budget.

`work.step(name, function, *inputs)` runs a function unless its artifact exists and was made from the same inputs. With
a `costs.Plan` in place of a `Workspace` the same list is walked and every step is asked for its cost.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..artifacts import building, locked
from ..models import ARCHITECTURES
from . import selection, steps
from .context import Context, name_sources
from .costs import Cost, Plan
from .job import BM25, FIRST_TEACHER, NO_TEACHER, SPLITS, TEACHER, DistillJob
from .students import Recipe, Student, choose_rate, train_student
from .work import Artifact, Workspace


class Material(NamedTuple):
    """The data that students learn from and are measured on."""

    candidates: dict[str, Artifact]  # split -> BM25's candidates
    judgments: dict[str, Artifact]  # by split
    rankings: dict[str, Artifact]  # teacher, or "mean" -> its ranking of the candidates
    scores: dict[str, Path | Artifact]  # condition -> teacher rows or labels


def prepare(work: Workspace, context: Context) -> Material:
    """Make what students learn from: candidates, judgments, labelled triples, teachers and their scores."""
    job = context.job
    index = work.step("bm25", steps.index_collection, context)
    data = Material({}, {}, {}, {})
    for split in SPLITS[1:] if job.scores else SPLITS:  # scores bring what is trained on
        positives = context.grades(split) if split == "train" else {}
        inputs = (index, context.texts(split), job.k, positives)
        data.candidates[split] = work.step(f"candidates/{split}", steps.find_candidates, *inputs)
    if context.is_judged:
        for split in SPLITS:
            data.judgments[split] = work.step(f"judgments/{split}", steps.write_judgments, context.grades(split))
        label(work, data, job)
    teachers: dict[str, str | Path | Artifact] = {}
    for name, source in name_sources(job).items():
        teachers[name] = BM25 if source == BM25 else Path(source)
        if source in ARCHITECTURES:  # trained on the labels
            recipe = Recipe.of_job(job, source, NO_TEACHER, is_teacher=True)
            teachers[name] = train(work, f"teachers/{name}", recipe, data, context, is_teacher=True)[0].training
    if not job.brings_rows:
        rank(work, teachers, data, context)
    if not context.is_judged:  # the teachers' best candidates count as relevant
        for split in SPLITS:
            inputs = (data.rankings["mean"], context.splits[split])
            data.judgments[split] = work.step(f"judgments/{split}", steps.judge_by_agreement, *inputs)
        label(work, data, job)
    scores = list(teachers.values())
    if not job.brings_rows:
        inputs = (data.scores[NO_TEACHER], data.candidates.get("train"), context)
        scores = [work.step(f"scores/{name}", steps.score_triples, teachers[name], *inputs) for name in teachers]
    data.scores[FIRST_TEACHER] = data.scores[TEACHER] = scores[0]
    if len(scores) > 1:
        data.scores[TEACHER] = work.step("scores/mean", steps.average_scores, scores)
    return data


def label(work: Workspace, data: Material, job: DistillJob) -> None:
    """Sample the triples that all students see, with the labels as scores."""
    files, triples = [Path(path) for path in job.scores], job.triples_per_query
    inputs = (files, data.candidates.get("train"), data.judgments["train"], triples)
    data.scores[NO_TEACHER] = work.step("labels", steps.label_triples, *inputs)


def rank(work: Workspace, teachers: Mapping[str, str | Path | Artifact], data: Material, context: Context) -> None:
    """Rank the candidates of dev and test (of all queries, if they are not judged) with every teacher."""
    job, splits = context.job, SPLITS[1:] if context.is_judged else SPLITS
    query_ids = [query_id for split in splits for query_id in context.splits[split]]
    runs = [data.candidates[split] for split in splits if split in data.candidates]
    for name, teacher in teachers.items():
        data.rankings[name] = work.step(f"rankings/{name}", steps.rank_candidates, teacher, runs, query_ids, context)
    each = dict(data.rankings)
    data.rankings["mean"] = mean = work.step("rankings/mean", steps.average_rankings, list(each.values()))
    if context.is_judged:
        inputs = (mean, each, data.candidates["dev"], data.judgments["dev"], job.measure, job.force)
        work.step("teacher_check", steps.check_teacher, *inputs)


def train(
    work: Workspace, folder: str, recipe: Recipe, material: Material, context: Context, is_teacher: bool = False
) -> list[Student]:
    """Train with every learning rate, choose on the validation queries, then train the other seeds of students."""
    rates = context.job.training_options(recipe.architecture, is_teacher)[0]["learning_rates"]
    inputs = (material.scores[recipe.condition], material.candidates["dev"], material.judgments["dev"], context)
    trained = [work.step(f"{folder}/rate-{rate:g}", train_student, recipe, rate, *inputs) for rate in rates]
    chosen = work.step(f"{folder}/chosen", choose_rate, trained, rates, recipe.measure)
    seeds = [Student(recipe, chosen)]
    for seed in range(1, 1 if is_teacher else context.job.seeds):
        other = replace(recipe, seed=seed)
        training = work.step(f"{folder}/seed-{seed}", train_student, other, chosen, *inputs)
        seeds.append(Student(other, training))
    return seeds


def measure(work: Workspace, students: Mapping[str, list[Student]], material: Material, context: Context) -> Artifact:
    """Rank the test queries with everything, once; time the students; write figures, cards and the report."""
    job, candidates, judgments = context.job, material.candidates["test"], material.judgments["test"]
    rankings = {"BM25": [candidates]}
    if material.rankings:
        rankings["teacher"] = [material.rankings["mean"]]
    for name, source in name_sources(job).items():
        if len(material.rankings) > 2 and source != BM25:
            rankings[f"teacher {name}"] = [material.rankings[name]]
    for architecture in job.architectures:
        name, recipe = f"{architecture} untrained", Recipe.of_job(job, architecture, NO_TEACHER)
        rankings[name] = [work.step(f"test/{name}", selection.rank_untrained, recipe, candidates, context)]
    searches = {}
    for name, seeds in students.items():
        rankings[name] = []
        for number, student in enumerate(seeds):
            step = f"test/{name}" if number == 0 else f"test/{name} seed {number}"
            rankings[name].append(work.step(step, selection.rank_test, student, candidates, context))
        config = ARCHITECTURES[seeds[0].recipe.architecture].config_class
        if job.retrieve and config.vectors_per_text == "one" and config.similarity == "dot":
            inputs = (seeds[0], judgments, job.measure, context)
            searches[name] = work.step(f"collection_search/{name}", selection.search_collection, *inputs)
    firsts = {name: seeds[0] for name, seeds in students.items()}
    inputs = (firsts, context.splits["test"], job.k, context.device, context)
    timing = work.step("timing", selection.time_students, *inputs)
    inputs = (rankings, searches, firsts, judgments, candidates, timing, job.measure, job.collection_name, context)
    return work.step("report", selection.write_outcome, *inputs)


def make_all(work: Workspace, context: Context) -> tuple[Material, dict[str, list[Student]], Artifact]:
    """Make every artifact of a job: the material, "architecture condition" -> students (one per seed), the outcome."""
    material = prepare(work, context)
    students = {}
    for architecture in context.job.architectures:
        for condition in context.job.conditions:
            recipe = Recipe.of_job(context.job, architecture, condition)
            folder = f"students/{architecture}/{condition}-{recipe.loss}"
            students[f"{architecture} {condition}"] = train(work, folder, recipe, material, context)
    return material, students, measure(work, students, material, context)


def distill(job: DistillJob) -> dict[str, Any]:
    """Distil a teacher into every architecture of a job, and choose the best ranker within the latency budget.

    Every step has a folder in the job's output and runs once: the same call after an interruption resumes, and a call
    with another option repeats what depends on it.

    Returns:
        `test` and `dev` (name -> mean of the measure), `tests` (of every condition against no teacher: `treatment`,
        `control`, `difference`, `p_value`, `p_corrected`), `fused` (name -> the measure on test when BM25's scores
        are added, see `fuse_runs`), `retrieval` (name -> the measure in the whole collection), `latency_ms` (name ->
        median per query), `rates` (name -> learning rate), `folders` (name -> checkpoint), `queries` and `triples`
        (their numbers), `page` (the report), `best` (the chosen name) and `ranker`, its folder, ready to push.

    Raises:
        ValueError, FileNotFoundError, KeyError: for bad input, as far as possible before any work; if another process
            works in the output.
    """
    context, work = Context(job), Workspace(Path(job.output))
    with locked(work.folder):
        work.claim(subject(job))
        material, students, made = make_all(work, context)
        outcome = json.loads((made.path / "outcome.json").read_text(encoding="utf-8"))
        with steps.rows_file(material.scores[NO_TEACHER]).open("rb") as file:
            outcome["triples"] = sum(1 for _ in file)
        outcome["folders"] = {name: str(seeds[0].checkpoint.resolve()) for name, seeds in students.items()}
        outcome["best"] = selection.choose(outcome, job.budget_ms)
        outcome["ranker"], outcome["page"] = str(work.folder / "best"), str(work.folder / "report.html")
        with building(work.folder / "best", replaces=True) as best:
            shutil.copytree(students[outcome["best"]][0].checkpoint, best, dirs_exist_ok=True)
        shutil.copyfile(made.path / "report.html", outcome["page"])
    return outcome


def make_plan(job: DistillJob) -> list[Cost]:
    """Return what every step of a job will cost, in order, from probes on its own texts.

    Raises:
        ValueError, FileNotFoundError: as `distill` raises before any work.
    """
    context = Context(job)
    plan = Plan(context)
    plan.claim(subject(job))
    make_all(plan, context)
    return plan.costs


def subject(job: DistillJob) -> dict[str, Path]:
    """Return what an output folder is about; work for another collection or other queries must not replace it."""
    return {"collection": Path(job.collection), "queries": Path(job.queries)}
