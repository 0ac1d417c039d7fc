"""The end of `distill`: the choice, its test, the cards and the report.

All significance tests of a job are one family, corrected together by Holm's method.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..artifacts import write_json
from ..data.runs import Run, write_run
from ..evaluation.metrics import evaluate_queries
from ..evaluation.significance import compare_seeds, compare_with_first_stage, holm, mean_interval
from ..hub.manifest import read_manifest, save_manifest
from ..hub.model_card import select_efficiency, write_model_card
from ..reporting.report import write_report
from .candidates import grades, ranking
from .context import Context
from .job import NO_TEACHER, DistillJob
from .points import FIRST_STAGES, SUM, Point, System, choose, frontier, fuse, read_points
from .students import learning_rate
from .work import Artifact

SIGNIFICANT = 0.05
ROUND_2 = " round 2"  # end of the names of students that learn from what a student of the first round found
Values = dict[str, list[dict[str, float]]]  # name -> query_id -> value, one mapping per seed


class Measured(NamedTuple):
    """The systems of a job, their rankings of the test queries, and what was measured on dev."""

    systems: Sequence[System]
    rankings: Mapping[str, Sequence[Artifact]]  # first stage, teacher or system -> its rankings, one per seed
    judgments: Artifact  # of the test queries
    points: Artifact
    timing: Artifact
    settings: Mapping[str, Any]  # `measure`, `k`, `purpose`, `budget_ms` and `data_name` of the job


# ---- Steps ----------------------------------------------------------------------------------------------------------


def write_outcome(folder: Path, measured: Measured, context: Context) -> None:
    """Choose on dev, test the choice, and write `outcome.json`, the cards of the students and the report."""
    settings, qrels = measured.settings, grades(measured.judgments)
    measure = settings["measure"]
    points = read_points(measured.points)
    chosen = choose(points, settings["budget_ms"])
    costs = json.loads((measured.timing.path / "efficiency.json").read_text(encoding="utf-8"))
    runs = _test_runs(measured, qrels)
    values = {name: [_per_query(run, qrels, measure) for run in of_name] for name, of_name in runs.items()}
    fused = _add_pipelines(runs, values, points, chosen, measured, qrels)
    name = chosen.name(settings["k"])
    outcome: dict[str, Any] = {"chosen": name, "measure": measure, "pipeline": vars(chosen)}
    outcome["test"] = {key: fmean(fmean(seed.values()) for seed in of_name) for key, of_name in values.items()}
    outcome["fused"] = {key: outcome["test"][fused_name] for key, fused_name in fused.items()}
    outcome["seeds"] = {}
    for key in [system.name for system in measured.systems] + [name]:
        if len(values[key]) > 1:
            outcome["seeds"][key] = [fmean(seed.values()) for seed in values[key]]
    means = [fmean(seed[query_id] for seed in values[name]) for query_id in qrels]
    outcome["interval"] = mean_interval(means)
    outcome["tests"] = _tests(values, points, chosen, measured)
    outcome["family"] = f"Holm over the {len(outcome['tests'])} tests of this job"
    outcome["dev"] = _dev_values(points, settings["k"])
    outcome["frontier"] = [[point.name(settings["k"]), point.dev, point.latency_ms] for point in frontier(points)]
    outcome["latency_ms"] = _latencies(points, costs, settings["k"])
    outcome["rates"] = {}
    for system in measured.systems:
        if "untrained" not in system.name and system.precision == "float32":
            outcome["rates"][system.name] = learning_rate(system.students[0].training)
    outcome["queries"] = {split: len(query_ids) for split, query_ids in context.splits.items()}
    outcome["overlaps"] = context.overlaps
    _write_cards(measured, values, costs)
    _write_report(folder, measured, runs, outcome, context)
    write_json(folder / "outcome.json", outcome)


# ---- Values ---------------------------------------------------------------------------------------------------------


def _test_runs(measured: Measured, qrels: Mapping) -> dict[str, list[Run]]:
    """Return the test rankings by name; a teacher that did not rank all queries with candidates cannot be compared.

    A query for which the first stage found nothing counts as 0 for whatever re-ranks it.
    """
    first_stage = next(artifacts[0] for name, artifacts in measured.rankings.items() if name in FIRST_STAGES)
    needed = ranking(first_stage).keys() & qrels.keys()
    runs: dict[str, list[Run]] = {}
    for name, artifacts in measured.rankings.items():
        of_name = []
        for artifact in artifacts:
            run = ranking(artifact)
            of_name.append(Run((query_id, run[query_id]) for query_id in qrels if query_id in run))
        if not _is_teacher(name) or all(needed <= run.keys() for run in of_name):
            runs[name] = of_name
    return runs


def _is_teacher(name: str) -> bool:
    return name.split()[0] == "teacher"


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
    k, purpose, fused = measured.settings["k"], measured.settings["purpose"], {}
    first_stage = next(runs[name][0] for name in measured.rankings if name in FIRST_STAGES)
    wanted = [chosen]
    for point in points:
        if point.weight and point.depth == k:
            wanted.append(point)
            fused[point.system] = point.name(k)
    for point in wanted:
        if point.name(k) in values:
            continue
        of_system = runs[point.system]
        runs[point.name(k)] = [fuse(first_stage, run, purpose, point.depth, point.weight) for run in of_system]
        values[point.name(k)] = [_per_query(run, qrels, measured.settings["measure"]) for run in runs[point.name(k)]]
    return fused


def _tests(values: Values, points: Sequence[Point], chosen: Point, measured: Measured) -> list[dict[str, Any]]:
    """Compare every condition with no teacher, and the choice with what a user already has; one family."""
    pairs = []
    for system in measured.systems:
        condition = system.students[0].recipe.condition
        control = system.name.replace(f" {condition}", f" {NO_TEACHER}")
        if system.name.endswith(ROUND_2):
            control = system.name.removesuffix(ROUND_2)  # the round before
        if system.name != control and control in values:
            pairs.append((system.name, control))
    k = measured.settings["k"]
    name = chosen.name(k)
    for control in _rivals(points, chosen, k):
        if control != name and control in values:
            pairs.append((name, control))
    tests = []
    for treatment, control in pairs:
        test = compare_seeds(values[treatment], values[control])
        tests.append({"treatment": treatment, "control": control, **test})
    for test, p_value in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_corrected"] = p_value
    return tests


def _rivals(points: Sequence[Point], chosen: Point, k: int) -> list[str]:
    """Return what a user has without distilling: the first stages, the untrained student alone and with BM25."""
    rivals = [point.name(k) for point in points if point.is_first_stage]
    architecture = chosen.system.split()[0]
    untrained = [point for point in points if point.system.endswith("untrained") and point.depth == k]
    alone = [point for point in untrained if not point.weight]
    own = [point for point in alone if point.system.split()[0] == architecture] or alone
    for group in (own, [point for point in untrained if point.weight]):
        if group:
            rivals.append(max(group, key=lambda point: point.dev).name(k))
    return list(dict.fromkeys(rivals))


def _dev_values(points: Sequence[Point], k: int) -> dict[str, float]:
    return {point.name(k): point.dev for point in points}


def _latencies(points: Sequence[Point], costs: Mapping, k: int) -> dict[str, float]:
    """Return the median milliseconds of every pipeline, and of the teachers with their candidates."""
    latencies = {point.name(k): point.latency_ms for point in points}
    first_stage = costs["first_stages"]["BM25"]["total_ms"]["p50"]
    teachers = {name: costs["rankers"][name]["total_ms"]["p50"] for name in costs["rankers"] if _is_teacher(name)}
    for name, milliseconds in teachers.items():
        latencies[name] = first_stage + milliseconds
    if teachers:
        latencies["teacher"] = first_stage + sum(teachers.values())  # the mean asks all of them
    return latencies


# ---- Cards and report -----------------------------------------------------------------------------------------------


def _write_cards(measured: Measured, values: Values, costs: Mapping) -> None:
    """Write the results of the test on the cards of the trained students."""
    measure = measured.settings["measure"]
    first_stage = next(values[name][0] for name in measured.rankings if name in FIRST_STAGES)
    for system in measured.systems:
        for seed, student in enumerate(system.students):
            if not (student.checkpoint / "manifest.json").is_file():
                continue
            manifest = read_manifest(student.checkpoint)
            of_seed = {measure: values[system.name][seed]}
            manifest["results"] = compare_with_first_stage(of_seed, {measure: first_stage})
            manifest["data"] = measured.settings["data_name"]
            save_manifest(student.checkpoint, manifest)
            name = system.name.replace(" ", "-")
            write_model_card(student.checkpoint, name, select_efficiency(costs, system.name))


def _write_report(
    folder: Path, measured: Measured, runs: Mapping[str, Sequence[Run]], outcome: Mapping, context: Context
) -> None:
    """Write `report.html` from the runs, costs and training curves, which stay in the folder."""
    for name in ("runs", "training"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    costs = json.loads((measured.timing.path / "efficiency.json").read_text(encoding="utf-8"))
    for name, of_name in runs.items():
        for seed_name, run in zip(_seed_names(name, len(of_name)), of_name, strict=True):
            write_run(run, folder / "runs" / f"{seed_name}.trec", tag=seed_name.replace(" ", "_"))
            if name in costs["rankers"]:
                costs["rankers"][seed_name] = costs["rankers"][name]
        if len(of_name) > 1:
            costs["rankers"].pop(name, None)
    write_json(folder / "efficiency.json", costs)
    for system in measured.systems:
        state = system.students[0].checkpoint / "trainer_state.json"
        if state.is_file():
            shutil.copy(state, folder / "training" / f"{system.name}.json")
    first_stage = next(measured.rankings[name][0] for name in FIRST_STAGES if name in measured.rankings)
    files = {"queries": context.job.queries, "collection": context.job.collection}
    files |= {"qrels": measured.judgments.path / "qrels.txt", "candidates": first_stage.path / "run.trec"}
    arrows = []
    for test in outcome["tests"]:
        if NO_TEACHER in test["control"]:
            names = [_seed_names(test[side], len(runs[test[side]])) for side in ("control", "treatment")]
            arrows += zip(*names, strict=True)
    title, measures = f"Distillation on {measured.settings['data_name']}", (measured.settings["measure"],)
    write_report(folder, folder / "report.html", measures, arrows, title=title, intersect=True, files=files)
    try:
        from ..reporting.plot import frontier_plot, save_plot  # need matplotlib, an extra
    except ImportError:
        return
    everything = [(name, dev, outcome["latency_ms"][name]) for name, dev in outcome["dev"].items()]
    save_plot(frontier_plot(everything, outcome["frontier"], measures[0]), folder / "frontier.svg")


def _seed_names(name: str, count: int) -> list[str]:
    """Return the names of a ranker's rankings in the report, which shows every seed by itself."""
    return [name] if count == 1 else [f"{name}, seed {seed}" for seed in range(count)]


