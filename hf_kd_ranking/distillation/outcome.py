"""The end of `distill`: the choice, its test, the cards and the report.

All significance tests of a job are one family, corrected together by Holm's method.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..artifacts import read_json, write_json
from ..data.runs import Run, write_run
from ..evaluation.metrics import evaluate_queries
from ..evaluation.significance import compare_seeds, compare_with_first_stage, correct, mean_interval
from ..hub.manifest import FILE as MANIFEST
from ..hub.manifest import read_manifest
from ..hub.model_card import select_efficiency, write_model_card
from ..reporting.report import write_report
from .candidates import grades, ranking
from .context import Context
from .generation import describe
from .job import FLOAT32
from .points import Point, System, choose, frontier, fuse, read_points
from .students import learning_rate
from .wording import cut_sentences, finding_text, synthetic_mark, synthetic_text, verdict
from .work import Artifact

Values = dict[str, list[dict[str, float]]]  # name -> query_id -> value, one mapping per seed


class Measured(NamedTuple):
    """The systems of a job, their rankings of the test queries, and what was measured on dev."""

    systems: Sequence[System]
    first_stages: Mapping[str, Artifact]  # name -> its ranking; the first one found the candidates
    teachers: Mapping[str, Artifact]  # "teacher", or "teacher NAME" if there are more -> its ranking
    rankings: Mapping[str, Sequence[Artifact]]  # system -> its rankings, one per seed
    judgments: Artifact  # of the test queries
    points: Artifact
    timing: Artifact
    settings: Mapping[str, Any]  # `measure`, `k`, `purpose`, `budget_ms`, `data_name` and `train_data` of the job


# ---- Steps ----------------------------------------------------------------------------------------------------------


def write_outcome(folder: Path, measured: Measured, context: Context) -> None:
    """Choose on dev, test the choice, and write `outcome.json`, the cards of the students and the report."""
    settings, qrels = measured.settings, grades(measured.judgments)
    measure, k = settings["measure"], settings["k"]
    points = read_points(measured.points)
    chosen = choose(points, settings["budget_ms"])
    costs = read_json(measured.timing.path / "efficiency.json")
    runs = _test_runs(measured, qrels)
    values = {}
    for key, of_name in runs.items():
        values[key] = [_per_query(run, qrels, measure) for run in of_name]
    sums = _add_pipelines(runs, values, points, chosen, measured, qrels)
    name = chosen.name(k)
    system = next((system for system in measured.systems if system.name == chosen.system), None)
    outcome: dict[str, Any] = {"chosen": name, "measure": measure, "pipeline": vars(chosen), "sums": sums}
    outcome["is_trained"] = system is not None and system.is_trained
    outcome["test"] = {key: fmean(fmean(seed.values()) for seed in of_name) for key, of_name in values.items()}
    outcome["fused"] = {key: outcome["test"][sum_name] for key, sum_name in sums.items()}
    outcome["seeds"] = {}
    for key in [system.name for system in measured.systems] + [name]:
        if len(values[key]) > 1:
            outcome["seeds"][key] = [fmean(seed.values()) for seed in values[key]]
    means = [fmean(seed[query_id] for seed in values[name]) for query_id in qrels]
    outcome["interval"] = mean_interval(means)
    rivals = _rivals(points, chosen, measured)
    outcome["tests"] = _tests(values, name, rivals, measured)
    outcome["rivals"] = rivals
    outcome["family"] = f"Holm over the {len(outcome['tests'])} tests of this job"
    outcome["dev"] = {point.name(k): point.dev for point in points}
    outcome["frontier"] = [[point.name(k), point.dev, point.latency_ms] for point in frontier(points)]
    outcome["latency_ms"] = _latencies(points, costs, measured)
    outcome["rates"] = {}
    for system in measured.systems:
        if system.is_trained and system.precision == FLOAT32:
            outcome["rates"][system.name] = learning_rate(system.students[0].training)
    outcome["queries"] = {split: len(query_ids) for split, query_ids in context.splits.items()}
    outcome["overlaps"] = context.overlaps
    outcome["synthetic"] = context.job.synthetic_splits
    outcome["agreement"] = context.job.agreement_splits
    if outcome["synthetic"]:
        outcome["generator"] = describe(context.job)
    outcome["cuts"] = _cuts(measured)
    _write_cards(measured, values, costs)
    _write_report(folder, measured, runs, outcome, context)
    write_json(folder / "outcome.json", outcome)


# ---- Values ---------------------------------------------------------------------------------------------------------


def _cuts(measured: Measured) -> dict[str, dict[str, float]]:
    """Return the shares of documents and tokens that each trained student does not read."""
    cuts = {}
    for system in measured.systems:
        results = system.students[0].checkpoint / "results.json"
        if results.is_file():
            cuts[system.name] = read_json(results).get("cuts", {})
    return cuts


def _test_runs(measured: Measured, qrels: Mapping) -> dict[str, list[Run]]:
    """Return the test rankings by name; a teacher that did not rank all queries with candidates is left out.

    A query for which the first stage found nothing counts as 0 for whatever re-ranks it.
    """
    runs = {}
    for name, artifact in measured.first_stages.items():
        runs[name] = [ranking(artifact).select(qrels)]
    needed = next(iter(runs.values()))[0].keys()
    for name, artifact in measured.teachers.items():
        run = ranking(artifact).select(qrels)
        if needed <= run.keys():
            runs[name] = [run]
    for name, artifacts in measured.rankings.items():
        runs[name] = [ranking(artifact).select(qrels) for artifact in artifacts]
    return runs


def _per_query(run: Run, qrels: Mapping, measure: str) -> dict[str, float]:
    return evaluate_queries(run, qrels, (measure,))[measure]


def _add_pipelines(
    runs: dict[str, list[Run]],
    values: Values,
    points: Sequence[Point],
    chosen: Point,
    measured: Measured,
    qrels: Mapping,
) -> dict[str, str]:
    """Add the chosen pipeline, and every ranker with the first stage's scores, to runs and values.

    Returns ranker -> its name with the first stage's scores.
    """
    settings, sums = measured.settings, {}
    k = settings["k"]
    candidates = runs[next(iter(measured.first_stages))][0]
    wanted = [chosen]
    for point in points:
        if point.weight and point.depth == k:
            wanted.append(point)
            sums[point.system] = point.name(k)
    for point in wanted:
        name = point.name(k)
        if name in values:
            continue
        runs[name], values[name] = [], []
        for run in runs[point.system]:
            fused = fuse(candidates, run, settings["purpose"], point.depth, point.weight)
            runs[name].append(fused)
            values[name].append(_per_query(fused, qrels, settings["measure"]))
    return sums


def _tests(values: Values, chosen: str, rivals: Sequence[str], measured: Measured) -> list[dict[str, Any]]:
    """Compare every ranker with its control, and the choice with what a user already has; one family."""
    pairs = [(system.name, system.control) for system in measured.systems]
    pairs += [(chosen, rival) for rival in rivals]
    tests = []
    for treatment, control in pairs:
        if control in values:  # students without a teacher may not be trained
            test = compare_seeds(values[treatment], values[control])
            tests.append({"treatment": treatment, "control": control, **test})
    correct(tests)
    return tests


def _rivals(points: Sequence[Point], chosen: Point, measured: Measured) -> list[str]:
    """Return what a user has without distilling: first stages, the untrained student alone and with their scores."""
    k = measured.settings["k"]
    labels = {system.name: system.label for system in measured.systems}
    untrained = {system.name for system in measured.systems if not system.is_trained}
    rivals = [point.name(k) for point in points if point.system is None]
    alone, summed = [], []
    for point in points:
        if point.system in untrained and point.depth == k:
            group = summed if point.weight else alone
            group.append(point)
    own = [point for point in alone if labels[point.system] == labels.get(chosen.system)]
    for group in (own or alone, summed):
        if group:
            rivals.append(max(group, key=lambda point: point.dev).name(k))
    return [name for name in dict.fromkeys(rivals) if name != chosen.name(k)]


def _latencies(points: Sequence[Point], costs: Mapping, measured: Measured) -> dict[str, float]:
    """Return the median milliseconds of every pipeline, and of the teachers with their candidates."""
    latencies = {point.name(measured.settings["k"]): point.latency_ms for point in points}
    first_stage = next(point.latency_ms for point in points if point.system is None)
    alone = {}
    for name in measured.teachers:
        if name in costs["rankers"]:
            alone[name] = costs["rankers"][name]["total_ms"]["p50"]
            latencies[name] = first_stage + alone[name]
    if alone:
        latencies["teacher"] = first_stage + sum(alone.values())  # the mean asks all of them
    return latencies


# ---- Cards and report -----------------------------------------------------------------------------------------------


def _write_cards(measured: Measured, values: Values, costs: Mapping) -> None:
    """Write the results of the test on the cards of the trained students."""
    measure = measured.settings["measure"]
    first_stage = values[next(iter(measured.first_stages))][0]
    for system in measured.systems:
        for seed, student in enumerate(system.students):
            if not (student.checkpoint / "manifest.json").is_file():
                continue
            manifest = read_manifest(student.checkpoint)
            of_seed = {measure: values[system.name][seed]}
            cuts = manifest["results"].get("cuts", {})
            manifest["results"] = {**compare_with_first_stage(of_seed, {measure: first_stage}), "cuts": cuts}
            manifest |= {"data": measured.settings["train_data"], "test_data": measured.settings["data_name"]}
            write_json(student.checkpoint / MANIFEST, manifest)
            name = system.name.replace(" ", "-")
            write_model_card(student.checkpoint, name, select_efficiency(costs, system.name))


def _write_report(
    folder: Path, measured: Measured, runs: Mapping[str, Sequence[Run]], outcome: Mapping, context: Context
) -> None:
    """Write `report.html` from the runs, costs and training curves, which stay in the folder."""
    for name in ("runs", "training"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    costs = read_json(measured.timing.path / "efficiency.json")
    timed = dict(costs["rankers"])
    for name, sum_name in outcome["sums"].items():
        if name in timed:
            timed[sum_name] = timed[name]  # to add scores takes no time
    for name, of_name in runs.items():
        for seed_name, run in zip(_seed_names(name, len(of_name)), of_name, strict=True):
            write_run(run, folder / "runs" / f"{seed_name}.trec", tag=seed_name.replace(" ", "_"))
            if name in timed:
                costs["rankers"][seed_name] = timed[name]
        if len(of_name) > 1:
            costs["rankers"].pop(name, None)
    write_json(folder / "efficiency.json", costs)
    for system in measured.systems:
        state = system.students[0].checkpoint / "trainer_state.json"
        if state.is_file():
            shutil.copy(state, folder / "training" / f"{system.name}.json")
    first_stage = next(iter(measured.first_stages.values()))
    files = {"queries": context.job.queries, "collection": context.job.collection}
    files |= {"qrels": measured.judgments.path / "qrels.txt", "candidates": first_stage.path / "run.trec"}
    arrows = []
    for system in measured.systems:
        if system.control in runs:
            names = [_seed_names(name, len(runs[name])) for name in (system.control, system.name)]
            arrows += zip(*names, strict=True)
    findings = [f"All tests of the job are one family: {outcome['family']}."]
    findings += [finding_text(test, outcome) for test in outcome["tests"]]
    if outcome["synthetic"]:
        findings.insert(0, synthetic_text(outcome))
    findings += cut_sentences(outcome)
    title, measures = f"Distillation on {measured.settings['data_name']}", (measured.settings["measure"],)
    options = {"title": title, "intersect": True, "files": files, "findings": findings}
    options["summary"] = verdict(outcome, context.job).splitlines()[:2]
    write_report(folder, folder / "report.html", measures, arrows, **options)
    try:
        from ..reporting.plot import frontier_plot, save_plot  # need matplotlib, an extra
    except ImportError:
        return
    everything = [(name, dev, outcome["latency_ms"][name]) for name, dev in outcome["dev"].items()]
    measure = measures[0] + synthetic_mark(outcome, "dev")
    save_plot(frontier_plot(everything, outcome["frontier"], measure), folder / "frontier.svg")


def _seed_names(name: str, count: int) -> list[str]:
    """Return the names of a ranker's rankings in the report, which shows every seed by itself."""
    return [name] if count == 1 else [f"{name}, seed {seed}" for seed in range(count)]
