"""Figures of the report: effectiveness against latency, by first-stage depth, and during training."""

import math
import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

from matplotlib.figure import Figure

from .plot import Curves, Point, inline_svg, latency_plot, line_plot, save_plot

History = list[dict[str, Any]]
Panel = tuple[Figure, str, list[str]]  # figure, title, and a description of each of its points or lines


def page_figures(
    context: Mapping[str, Any], training: Mapping[str, History], path: str | os.PathLike | None = None
) -> dict[str, list[dict[str, str]]]:
    """Return titles and <svg> elements by section of the page.

    `context` is for the template, `training` has logs by name; the plot against latency is also written to `path`.
    """
    panels = {"latency": _latency_panels(context, path), "depth": _depth_panels(context)}
    panels["training"] = _training_panels(context, training)
    figures = {}
    for section in panels:
        figures[section] = []
        for number, (figure, title, descriptions) in enumerate(panels[section]):
            svg = inline_svg(figure, f"{section}-{number}", title, "; ".join(descriptions))
            figures[section].append({"title": title, "svg": svg})
    return figures


def _latency_panels(context: Mapping[str, Any], path: str | os.PathLike | None) -> list[Panel]:
    measure = context["measures"][0]
    points, descriptions = [], []
    for name, figures in context["efficiency"].items():
        if figures:
            value, latency = context["means"][name][measure], figures["total_ms"]
            architecture = str(figures.get("architecture"))
            points.append(Point(name, architecture, latency, value))
            descriptions.append(f"{name} ({architecture}) {value['mean']:.4f} at {latency['p50']:.3g} ms")
    if not points:
        return []
    figure = latency_plot(points, measure, context["arrows"])
    if path is not None:
        save_plot(figure, path)
    return [(figure, f"{measure} against latency", descriptions)]


def _depth_panels(context: Mapping[str, Any]) -> list[Panel]:
    panels = []
    for measure in context["measures"]:
        curves = {}
        for name, curve in context["depths"].items():
            curves[name] = [(depth, means[measure]) for depth, means in curve.items()]
        if curves:
            figure = line_plot(curves, context["styles"], "first-stage depth (log scale)", measure, log_x=True)
            panels.append((figure, f"{measure} by first-stage depth", _describe(curves)))
    return panels


def _training_panels(context: Mapping[str, Any], training: Mapping[str, History]) -> list[Panel]:
    keys = {"loss": "training loss (log scale)"}
    for entry in chain(*training.values()):
        for key in entry:
            if key.startswith("eval_") and "@" in key:
                keys[key] = f"held-out {key.removeprefix('eval_')}"
    panels = []
    for key, label in keys.items():
        curves = {}
        for name, history in training.items():
            curve = _training_curve(history, key)
            if curve:
                curves[name] = curve
        if curves:
            figure = line_plot(curves, context["styles"], "step", label, log_y=key == "loss")
            figure.axes[0].set_xlim(left=0)  # single points of trainings of about equal length would look far apart
            panels.append((figure, f"{label} by step", _describe(curves)))
    return panels


def _training_curve(history: History, key: str) -> list[tuple[float, float]]:
    points = {}  # the first of each step, because a training's last evaluation is that of its best step
    for entry in history:
        if isinstance(entry.get(key), int | float) and math.isfinite(entry[key]):
            points.setdefault(entry["step"], entry[key])
    return sorted(points.items())


def _describe(curves: Curves) -> list[str]:
    descriptions = []
    for name, curve in curves.items():
        (x0, y0), (x1, y1) = curve[0], curve[-1]
        descriptions.append(f"{name} from {y0:.4g} at {x0:g} to {y1:.4g} at {x1:g}")
    return descriptions
