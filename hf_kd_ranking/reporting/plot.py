"""Plots by matplotlib (extra `report`): effectiveness against latency, the paper's figure, and curves.

Inside a page a plot takes its ink from the page, and so follows dark and light mode; in a file it is dark on white.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import BboxBase

from ..artifacts import refuse_existing, writing
from ..errors import InputError

INK = "#1d2025"
# Each has a contrast of at least 3 : 1 on the page's white and on its dark grey.
COLOURS = ("#1f78b4", "#cc5a00", "#128a63", "#b65fa0", "#8a7a00", "#d04a4a", "#6d77c9", "#6f7780")
STYLES = ("solid", "dashed", "dotted")
MARKERS = "osD^vPX*"
LABEL_LENGTH = 44  # characters
LINE_HEIGHT = 12  # points
SETTINGS = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and has the page's font
    "svg.hashsalt": "hf_kd_ranking",  # the same plot gives the same file
    "text.parse_math": False,  # the name of a ranker may contain dollars
}
SVG = "http://www.w3.org/2000/svg"
Curves = Mapping[str, Sequence[tuple[float, float]]]  # name -> [(x, y)]
Styles = Mapping[str, tuple[str, str]]  # name -> colour, line style
Line = tuple[float, float, float]  # x0, x1, y of a label, a bar or a line; in points, if nothing else is said
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


class Point(NamedTuple):
    """A ranker in the plot of effectiveness against latency."""

    name: str
    architecture: str  # determines marker and colour
    latency_ms: Mapping[str, float]  # `p50` and `p95`, of one query with all its candidates
    value: Mapping[str, float]  # `mean` of the measure, and its 95 % interval, `low` to `high`


@matplotlib.rc_context(SETTINGS)
def latency_plot(points: Sequence[Point], measure: str, arrows: Sequence[tuple[str, str]] = ()) -> Figure:
    """Plot effectiveness (`measure`) against latency on a log axis, with bars to p95 and over the mean's interval.

    `arrows` are pairs of names, from a ranker without a teacher to the same ranker with one.
    """
    figure = Figure(figsize=(6.6, 4.2), dpi=72, layout="constrained")  # 72: a pixel is a point
    axes = figure.subplots()
    kinds, handles, places = {}, {}, {}
    for name, architecture, latency, value in points:
        kind = kinds.setdefault(architecture, len(kinds))
        x, y = places[name] = (latency["p50"], value["mean"])
        x_bar = [[0], [max(0, latency["p95"] - x)]]
        y_bar = [[max(0, y - value["low"])], [max(0, value["high"] - y)]]
        look = {"fmt": MARKERS[kind % len(MARKERS)], "color": COLOURS[kind % len(COLOURS)]}
        bar = axes.errorbar(x, y, y_bar, x_bar, markersize=7, elinewidth=0.9, **look)
        handles[f" {_short(architecture)}"] = bar  # the blank: matplotlib omits labels that begin with _
    axes.set_xscale("log")
    _set_plain(axes.xaxis)
    axes.set(xlabel="latency: median of one query with all its candidates, ms (log scale)", ylabel=measure)
    axes.margins(x=0.15, y=0.12)
    style = {"arrowstyle": "->", "color": INK, "alpha": 0.7, "shrinkA": 0, "shrinkB": 3}
    for control, treatment in arrows:
        if control in places and treatment in places:
            axes.annotate("", places[treatment], places[control], arrowprops=style)
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=5, handletextpad=0, borderpad=0)
    _label(axes, points)
    return figure


@matplotlib.rc_context(SETTINGS)
def line_plot(
    curves: Curves, styles: Styles, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> Figure:
    """Plot curves without a legend, which the page has.

    `log_x` puts ticks at the points of the curves; `log_y` has no effect where values are not positive.
    """
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    ticks, lowest = set(), float("inf")
    for name, curve in curves.items():
        x, y = zip(*curve, strict=True)
        ticks.update(x)
        lowest = min(lowest, *y)
        colour, style = styles[name]
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.6)
    if log_x:
        axes.set_xscale("log")
        _set_plain(axes.xaxis)
        axes.set_xticks(sorted(ticks))
        axes.minorticks_off()
    if log_y and lowest > 0:
        axes.set_yscale("log")
        _set_plain(axes.yaxis)
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure


@matplotlib.rc_context(SETTINGS)
def frontier_plot(
    points: Sequence[tuple[str, float, float]], frontier: Sequence[tuple[str, float, float]], measure: str
) -> Figure:
    """Plot pipelines, (name, value of the measure, ms per query), and a line through those that nothing beats."""
    figure = Figure(figsize=(6.6, 4.2), dpi=72, layout="constrained")
    axes = figure.subplots()
    axes.plot([ms for _, _, ms in points], [value for _, value, _ in points], "o", color=COLOURS[-1], markersize=4)
    x, y = [ms for _, _, ms in frontier], [value for _, value, _ in frontier]
    axes.step(x, y, where="post", color=COLOURS[0], marker="o", markersize=6, linewidth=1.4)
    axes.set_xscale("log")
    _set_plain(axes.xaxis)
    axes.margins(x=0.2, y=0.12)
    axes.set(xlabel="median latency of a query with its first stage, ms (log scale)", ylabel=f"{measure}, dev")
    steps = [(ms, next_ms, value) for (_, value, ms), (_, _, next_ms) in pairwise(frontier)]
    _label(axes, [Point(name, "", {"p50": ms, "p95": ms}, {"mean": value}) for name, value, ms in frontier], steps)
    return figure


def line_styles(names: Sequence[str]) -> Styles:
    """Return a colour and a line style for each name."""
    return {name: (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % 3]) for i, name in enumerate(names)}


def check_plot_path(path: str | Path) -> None:
    """Raise an InputError for a file that is neither .png nor .svg, a FileNotFoundError for a missing folder."""
    if Path(path).suffix not in (".png", ".svg"):
        raise InputError(f"A plot is written as .png or .svg, got {str(path)!r}.")
    refuse_existing(path, overwrite=True)


@matplotlib.rc_context(SETTINGS)
def save_plot(figure: Figure, path: str | Path) -> None:
    """Write a plot as PNG or SVG, by the suffix of the file; errors as `check_plot_path`."""
    check_plot_path(path)
    with writing(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix.removeprefix("."), dpi=200, metadata=NO_METADATA)


@matplotlib.rc_context(SETTINGS)
def inline_svg(figure: Figure, key: str, title: str, description: str) -> str:
    """Return a plot as an <svg> element for a page, in the page's ink.

    `key` is the prefix of the ids inside, which must differ between the plots of a page; title and description are for
    readers who cannot see the plot.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    ElementTree.register_namespace("", SVG)  # HTML knows only these two prefixes
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(buffer.getvalue())
    for node in root.iter():
        for name, value in node.attrib.items():
            if name == "id":
                value = f"{key}-{value}"
            value = re.sub(f"{INK}|#000000", "currentColor", value)
            value = re.sub(r"^#(?=[a-zA-Z])|(?<=url\(#)", lambda match: f"{match[0]}{key}-", value)  # references
            node.set(name, value)
    for name in ("width", "height"):  # the viewBox stays, and the page gives the size
        del root.attrib[name]
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-description"}
    for place, (tag, name, text) in enumerate([("title", "title", title), ("desc", "description", description)]):
        node = ElementTree.Element(f"{{{SVG}}}{tag}", id=f"{key}-{name}")
        node.text = text
        root.insert(place, node)
    return ElementTree.tostring(root, encoding="unicode")


