"""Plots by matplotlib (extra `report`): effectiveness against latency, the paper's figure, and curves.

Inside a page a plot takes its ink from the page, so that it follows dark and light; in a file it stands on white.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..artifacts import refuse_existing, writing

INK = "#1d2025"
# Each has a contrast of 3 : 1 or more on the page's white and on its dark grey.
COLOURS = ("#1f78b4", "#cc5a00", "#128a63", "#b65fa0", "#8a7a00", "#d04a4a", "#6d77c9", "#6f7780")
STYLES = ("solid", "dashed", "dotted")
MARKERS = "osD^vPX*"
LABEL_LENGTH = 36  # characters
LABEL_WIDTH, LABEL_HEIGHT = 5.5, 12  # points, of a character and of a line
SETTINGS = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be found, and takes the page's font
    "svg.hashsalt": "hf_kd_ranking",  # the same plot is the same file
    "text.parse_math": False,  # a ranker's name may have dollars in it
}
SVG = "http://www.w3.org/2000/svg"
NAMESPACES = {"": SVG, "xlink": "http://www.w3.org/1999/xlink"}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Point:
    """A ranker in the plot against latency.

    Args:
        name: of the ranker.
        architecture: gives marker and colour.
        latency_ms: `p50` and `p95`, of one query with all its candidates.
        value: `mean` of the measure, and its 95 % interval, `low` to `high`.
    """

    name: str
    architecture: str
    latency_ms: Mapping[str, float]
    value: Mapping[str, float]


@matplotlib.rc_context(SETTINGS)
def latency_plot(points: Sequence[Point], measure: str, arrows: Sequence[tuple[str, str]] = ()) -> Figure:
    """Effectiveness against latency on a log axis, with bars from p50 to p95 and over the mean's interval.

    Args:
        points: one or more.
        measure: what the values are.
        arrows: pairs of names, from a ranker without a teacher to the same with one.
    """
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    axes, handles = figure.subplots(), {}
    architectures = list(dict.fromkeys(point.architecture for point in points))
    for point in points:
        kind, latency, value = architectures.index(point.architecture), point.latency_ms, point.value
        handles[f" {_short(point.architecture)}"] = (
            axes.errorbar(  # the blank: a label that begins with _ would be left out
                latency["p50"],
                value["mean"],
                xerr=[[0], [max(0, latency["p95"] - latency["p50"])]],
                yerr=[[max(0, value["mean"] - value["low"])], [max(0, value["high"] - value["mean"])]],
                fmt=MARKERS[kind % len(MARKERS)],
                color=COLOURS[kind % len(COLOURS)],
                markersize=7,
                elinewidth=0.9,
            )
        )
    _set_log_x(axes)
    axes.set(xlabel="latency of one query with all its candidates, ms (log scale)", ylabel=measure)
    axes.margins(x=0.15, y=0.12)
    places = {point.name: (point.latency_ms["p50"], point.value["mean"]) for point in points}
    for control, treatment in arrows:
        style = {"arrowstyle": "->", "color": INK, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
        if control in places and treatment in places:
            axes.annotate("", places[treatment], places[control], arrowprops=style)
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=5, handletextpad=0, borderpad=0)
    _label(axes, points)
    return figure


@matplotlib.rc_context(SETTINGS)
def line_plot(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    styles: Mapping[str, tuple[str, str]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Curves without a legend, which the page has.

    Args:
        curves: name -> [(x, y)].
        styles: name -> colour and line style.
        x_label: below.
        y_label: beside.
        log_x: True for a logarithmic axis, with ticks at the points of the curves.
        log_y: the same, of values above 0; ignored where there are others.
    """
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        colour, style = styles[name]
        axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.6)
    if log_x:
        _set_log_x(axes)
        axes.set_xticks(sorted({x for curve in curves.values() for x, _ in curve}))
        axes.minorticks_off()
    if log_y and min(y for curve in curves.values() for _, y in curve) > 0:
        axes.set_yscale("log")
        _set_plain(axes.yaxis)
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure


