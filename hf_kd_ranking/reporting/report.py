"""One HTML file with the effectiveness and efficiency of rankers, from a folder of results.

Only the runs and the judgments are required in the folder:

    runs/NAME.trec        one TREC run per ranker, and the first stage's; the report calls it NAME
    qrels.txt             judgments
    queries.tsv           texts of the queries, and
    collection.tsv        texts of the passages: for the browser of queries
    candidates.trec       the first stage, for depth curves
    efficiency.json       result of `measure_efficiency`, for the plot against latency
    training/NAME.json    the trainer_state.json of a ranker's training, for loss curves
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, Undefined
from tqdm.auto import tqdm

from ..artifacts import read_json, refuse_existing, writing
from ..data.runs import Run, read_qrels, read_run
from ..data.texts import TextStore
from ..errors import InputError
from ..evaluation.metrics import DEFAULT_MEASURES, evaluate_queries
from ..evaluation.rerank import depth_curve
from ..evaluation.significance import compare_values, mean_interval, shared_queries

FILES = {
    "qrels": ("qrels.txt", read_qrels),
    "queries": ("queries.tsv", TextStore.from_file),
    "collection": ("collection.tsv", TextStore.from_file),
    "candidates": ("candidates.trec", read_run),
}
ALPHA = 0.05
PAIR_KEYS = ("control", "treatment", "measure", "difference", "p_corrected", "wins", "ties", "losses")
# Limits of the browser of queries, so that the page stays small.
MOVED_QUERIES = 100
SHOWN_PASSAGES = 5
SHOWN_RELEVANT = 3
SHOWN_CHARACTERS = 600

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # ranker -> measure -> query_id -> value


@dataclass
class _Results:
    """The content of a folder of results; what is missing is empty or None."""

    runs: dict[str, Run]
    efficiency: dict[str, dict[str, Any]]
    training: dict[str, list[dict[str, Any]]]
    qrels: dict[str, dict[str, int]]
    queries: TextStore | None = None
    collection: TextStore | None = None
    candidates: Run | None = None


def write_report(
    results: str | os.PathLike,
    output: str | os.PathLike,
    measures: Sequence[str] = DEFAULT_MEASURES,
    arrows: Sequence[tuple[str, str]] = (),
    plot: str | os.PathLike | None = None,
    title: str = "Rankers compared",
    intersect: bool = False,
    files: Mapping[str, str | os.PathLike] | None = None,
    findings: Sequence[str] = (),
    summary: Sequence[str] = (),
) -> dict[str, Any]:
    """Write a page that loads nothing: measures with intervals and tests, plots, training, and single queries.

    Args:
        results: folder of results, see the module.
        output: the HTML file, which may exist.
        measures: in ir_measures' notation; the first orders the rankers and is plotted against latency.
        arrows: (control, treatment) pairs of names, drawn in the plot. The marks in the table compare with the first
            control, or without arrows with the weakest ranker.
        plot: file to which the plot against latency is also written, .png or .svg.
        title: title of the page.
        intersect: True leaves out queries that a run does not have; False refuses runs with different queries.
        files: other places of `qrels`, `queries`, `collection`, `candidates`.
        findings: sentences about tests that were made elsewhere, which the page shows in place of tests of its own.
        summary: sentences with which the page begins; those about the best ranker if there are none.

    Returns:
        `output`, `plot` if it was given, and the numbers of `rankers` and `queries`.

    Raises:
        FileNotFoundError: if the folder has no runs, or a file that is given or required does not exist.
        InputError: for malformed files, different or fewer than two judged queries, arrows between unknown names, or
            a plot without latencies or matplotlib.

    Example:
        >>> outcome = kd.write_report("results", "report.html", ["nDCG@10"])  # of runs/NAME.trec and qrels.txt
        >>> outcome["rankers"]
        2
    """
    refuse_existing(output, overwrite=True)
    try:
        from . import figures  # need matplotlib, which is an extra and slow to import
        from . import plot as plots
    except ImportError as error:
        if plot is not None:
            raise InputError("A plot needs matplotlib; install it (extra [report]).") from error
        figures = None
    written = {"output": str(output)}
    if plot is not None:
        plots.check_plot_path(plot)
        written["plot"] = str(plot)
    content = _read_results(Path(results), files or {})
    unknown = set().union(*arrows) - content.runs.keys()
    if unknown:
        raise InputError(f"No run is called {', '.join(sorted(unknown))}; there are {', '.join(content.runs)}.")
    if plot is not None and not content.efficiency["rankers"].keys() & content.runs.keys():
        raise InputError(f"A plot needs latencies of the runs, in {Path(results) / 'efficiency.json'}.")
    judged = {name: run.keys() & content.qrels.keys() for name, run in content.runs.items()}
    shared = shared_queries(judged, content.qrels, intersect)
    content.qrels = {query_id: content.qrels[query_id] for query_id in shared}
    context = _context(content, list(dict.fromkeys(measures)), arrows, not findings)
    context |= {"title": title, "figures": None, "findings": findings, "summary": summary or _summary(context)}
    if figures is not None:
        context["styles"] = plots.line_styles(list(dict.fromkeys([*context["names"], *content.training])))
        context["figures"] = figures.page_figures(context, content.training, plot)
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, trim_blocks=True)
    environment.filters["figure"] = _format_figure
    with writing(output) as file:
        file.write(environment.get_template("report.html.j2").render(context))
    return written | {"rankers": len(content.runs), "queries": len(content.qrels)}


def _read_results(folder: Path, files: Mapping[str, str | os.PathLike]) -> _Results:
    run_paths = sorted((folder / "runs").glob("*.trec"))
    if not run_paths:
        raise FileNotFoundError(f"{folder / 'runs'} holds no NAME.trec; put the TREC run of each ranker there.")
    inputs = {}
    for kind, (name, read) in FILES.items():
        path = Path(files.get(kind, folder / name))
        if kind in files or kind == "qrels" or path.exists():
            inputs[kind] = read(path)
    runs, training, efficiency = {}, {}, _read_efficiency(folder / "efficiency.json")
    for path in sorted((folder / "training").glob("*.json")):
        history = training[path.stem] = _read_object(path, "log_history", list)["log_history"]
        for entry in history:
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise InputError(f"{path}: log_history must be entries with a step, as in trainer_state.json.")
    for path in tqdm(run_paths, desc="Reading", unit="run"):
        runs[path.stem] = read_run(path)
    return _Results(runs, efficiency, training, **inputs)


def _read_efficiency(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {"rankers": {}, "environment": {}, "protocol": {}}
    content = _read_object(path, "rankers", dict)
    for name, figures in content["rankers"].items():
        is_valid = False
        with suppress(KeyError, TypeError):
            p50, p95 = figures["total_ms"]["p50"], figures["total_ms"]["p95"]
            is_valid = 0 < p50 < math.inf and 0 < p95 < math.inf
        if not is_valid:
            raise InputError(f"{path}: ranker {name!r} needs total_ms with p50 and p95 above 0, got {figures!r}.")
    for section in ("environment", "protocol"):
        if not isinstance(content.setdefault(section, {}), dict):
            raise InputError(f"{path}: {section!r} must be an object of names and values.")
    return content


def _read_object(path: Path, key: str, kind: type) -> dict[str, Any]:
    content = read_json(path, what="results")
    if not isinstance(content.get(key), kind):
        raise InputError(f"{path} must be a JSON object in which {key!r} is a {kind.__name__}.")
    return content


def _context(
    content: _Results, measures: list[str], arrows: Sequence[tuple[str, str]], is_tested: bool
) -> dict[str, Any]:
    """Return the variables of the template except the plots; rankers by descending mean of the first measure."""
    values, means = {}, {}
    for name, run in tqdm(content.runs.items(), desc="Measuring", unit="run"):
        values[name] = evaluate_queries(run, content.qrels, measures)
        means[name] = {measure: mean_interval([*values[name][measure].values()]) for measure in measures}
    names = sorted(values, key=lambda name: -means[name][measures[0]]["mean"])
    # Weakest first, so that most differences are gains.
    comparison: dict[str, Any] = {"pairs": []}
    if is_tested:
        comparison = compare_values({name: values[name] for name in reversed(names)}, moved=0)
    measured = content.efficiency["rankers"]
    pairs, marks = [], np.zeros((len(names), len(names), len(measures)), dtype=int)
    for pair in comparison["pairs"]:
        pairs.append({key: pair[key] for key in PAIR_KEYS})
        if pair["p_corrected"] < ALPHA:
            place = names.index(pair["control"]), names.index(pair["treatment"]), measures.index(pair["measure"])
            marks[place] = np.sign(pair["difference"])
    # By control, ranker and measure: 1 for significantly above the control, -1 below, else 0.
    data = {"names": names, "measures": measures, "marks": (marks - marks.swapaxes(0, 1)).tolist(), "pairs": pairs}
    depths, depth_notes = {}, {}  # the notes say why a ranker has no curve
    if content.candidates is not None:
        for name in tqdm(names, desc="Depth curves", unit="run"):
            try:
                depths[name] = depth_curve(content.runs[name], content.candidates, content.qrels, measures)
            except KeyError as error:
                depth_notes[name] = error.args[0]
    return {
        "names": names,
        "measures": measures,
        "means": means,
        "efficiency": {name: measured.get(name, {}) for name in names},
        "not_measured": sorted(set(names) - measured.keys(), key=names.index),
        "not_ranked": sorted(measured.keys() - content.runs.keys()),
        "control": names.index(arrows[0][0]) if arrows else len(names) - 1,
        "queries": len(content.qrels),
        "comparison": comparison,
        "depths": depths,
        "depth_notes": depth_notes,
        "protocol": {"protocol": content.efficiency["protocol"], "environment": content.efficiency["environment"]},
        "training": list(content.training),
        "arrows": arrows,
        "alpha": ALPHA,
        "data": data | _browser(content, values, names, measures),
    }


def _summary(context: Mapping[str, Any]) -> list[str]:
    """Return in two sentences which ranker is best, and from which others the tests cannot tell it apart."""
    best, *others = context["names"]
    measure = context["measures"][0]
    mean = context["means"][best][measure]
    interval = f"95 % interval {mean['low']:.4f} to {mean['high']:.4f}"
    found = f"{best} has the highest {measure}, {mean['mean']:.4f} on {context['queries']:,} queries ({interval})"
    tied = [name for name in others if context["means"][name][measure]["mean"] == mean["mean"]]
    if tied:
        found += f", and so has {', '.join(tied)}"
    sentences = [f"{found}."]
    if others and context["comparison"]["pairs"]:
        equal = [name for row, name in enumerate(others, 1) if context["data"]["marks"][row][0][0] <= 0]
        if equal:
            sentences.append(f"No significant difference from {', '.join(equal)} was found.")
        else:
            sentences.append("It is significantly better than all others.")
    return sentences


def _browser(content: _Results, values: Values, names: list[str], measures: list[str]) -> dict[str, Any]:
    """Return the queries on which the rankers differ most, and the texts of the passages that are shown for them."""
    query_ids = list(content.qrels)
    spreads = np.zeros(len(query_ids))
    for measure in measures:
        by_ranker = [list(values[name][measure].values()) for name in names]  # (rankers, queries)
        spreads = np.maximum(spreads, np.ptp(by_ranker, axis=0))
    queries, texts = [], {}
    for row in np.argsort(-spreads, kind="stable")[:MOVED_QUERIES]:
        query = _query_details(content, values, names, query_ids[row])
        queries.append(query)
        for doc_id, *_ in chain(query["relevant"], *query["top"]):
            texts[doc_id] = _text(content.collection, doc_id)
    return {"queries": queries, "texts": texts}


def _query_details(content: _Results, values: Values, names: list[str], query_id: str) -> dict[str, Any]:
    grades = content.qrels[query_id]
    query = {"id": query_id, "text": _text(content.queries, query_id), "values": [], "top": [], "relevant": []}
    ranks = []
    for name in names:
        ranking = content.runs[name].get(query_id, [])
        query["values"].append([by_query[query_id] for by_query in values[name].values()])
        query["top"].append([[doc_id, score, grades.get(doc_id)] for doc_id, score in ranking[:SHOWN_PASSAGES]])
        ranks.append({doc_id: rank for rank, (doc_id, _) in enumerate(ranking, start=1)})
    for doc_id in nlargest(SHOWN_RELEVANT, grades, key=grades.get):
        if grades[doc_id] > 0:
            query["relevant"].append([doc_id, grades[doc_id], [by_document.get(doc_id) for by_document in ranks]])
    return query


def _text(store: TextStore | None, id_: str) -> str | None:
    rows = [-1] if store is None else store.rows_of_documents([id_])  # of a split document the first passage
    if rows[0] < 0:
        return None
    [text] = store.take(rows)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]} ..."
    return text


def _format_figure(value: Any) -> str:
    if value is None or isinstance(value, Undefined):
        return "–"
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}"
    return str(value)