def _set_plain(axis: Axis) -> None:
    """Write 1, 2, 5, 10 and not powers, which would need mathematical text."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter("")


def _label(axes: Axes, points: Sequence[Point], lines: Sequence[Line] = ()) -> None:
    """Write the names beside points and bars, on the side with more room, inside the axes and not over one another.

    `lines` are horizontal lines that they do not cover either: x0, x1 and y in the units of the axes.
    """
    axes.figure.draw_without_rendering()  # determines the places of the points
    rows, taken, inside = [], [], axes.bbox
    for x0, x1, y in lines:
        (start, height), (end, _) = axes.transData.transform([(x0, y), (x1, y)])
        taken.append((start, end, height))
    for name, _, latency, value in points:
        ends = [(latency["p50"], value["mean"]), (max(latency["p50"], latency["p95"]), value["mean"])]
        (x, y), (bar_end, _) = axes.transData.transform(ends)
        rows.append((y, x, bar_end, _short(name)))
        taken.append((x - 5, bar_end, y))
    for y, x, bar_end, name in sorted(rows, key=itemgetter(0)):
        is_right = inside.x1 - bar_end >= x - inside.x0
        start, side, gap = (bar_end, "left", 5) if is_right else (x, "right", -8)
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6, "relpos": (not is_right, 0.5)}
        text = {"ha": side, "va": "center", "fontsize": 9, "arrowprops": line}
        label = axes.annotate(name, (start, y), (0, 0), "figure points", "offset points", **text)
        label.set_in_layout(False)  # the axes would give way to it
        width = Text.get_window_extent(label).width  # without the line
        overhang = width * (not is_right)  # the part of the text to the left of its anchor
        left = max(inside.x0, min(start + gap - overhang, inside.x1 - width))
        move = _free_move((left, left + width, y), taken, inside)
        taken.append((left, left + width, y + move))
        label.set_position((left + overhang - start, move))
        label.arrow_patch.set_visible(move != 0)


def _free_move(label: Line, taken: Sequence[Line], inside: BboxBase) -> float:
    """Return by how many points to move a label up or down so that it covers nothing; 0 if that is impossible."""
    left, right, y = label
    beside = [other_y for x0, x1, other_y in taken if x0 < right and left < x1]
    for lines in range(int(inside.height / LINE_HEIGHT)):
        for move in (lines * LINE_HEIGHT, -lines * LINE_HEIGHT):
            is_inside = inside.y0 <= y + move <= inside.y1
            if is_inside and all(abs(other_y - y - move) >= LINE_HEIGHT - 1 for other_y in beside):
                return move
    return 0


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"
