"""`distill`: every step in order, from a collection and a teacher to the pipeline that is delivered.

`work.step(name, function, *inputs)` runs a function unless its artifact exists and was made from the same inputs. With
a `costs.Plan` in place of a `Workspace` the same list is walked and every step is asked for its cost.
"""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..artifacts import locked, read_json
from ..processes import processes
from . import candidates, points, teaching
from .context import Context
from .costs import Cost, Plan
from .delivery import Made, deliver
from .generation import with_queries
from .job import INT8, NO_TEACHER, RERANK, SEARCH, TEACHER, DistillJob, can_search
from .material import MEAN, Material, Rows, mix, prepare, sample_lists, score_split
from .outcome import Measured, write_outcome
from .points import System
from .students import Recipe, Student, choose_rate, kept_layers, train_student
from .wording import verdict
from .work import Artifact, Workspace, stopping_at_signals

Students = dict[str, list[Student]]  # name -> one per seed


# ---- Students -------------------------------------------------------------------------------------------------------


def train_all(work: Workspace, context: Context, data: Material, rows: Rows, is_second: bool = False) -> list[System]:
    """Train every architecture, with every number of layers, under every condition that there are rows for.

    Students with a teacher are compared with those without; those of the second round with those of the first.
    """
    wanted, labels, controls = {}, {}, {}
    conditions = [condition for condition in context.job.conditions if condition in rows]
    for architecture in context.job.architectures:
        kept = kept_layers(context.job, architecture).items()
        for (label, layers), condition in product(kept, conditions):
            name, control = f"{label} {condition}", None
            if is_second:
                name, control = f"{name} round 2", name
            elif condition != NO_TEACHER:
                control = f"{label} {NO_TEACHER}"
            recipe = Recipe.of_job(context.job, architecture, condition, context.live_teacher, layers)
            wanted[name] = (recipe, rows[condition])
            labels[name], controls[name] = label, control
    trained = train(work, context, data, "students", wanted, context.job.seeds)
    return [System(name, tuple(trained[name]), labels[name], control=controls[name]) for name in wanted]


def train(
    work: Workspace,
    context: Context,
    data: Material,
    folder: str,
    wanted: Mapping[str, tuple[Recipe, Path | Artifact]],
    seeds: int,
) -> Students:
    """Train with every learning rate, choose on the validation queries, then train the other seeds.

    `wanted` are name -> recipe and rows. Trainings that do not depend on one another run side by side, see
    `Workspace.steps`.
    """
    inputs = (data.candidates["dev"], data.judgments["dev"], context)
    steps, parallel = {}, context.job.parallel
    for name, (recipe, rows) in wanted.items():
        for rate in recipe.learning_rates:
            steps[f"{folder}/{name}/rate-{rate:g}"] = (train_student, recipe, rate, rows, *inputs)
    made, students = work.steps(steps, parallel), {}
    for name, (recipe, _) in wanted.items():
        trained = [made[f"{folder}/{name}/rate-{rate:g}"] for rate in recipe.learning_rates]
        chosen = work.step(f"{folder}/{name}/chosen", choose_rate, trained, recipe.learning_rates, recipe.measure)
        students[name] = [Student(recipe, chosen)]
    steps = {}
    for name, (recipe, rows) in wanted.items():
        for seed in range(1, seeds):
            chosen = students[name][0].training
            steps[f"{folder}/{name}/seed-{seed}"] = (train_student, replace(recipe, seed=seed), chosen, rows, *inputs)
    made = work.steps(steps, parallel)
    for name, (recipe, _) in wanted.items():
        for seed in range(1, seeds):
            students[name].append(Student(replace(recipe, seed=seed), made[f"{folder}/{name}/seed-{seed}"]))
    return students


def train_again(work: Workspace, context: Context, data: Material, systems: list[System]) -> list[System]:
    """Mine the collection with the best searchable student, and train on what it and the first stage find."""
    job, miners = context.job, []
    for system in systems:
        recipe = system.students[0].recipe
        if recipe.condition == TEACHER and can_search(recipe.architecture):
            miners.append(system.students[0].training)
    miner = work.step("round_2/miner", choose_rate, miners, [0.0] * len(miners), job.measure)
    inputs = (miner, context.texts("train"), job.candidate_depth, job.exclude_same_id, context)
    sources = {"first": data.candidates["train"]}
    sources["mined"] = work.step("round_2/search", candidates.search_vectors, *inputs)
    mixed = mix(work, context, "round_2/candidates", sources, {"first": 0.5, "mined": 0.5})
    mined = replace(data, candidates=data.candidates | {"train": mixed})
    teacher = score_split(work, context, mined, "train", "round_2/teacher_scores")[MEAN]
    rows = {TEACHER: sample_lists(work, context, mined, "round_2/lists", teacher)}
    return train_all(work, context, data, rows, is_second=True)