def line_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line style for each name."""
    return {name: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % 3]) for i, name in enumerate(names)}


def check_plot_path(path: str | Path) -> None:
    """Refuse a file that a plot cannot be written to.

    Raises:
        ValueError: if the name ends neither in .png nor in .svg.
        FileNotFoundError: if its folder does not exist.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"A plot is written as .png or .svg, got {str(path)!r}.")
    refuse_existing(path, overwrite=True)


@matplotlib.rc_context(SETTINGS)
def save_plot(figure: Figure, path: str | Path) -> None:
    """Write a plot as PNG or SVG, by the name of the file; errors as `check_plot_path`."""
    check_plot_path(path)
    kind = Path(path).suffix.removeprefix(".")
    with writing(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=200, metadata=NO_METADATA if kind == "svg" else None)


@matplotlib.rc_context(SETTINGS)
def inline_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """A plot as an <svg> element for a page, in the page's ink.

    Args:
        figure: the plot.
        key: begins the ids inside, which must differ between the plots of a page.
        title: what the plot is.
        description: what it shows, for those who cannot see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    for prefix, namespace in NAMESPACES.items():  # HTML knows these prefixes only
        ElementTree.register_namespace(prefix, namespace)
    root = ElementTree.fromstring(buffer.getvalue())
    for node in root.iter():
        for name, value in node.attrib.items():
            value = re.sub(r"^#(?=[a-zA-Z])|(?<=url\(#)", lambda match: f"{match[0]}{key}-", value)
            node.set(name, f"{key}-{value}" if name == "id" else re.sub(f"{INK}|#000000", "currentColor", value))
    for name in ("width", "height"):  # the viewBox stays, and the page gives the size
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-description"}
    for place, (tag, part, text) in enumerate((("title", "title", title), ("desc", "description", description))):
        node = ElementTree.Element(f"{{{SVG}}}{tag}", id=f"{key}-{part}")
        node.text = text
        root.insert(place, node)
    return ElementTree.tostring(root, encoding="unicode")


def _set_log_x(axes: Axes) -> None:
    axes.set_xscale("log")
    _set_plain(axes.xaxis)


def _set_plain(axis: Axis) -> None:
    """1, 2, 5, 10 rather than powers, which would need mathematical text."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter("")


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside their points and bars, where there is more room, moved up or down to where they cover nothing."""
    axes.figure.draw_without_rendering()  # only then is it known where a point lies
    to_points, centre = 72 / axes.figure.dpi, (axes.bbox.x0 + axes.bbox.x1) / 2
    places = [axes.transData.transform((of.latency_ms["p50"], of.value["mean"])) for of in points]
    taken = [(x * to_points - 5, x * to_points + 5, y * to_points) for x, y in places]  # by the markers
    for point, (x, y) in sorted(zip(points, places, strict=True), key=lambda item: item[1][1]):
        name, is_left, middle = _short(point.name), x < centre, y * to_points
        end = point.latency_ms["p95" if is_left else "p50"]
        start = axes.transData.transform((end, 0))[0] * to_points + (5 if is_left else -8 - LABEL_WIDTH * len(name))
        beside = [at for low, high, at in taken if low < start + LABEL_WIDTH * len(name) and start < high]
        moves = (sign * i * LABEL_HEIGHT for i in itertools.count() for sign in (1, -1))
        move = next(move for move in moves if all(abs(at - middle - move) >= LABEL_HEIGHT - 1 for at in beside))
        taken.append((start, start + LABEL_WIDTH * len(name), middle + move))
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6, "relpos": (0 if is_left else 1, 0.5)}
        label = axes.annotate(
            name,
            (end, point.value["mean"]),
            (5 if is_left else -8, move),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="center",
            fontsize=9,
            arrowprops=line if move else None,
        )
        label.set_in_layout(False)  # the axes would give way to it


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"