# ---- Text -----------------------------------------------------------------------------------------------------------


def outcome_text(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """Return the outcome as text: what was compared, tables of the test and of the frontier, and the verdict."""
    queries = ", ".join(f"{split} {count:,}" for split, count in outcome["queries"].items())
    rates = ", ".join(f"{name} {rate:g}" for name, rate in outcome["rates"].items())
    lists = ", ".join(f"{name} {count:,}" for name, count in outcome["lists"].items())
    heading = f"{job.measure}, test"
    if not job.is_judged:
        heading += " (agreement with the teacher, not relevance)"
    lines = [
        f"Queries: {queries}. Training lists: {lists}. Learning rates were chosen on dev from one grid for all "
        f"conditions ({rates}); {job.seeds} seed(s).",
    ]
    lines += [f"{count:,} {what}." for what, count in outcome["overlaps"].items() if count]
    lines += ["", f"| ranker | {heading} | with BM25 | dev | ms per query, p50 |", "| --- | --- | --- | --- | --- |"]
    for name, value in outcome["test"].items():
        if name.removesuffix(SUM) != name and name != outcome["chosen"]:
            continue  # has a column
        cells = [name, f"{value:.4f}"]
        for key, form in (("fused", ".4f"), ("dev", ".4f"), ("latency_ms", ".1f")):
            cells.append(format(outcome[key][name], form) if name in outcome[key] else "")
        lines.append(f"| {' | '.join(cells)} |")
    for name, values in outcome["seeds"].items():
        lines.append(f"Seeds of {name}: {', '.join(f'{value:.4f}' for value in values)}.")
    lines += ["", "Frontier on dev (nothing is both faster and better):", ""]
    lines += [f"| pipeline | {job.measure}, dev | ms per query, p50 |", "| --- | --- | --- |"]
    lines += [f"| {name} | {dev:.4f} | {latency:.1f} |" for name, dev, latency in outcome["frontier"]]
    lines += ["", f"Tests ({outcome['family']}):", *(_finding_text(test) for test in outcome["tests"])]
    lines += ["", outcome["verdict"]]
    lines.append(f"Pipeline: {Path(job.output) / 'best'}. Report: {outcome['page']}")
    return "\n".join(lines)


def verdict(outcome: Mapping[str, Any], job: DistillJob) -> str:
    """Return in words what was chosen and what it is worth on the test queries."""
    name, test = outcome["chosen"], outcome["test"]
    interval = outcome["interval"]
    budget = "" if job.budget_ms is None else f" within {job.budget_ms:g} ms per query"
    text = (
        f"Chosen on dev{budget}: {name}, {outcome['latency_ms'][name]:.1f} ms per query (median). On the "
        f"{outcome['queries']['test']:,} test queries: {job.measure} {test[name]:.4f} (95 % interval "
        f"{interval['low']:.4f} to {interval['high']:.4f})"
    )
    if test.get("teacher"):
        text += f", {100 * test[name] / test['teacher']:.0f} % of the teacher's {test['teacher']:.4f}"
    lines, is_better = [f"{text}."], False
    of_seeds = outcome["seeds"].get(name)
    if of_seeds:
        seed = outcome["pipeline"]["seed"]
        lines.append(
            f"That is the mean of {len(of_seeds)} seeds; delivered is seed {seed}, the best on dev, with "
            f"{of_seeds[seed]:.4f} on test."
        )
    for found in outcome["tests"]:
        if found["treatment"] == name and NO_TEACHER not in found["control"]:
            is_better |= found["p_corrected"] < SIGNIFICANT and found["difference"] > 0
            lines.append(_finding_text(found))
    if name in FIRST_STAGES:
        lines.append("No ranker was better than the first stage on dev: there is nothing to deliver but that.")
    elif "untrained" in name:
        lines.append("No trained student was better than this one before its training on dev.")
    elif not is_better:
        lines.append("On the test queries it is not shown to be better than what a user has without distilling.")
    return "\n".join(lines)


def _finding_text(test: Mapping[str, Any]) -> str:
    if test["p_corrected"] >= SIGNIFICANT:
        finding = f"no difference found ({test['difference']:+.4f})"
    elif test["difference"] > 0:
        finding = f"{test['difference']:.4f} more"
    else:
        finding = f"{-test['difference']:.4f} less"
    low, high = test["interval"]
    return (
        f"{test['treatment']} against {test['control']}: {finding}, 95 % interval {low:+.4f} to {high:+.4f}, p = "
        f"{test['p_value']:.2g}, corrected {test['p_corrected']:.2g}, {test['queries']:,} queries."
    )