# ---- Measures -------------------------------------------------------------------------------------------------------


def add_systems(work: Workspace, context: Context, trained: list[System]) -> list[System]:
    """Return everything that ranks: the students before and after their training, and their int8 graphs."""
    systems = []
    for architecture in context.job.architectures:
        for label, layers in kept_layers(context.job, architecture).items():
            recipe = Recipe.of_job(context.job, architecture, NO_TEACHER, layers=layers)
            saved = work.step(f"untrained/{label}", points.save_untrained, recipe, context)
            systems.append(System(f"{label} untrained", (Student(recipe, saved),), label, is_trained=False))
    for system in trained:
        systems.append(system)
        recipe = system.students[0].recipe
        if INT8 in context.job.precisions and recipe.architecture == "bert_cat":
            graph = work.step(f"int8/{system.name}", points.quantise, system.students, context.job.measure)
            systems.append(System(f"{system.name} int8", (Student(recipe, graph),), system.label, INT8))
    return systems


def rank(work: Workspace, context: Context, data: Material, system: System) -> dict[str, list[Artifact]]:
    """Rank the dev and test queries with a system: split -> rankings, one per seed."""
    job, rankings = context.job, {"dev": [], "test": []}
    for seed, student in enumerate(system.students):
        name = system.name if seed == 0 else f"{system.name} seed {seed}"
        if job.purpose == SEARCH:
            texts = context.texts("dev") | context.texts("test")
            inputs = (student.training, texts, job.k, job.exclude_same_id, context)
            found = work.step(f"search/{name}", candidates.search_vectors, *inputs)
            rankings["dev"].append(found)
            rankings["test"].append(found)
            continue
        inputs = (student, system.precision)
        left = student.training  # training leaves its ranking of the validation queries
        if not system.is_trained or system.precision == INT8:
            left = work.step(f"dev/{name}", points.rank_candidates, *inputs, data.candidates["dev"], context)
        rankings["dev"].append(left)
        ranked = work.step(f"test/{name}", points.rank_candidates, *inputs, data.candidates["test"], context)
        rankings["test"].append(ranked)
    return rankings


def measure(work: Workspace, context: Context, data: Material, systems: list[System]) -> Made:
    """Rank dev and test with everything, time it, find the points of the choice, and write the outcome."""
    job = context.job
    rankings = {system.name: rank(work, context, data, system) for system in systems}
    depths = job.tried_depths if job.purpose == RERANK else [job.k]
    searches = {}
    if job.purpose == SEARCH:
        searches = {name: of_name["dev"][0] for name, of_name in rankings.items()}
    inputs = (systems, data.teachers, data.candidates["dev"], data.index, searches, depths, context.device)
    timing = work.step("timing", points.time_rankers, *inputs, context)
    dev = {name: of_name["dev"] for name, of_name in rankings.items()}
    settings = {"measure": job.measure, "depths": depths, "fusion": job.fusion, "purpose": job.purpose}
    inputs = (systems, dev, _first_stages(context, data, "dev"), data.judgments["dev"], timing, settings)
    found = work.step("points", points.find_points, *inputs)
    teachers = {}
    for name, artifact in data.scores.get("test", {}).items():
        if name == MEAN:
            teachers["teacher"] = artifact
        elif len(data.teachers) > 1:
            teachers[f"teacher {name}"] = artifact
    tested = {name: of_name["test"] for name, of_name in rankings.items()}
    settings = {"measure": job.measure, "k": job.k, "purpose": job.purpose, "budget_ms": job.budget_ms}
    settings |= {"data_name": job.data_of("test"), "train_data": job.data_of("train")}
    first_stages = _first_stages(context, data, "test")
    measured = Measured(systems, first_stages, teachers, tested, data.judgments["test"], found, timing, settings)
    return Made(data, systems, rankings, work.step("report", write_outcome, measured, context))


