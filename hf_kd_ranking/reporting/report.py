"""One HTML file that says what rankers reach and cost, from a folder of results.

The folder, of which only the runs and the judgments must be there:

    runs/NAME.trec        one TREC run per ranker, the first stage's among them; the report calls it NAME
    qrels.txt             judgments
    queries.tsv           texts of the queries, and
    collection.tsv        of the passages: for the browser of queries
    candidates.trec       the first stage, for depth curves
    efficiency.json       what `hf-kd-ranking benchmark` writes, for the plot against latency:
                          {"environment": {...}, "protocol": {...}, "rankers": {NAME: {"architecture": ...,
                          "parameters": ..., "model_bytes": ..., "bytes_per_passage": ..., "encode_ms": {...},
                          "score_ms": {...}, "total_ms": {"p50": ..., "p95": ..., "p99": ...}, ...}}}
    training/NAME.json    the trainer_state.json of a ranker's training, for loss curves
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, Undefined
from tqdm.auto import tqdm

from ..artifacts import existing_file, refuse_existing, writing
from ..data.runs import Run, read_qrels, read_run
from ..data.texts import TextStore
from ..evaluation.metrics import DEFAULT_MEASURES, evaluate_queries
from ..evaluation.rerank import depth_curve
from ..evaluation.significance import RESAMPLES, compare_values, shared_queries

TEMPLATES = Path(__file__).parent / "templates"
FILES = dict(qrels="qrels.txt", queries="queries.tsv", collection="collection.tsv", candidates="candidates.trec")
ALPHA = 0.05
PAIR_KEYS = ("control", "treatment", "measure", "difference", "p_corrected", "wins", "ties", "losses")
# What the browser of queries holds, so that the page stays small.
MOVED_QUERIES = 100
SHOWN_PASSAGES = 5
SHOWN_RELEVANT = 3
SHOWN_CHARACTERS = 600

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # ranker -> measure -> query_id -> value


@dataclass(frozen=True)
class Results:
    """What a folder of results holds, see the module; what is not there is empty or None."""

    runs: dict[str, Run]
    qrels: dict[str, dict[str, int]]
    efficiency: dict[str, dict[str, Any]]
    training: dict[str, list[dict[str, Any]]]
    queries: TextStore | None
    collection: TextStore | None
    candidates: Run | None


def write_report(
    results: str | os.PathLike,
    output: str | os.PathLike,
    measures: Sequence[str] = DEFAULT_MEASURES,
    arrows: Sequence[tuple[str, str]] = (),
    plot: str | os.PathLike | None = None,
    title: str = "Rankers compared",
    intersect: bool = False,
    files: Mapping[str, str | os.PathLike] | None = None,
) -> dict[str, Any]:
    """Write a page that loads nothing: measures with intervals and tests, plots, training, and single queries.

    Args:
        results: a folder, see the module.
        output: the HTML file; replaced if it is there.
        measures: in ir_measures' notation; the first orders the rankers and is plotted against latency.
        arrows: (control, treatment) pairs of names, drawn in the plot. The table's marks refer to the first control,
            without arrows to the weakest ranker.
        plot: where the plot against latency is written as well, .png or .svg.
        title: of the page.
        intersect: True leaves out queries for which a run has no results, where the runs differ; False refuses that.
        files: other places of `qrels`, `queries`, `collection`, `candidates`.

    Returns:
        `output`, `plot` where one was asked for, `rankers` and `queries`, their numbers.

    Raises:
        FileNotFoundError: if the folder holds no runs, or a file that is named or needed is not there.
        ValueError: if the runs have results for different queries, a file is malformed, an arrow names no run, there
            are fewer than two judged queries, or a plot is asked for without latencies or matplotlib.
    """
    refuse_existing(output, overwrite=True)
    plots = _plot_module(is_needed=plot is not None)
    if plot is not None:
        plots.check_plot_path(plot)
    found = read_results(results, files or {})
    if unknown := {name for arrow in arrows for name in arrow} - found.runs.keys():
        raise ValueError(f"No run is called {', '.join(sorted(unknown))}; there are {', '.join(found.runs)}.")
    if plot is not None and not found.efficiency["rankers"].keys() & found.runs.keys():
        raise ValueError(f"A plot needs latencies of the runs, in {Path(results) / 'efficiency.json'}.")
    judged = {name: run.keys() & found.qrels.keys() for name, run in found.runs.items()}
    shared = shared_queries(judged, found.qrels, intersect)
    found = replace(found, qrels={query_id: found.qrels[query_id] for query_id in shared})
    context = _context(found, list(dict.fromkeys(measures)), arrows) | {"title": title, "figures": None}
    if plots is not None:
        context["styles"] = plots.line_styles([*dict.fromkeys([*context["names"], *found.training])])
        context["figures"] = _figures(plots, found, context, arrows, plot)
    with writing(output) as file:
        file.write(_page(context))
    facts = {"output": str(output)} | ({} if plot is None else {"plot": str(plot)})
    return facts | {"rankers": len(found.runs), "queries": len(found.qrels)}


# ---- Reading --------------------------------------------------------------------------------------------------------


def read_results(folder: str | os.PathLike, files: Mapping[str, str | os.PathLike]) -> Results:
    """Read a folder of results, see the module; arguments and errors as `write_report`."""
    folder = Path(folder)
    paths = sorted((folder / "runs").glob("*.trec"))
    if not paths:
        raise FileNotFoundError(f"{folder / 'runs'} holds no NAME.trec; put the TREC run of each ranker there.")
    places = {kind: Path(files.get(kind, folder / name)) for kind, name in FILES.items()}
    there = {kind: path for kind, path in places.items() if kind in files or path.exists()}
    efficiency = folder / "efficiency.json"
    return Results(
        qrels=read_qrels(places["qrels"]),
        efficiency=_read_efficiency(efficiency if efficiency.exists() else None),
        training={path.stem: _read_training(path) for path in sorted((folder / "training").glob("*.json"))},
        queries=TextStore.from_file(there["queries"]) if "queries" in there else None,
        collection=TextStore.from_file(there["collection"]) if "collection" in there else None,
        candidates=read_run(there["candidates"]) if "candidates" in there else None,
        runs={path.stem: read_run(path) for path in tqdm(paths, desc="Reading", unit="run")},
    )


def _read_efficiency(path: Path | None) -> dict[str, dict[str, Any]]:
    content = {"rankers": {}} if path is None else _read_object(path, "rankers", dict)
    for name, figures in content["rankers"].items():
        total = figures.get("total_ms") if isinstance(figures, dict) else None
        latencies = [total.get(key) for key in ("p50", "p95")] if isinstance(total, dict) else [None]
        if not all(isinstance(ms, int | float) and 0 < ms < math.inf for ms in latencies):
            raise ValueError(f"{path}: ranker {name!r} needs total_ms with p50 and p95 above 0, got {total!r}.")
    for part in ("environment", "protocol"):
        if not isinstance(content.setdefault(part, {}), dict):
            raise ValueError(f"{path}: {part!r} must be an object of names and values.")
    return content


def _read_training(path: Path) -> list[dict[str, Any]]:
    history = _read_object(path, "log_history", list)["log_history"]
    if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in history):
        raise ValueError(f"{path}: log_history must be entries with a step, as trainer_state.json has them.")
    return history


def _read_object(path: Path, key: str, kind: type) -> dict[str, Any]:
    try:
        content = json.loads(existing_file(path, "results").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise ValueError(f"{path} must be a JSON object in which {key!r} is a {kind.__name__}.")
    return content


# ---- Tables and the browser of queries ------------------------------------------------------------------------------


def _context(found: Results, measures: list[str], arrows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What the template shows besides the plots; rankers by falling mean of the first measure."""
    bar = tqdm(found.runs.items(), desc="Measuring", unit="run")
    values = {name: evaluate_queries(run, found.qrels, measures) for name, run in bar}
    names = sorted(values, key=lambda name: -fmean(values[name][measures[0]].values()))
    weakest_first = {name: values[name] for name in reversed(names)}  # so that most differences are gains
    comparison = compare_values(weakest_first, moved=0) if len(names) > 1 else {"pairs": []}
    depths, depth_notes = _depths(found, names, measures)
    pairs = [{key: pair[key] for key in PAIR_KEYS} for pair in comparison["pairs"]]
    data = {"names": names, "measures": measures, "pairs": pairs}
    data |= {"marks": _marks(names, measures, comparison["pairs"])} | _browser(found, values, names, measures)
    return {
        "names": names,
        "measures": measures,
        "means": {name: [mean_interval([*values[name][measure].values()]) for measure in measures] for name in names},
        "efficiency": {name: found.efficiency["rankers"].get(name, {}) for name in names},
        "not_measured": [name for name in names if name not in found.efficiency["rankers"]],
        "not_ranked": sorted(found.efficiency["rankers"].keys() - found.runs.keys()),
        "control": names.index(arrows[0][0]) if arrows else len(names) - 1,
        "queries": len(found.qrels),
        "comparison": comparison,
        "depths": depths,
        "depth_notes": depth_notes,
        "protocol": {part: found.efficiency[part] for part in ("protocol", "environment") if found.efficiency[part]},
        "training": list(found.training),
        "arrows": arrows,
        "alpha": ALPHA,
        "data": data,
    }


def mean_interval(values: list[float]) -> dict[str, float]:
    """`mean` over queries and its 95 % bootstrap interval (scipy), `low` to `high`; of two values or more."""
    from scipy.stats import bootstrap  # 0.6 s, and only needed here

    resampled = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100, rng=42)
    low, high = resampled.confidence_interval
    return {"mean": fmean(values), "low": float(low), "high": float(high)}


def _marks(names: list[str], measures: list[str], pairs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """By control, ranker and measure: 1 significantly above the control, -1 below, else 0."""
    marks = np.zeros((len(names), len(names), len(measures)), dtype=int)
    for pair in pairs:
        control, treatment = names.index(pair["control"]), names.index(pair["treatment"])
        sign = int(np.sign(pair["difference"])) if pair["p_corrected"] < ALPHA else 0
        marks[control, treatment, measures.index(pair["measure"])] = sign
        marks[treatment, control, measures.index(pair["measure"])] = -sign
    return marks.tolist()


def _depths(found: Results, names: list[str], measures: list[str]) -> tuple[dict[str, dict], dict[str, str]]:
    """Depth curves, and why a ranker has none."""
    curves, notes = {}, {}
    if found.candidates is None:
        return curves, notes
    for name in tqdm(names, desc="Depth curves", unit="run"):
        try:
            curves[name] = depth_curve(found.runs[name], found.candidates, found.qrels, measures)
        except KeyError as error:
            notes[name] = error.args[0]
    return curves, notes


def _browser(found: Results, values: Values, names: list[str], measures: list[str]) -> dict[str, Any]:
    """The queries on which rankers differ most, with the passages that are shown of them."""

    def spread(query_id: str) -> float:
        by_measure = ([values[name][measure][query_id] for name in names] for measure in measures)
        return max(max(of) - min(of) for of in by_measure)

    queries, shown = [], {}
    for query_id in nlargest(MOVED_QUERIES, found.qrels, key=spread):
        grades, rankings = found.qrels[query_id], [found.runs[name].get(query_id, []) for name in names]
        ranks = [{doc_id: rank for rank, (doc_id, _) in enumerate(ranking, 1)} for ranking in rankings]
        relevant = nlargest(SHOWN_RELEVANT, (doc_id for doc_id in grades if grades[doc_id] > 0), key=grades.get)
        top = [[[doc_id, score, grades.get(doc_id)] for doc_id, score in of[:SHOWN_PASSAGES]] for of in rankings]
        shown |= dict.fromkeys([*relevant, *(doc_id for of in top for doc_id, _, _ in of)])
        queries.append(
            {
                "id": query_id,
                "text": _text(found.queries, query_id),
                "values": [[values[name][measure][query_id] for measure in measures] for name in names],
                "top": top,
                "relevant": [[doc_id, grades[doc_id], [of.get(doc_id) for of in ranks]] for doc_id in relevant],
            }
        )
    return {"queries": queries, "texts": {doc_id: _text(found.collection, doc_id) for doc_id in shown}}


def _text(store: TextStore | None, id_: str) -> str | None:
    if store is None or id_ not in store:
        return None
    text = store[id_]
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


# ---- Plots ----------------------------------------------------------------------------------------------------------


def _plot_module(is_needed: bool) -> ModuleType | None:
    try:
        from . import plot  # matplotlib: an extra, and slow to import
    except ImportError as error:
        if is_needed:
            raise ValueError("A plot needs matplotlib; install it (extra [report]).") from error
        return None
    return plot


def _figures(
    plots: ModuleType,
    found: Results,
    context: Mapping[str, Any],
    arrows: Sequence[tuple[str, str]],
    path: str | os.PathLike | None,
) -> dict[str, list[dict[str, str]]]:
    """By section of the page, titles and <svg> elements; the plot against latency also as a file."""
    measures, figures, styles = context["measures"], {"latency": [], "depth": [], "training": []}, context["styles"]

    def add(section: str, figure: Any, title: str, says: list[str]) -> None:
        key = f"{section}-{len(figures[section])}"
        figures[section].append({"title": title, "svg": plots.inline_svg(figure, key, title, "; ".join(says))})

    points = [
        plots.Point(name, str(of.get("architecture")), of["total_ms"], context["means"][name][0])
        for name, of in context["efficiency"].items()
        if of
    ]
    if points:
        figure = plots.latency_plot(points, measures[0], arrows)
        says = [
            f"{of.name} ({of.architecture}) {of.value['mean']:.4f} at {of.latency_ms['p50']:.3g} ms" for of in points
        ]
        add("latency", figure, f"{measures[0]} against latency", says)
        if path is not None:
            plots.save_plot(figure, path)
    for measure in measures if context["depths"] else ():
        curves = {name: [(d, of[measure]) for d, of in curve.items()] for name, curve in context["depths"].items()}
        figure = plots.line_plot(curves, styles, "first-stage depth (log scale)", measure, log_x=True)
        add("depth", figure, f"{measure} by first-stage depth", _ends(curves))
    logged = [key for history in found.training.values() for entry in history for key in entry]
    for key in dict.fromkeys(["loss", *(key for key in logged if key.startswith("eval_") and "@" in key)]):
        curves = {name: _logged(history, key) for name, history in found.training.items()}
        curves = {name: curve for name, curve in curves.items() if curve}
        label = "training loss (log scale)" if key == "loss" else f"held-out {key.removeprefix('eval_')}"
        if curves:
            figure = plots.line_plot(curves, styles, "step", label, log_y=key == "loss")
            add("training", figure, f"{label} by step", _ends(curves))
    return figures


def _logged(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value); of several at one step the first, as the last evaluation of a training is of its best step."""
    points = {}
    for entry in history:
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]):
            points.setdefault(entry["step"], entry[key])
    return sorted(points.items())


def _ends(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    ends = {name: (*curve[0], *curve[-1]) for name, curve in curves.items()}
    return [f"{name} from {y0:.4g} at {x0:g} to {y1:.4g} at {x1:g}" for name, (x0, y0, x1, y1) in ends.items()]


# ---- The page -------------------------------------------------------------------------------------------------------


def _page(context: Mapping[str, Any]) -> str:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True)
    environment.filters["figure"] = _shown
    return environment.get_template("report.html.j2").render(context)


def _shown(value: Any) -> str:
    """A figure in three digits and thousands, text as it is."""
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}"
    return "–" if value is None or isinstance(value, Undefined) else str(value)