def _first_stages(context: Context, data: Material, split: str) -> dict[str, Artifact]:
    """Return the first stages by name; the first one gives the candidates, or the scores that a search may add."""
    stages = {"BM25": data.bm25[split]}
    if context.job.candidates is None:
        return stages
    given = {"candidates": data.candidates[split]}
    return stages | given if context.job.purpose == SEARCH else given | stages


# ---- The job --------------------------------------------------------------------------------------------------------


def train_teacher(work: Workspace, context: Context, architecture: str, name: str, data: Material) -> Artifact:
    """Train an architecture on the labels, to be a teacher."""
    recipe = Recipe.of_job(context.job, architecture, NO_TEACHER, is_teacher=True)
    wanted = {name: (recipe, data.rows[NO_TEACHER])}
    return train(work, context, data, "teachers", wanted, seeds=1)[name][0].training


def make_all(work: Workspace, context: Context) -> Made:
    """Make every artifact of a job."""
    data = prepare(work, context, partial(train_teacher, work, context))
    trained = train_all(work, context, data, data.rows)
    if context.job.rounds > 1:
        trained += train_again(work, context, data, trained)
    return measure(work, context, data, add_systems(work, context, trained))


def distill(job: DistillJob) -> dict[str, Any]:
    """Distil a teacher into every architecture of a job, and choose and deliver the best pipeline within a budget.

    Every step has a folder in the job's output and runs once: the same call after an interruption resumes, and a call
    with another option repeats what depends on it. Under `accelerate launch` the processes share what can be shared.

    Returns:
        `chosen` (name of the pipeline), `pipeline` (its first stage, ranker, seed, depth, weight, precision),
        `folder` (where it is, see `load_pipeline`; None if the user's engine alone is best), `ranker` (folder of its
        checkpoint; None if it has none), `measure`, `test` and `dev`
        (name -> mean of the measure), `fused` (ranker -> the measure on test with the first stage's scores), `seeds`
        (name -> the measure of each seed on test), `interval` (95 %, of the chosen pipeline), `tests` (`treatment`,
        `control`, `difference`, `interval`, `p_value`, `p_corrected`), their `family`, `frontier`, `latency_ms` (name
        -> median per query), `rates` (name -> learning rate), `folders` (name -> checkpoint), `queries`, `overlaps`
        and `lists` (their numbers), `verdict` (in words) and `page` (the report).

    Raises:
        InputError, FileNotFoundError: for bad input, as far as possible before any work; if another process works in
            the output.
        TargetNotMetError: if the teacher is no better than the first stage, or no pipeline is within the budget.

    Example:
        >>> settings = {"qrels": "qrels.txt", "architectures": ["bert_dot"], "learning_rates": [1e-4], "force": True}
        >>> job = kd.DistillJob("collection.tsv", "queries.tsv", "distilled", teachers=["bert_cat"], **settings)
        >>> outcome = kd.distill(job)
        >>> hits = kd.load_pipeline(outcome["folder"]).search("what is bread", k=3)
    """
    with stopping_at_signals():
        job = with_queries(job)
        context, work = Context(job), Workspace(Path(job.output))
        is_main = processes().is_main_process
        with locked(work.folder) if is_main else nullcontext():
            work.claim(subject(job))
            made = make_all(work, context)
            outcome = read_json(made.outcome.path / "outcome.json")
            outcome["folders"] = {}
            for system in made.systems:
                outcome["folders"][system.name] = str(system.students[0].checkpoint.resolve())
            outcome["lists"] = {name: teaching.count_rows(rows) for name, rows in made.data.rows.items()}
            outcome["verdict"] = verdict(outcome, job)
            outcome["page"] = str(work.folder / "report.html")
            outcome["folder"], outcome["ranker"] = deliver(work, context, made, outcome)
            if is_main:
                shutil.copyfile(made.outcome.path / "report.html", outcome["page"])
    return outcome


def make_plan(job: DistillJob) -> list[Cost]:
    """Return what every step of a job will cost, in order, from probes on its own texts.

    Raises:
        InputError, FileNotFoundError: as `distill` raises before any work.
    """
    with stopping_at_signals():
        job = with_queries(job, is_plan=True)
        context = Context(job)
        plan = Plan(context)
        plan.claim(subject(job))
        make_all(plan, context)
        plan.add_delivery()
    return plan.costs


def subject(job: DistillJob) -> dict[str, Path]:
    """Return what an output folder is about; work for another collection or other queries must not replace it."""
    return {"collection": Path(job.collection), "queries": Path(job.queries)}
