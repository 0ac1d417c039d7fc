"""Plots: they draw the given values, and the <svg> of a page is safe beside others in HTML."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from hf_kd_ranking.reporting import plot

NAMES = ["cat", "_dot <b>", "dot $x$ & T2"]


def points() -> list[plot.Point]:
    """One slow ranker and two fast ones of equal latency."""
    rows = zip(NAMES, ("bert_cat", "_dot", "_dot"), (400.0, 12.0, 12.0), (0.7, 0.6, 0.601), strict=True)
    return [
        plot.Point(name, kind, {"p50": ms, "p95": 1.5 * ms}, {"mean": mean, "low": mean - 0.02, "high": mean + 0.03})
        for name, kind, ms, mean in rows
    ]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_latency_plot_draws_points_and_bars():
    figure = plot.latency_plot(points(), "nDCG@10")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "nDCG@10"
    for point, container in zip(points(), axes.containers, strict=True):
        centre, _, (x_bar, y_bar) = container.lines
        ms, value = point.latency_ms, point.value
        assert centre.get_xydata().tolist() == [[ms["p50"], value["mean"]]]
        np.testing.assert_allclose(x_bar.get_segments()[0], [[ms["p50"], value["mean"]], [ms["p95"], value["mean"]]])
        np.testing.assert_allclose(y_bar.get_segments()[0], [[ms["p50"], value["low"]], [ms["p50"], value["high"]]])
    markers = [container.lines[0].get_marker() for container in axes.containers]
    assert markers[0] != markers[1] == markers[2]
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["bert_cat", "_dot"]


def test_latency_plot_draws_arrows_between_known_points():
    (axes,) = plot.latency_plot(points(), "RR@10", [(NAMES[1], NAMES[0]), (NAMES[1], "bm25")]).axes
    (arrow,) = [text for text in axes.texts if not text.get_text()]
    assert (arrow.xyann, arrow.xy) == ((12.0, 0.6), (400.0, 0.7))


def label_boxes(figure: Figure) -> dict[str, Bbox]:
    """Return the boxes of the names, without leader lines."""
    figure.draw_without_rendering()
    return {text.get_text(): Text.get_window_extent(text) for text in figure.axes[0].texts}


def test_latency_plot_labels_do_not_overlap():
    boxes = label_boxes(plot.latency_plot(points(), "RR@10"))
    assert boxes.keys() == set(NAMES)
    assert boxes[NAMES[2]].y0 >= boxes[NAMES[1]].y1 - 1  # the pair that is 0.001 apart, in the same order


@pytest.mark.parametrize(
    "latencies",
    [
        [(60.0, 2900.0), (2500.0, 3100.0)],  # a bar from the left half to the right edge
        [(1.0, 1.0), (30.0, 45.0), (900.0, 1000.0)],
        [(5.0, 5.0)],
        [(10.0, 11.0)] * 30,
    ],
)
def test_latency_plot_labels_lie_inside_axes(latencies):
    rankers = []
    for i, (p50, p95) in enumerate(latencies):
        value = {"mean": 0.6 + i / 100, "low": 0.5, "high": 1.0}
        rankers.append(plot.Point(f"{i:02d}" + "WM" * 17, "tk", {"p50": p50, "p95": p95}, value))
    figure = plot.latency_plot(rankers, "RR@10")
    boxes = label_boxes(figure)
    assert len(boxes) == len(rankers)
    inside = figure.axes[0].bbox
    for box in boxes.values():
        assert inside.x0 - 1 <= box.x0 < box.x1 <= inside.x1 + 1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_frontier_labels_lie_inside_axes_and_leave_the_line_free():
    names = ["BM25", "colbert teacher, 10 candidates + BM25", "bert_cat teacher, 20 candidates"]
    frontier = list(zip(names, (0.57, 0.63, 0.655), (0.4, 4.1, 38.0), strict=True))
    figure = plot.frontier_plot(frontier, frontier, "RR@10")
    (axes,) = figure.axes
    boxes = label_boxes(figure)
    assert list(boxes) == names
    for box in boxes.values():
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
    step = axes.transData.transform([(0.4, 0.57), (4.1, 0.57)])
    assert boxes["BM25"].y0 > step[0, 1]  # above the line on its right


def test_line_plot_draws_curves_and_ticks_at_points():
    curves = {"a": [(10, 0.5), (20, 0.7)], "b": [(10, 0.4), (50, 0.2)]}
    (axes,) = plot.line_plot(curves, plot.line_styles("ab"), "depth", "RR@10", log_x=True).axes
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[10, 0.5], [20, 0.7]], [[10, 0.4], [50, 0.2]]]
    assert axes.get_xticks().tolist() == [10, 20, 50]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert plot.line_plot(curves, plot.line_styles("ab"), "step", "loss", log_y=True).axes[0].get_yscale() == "log"
    below_zero = plot.line_plot({"a": [(1, -0.5), (2, 0.5)]}, plot.line_styles("a"), "step", "loss", log_y=True)
    assert below_zero.axes[0].get_yscale() == "linear"


def test_line_styles_are_distinct_and_stable():
    styles = plot.line_styles([str(i) for i in range(20)])
    assert len(set(styles.values())) == 20
    assert plot.line_styles(["0", "1"]).items() <= styles.items()


@pytest.mark.parametrize("page", ["#fcfcfa", "#16181c"])
def test_colours_contrast_with_light_and_dark_page(page):
    for colour in plot.COLOURS:
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_inline_svg_has_own_ids_page_ink_and_description():
    figure = plot.latency_plot(points(), "nDCG@10", [(NAMES[1], NAMES[2])])
    svg = plot.inline_svg(figure, "key", "A <title>", 'says "this" & that')
    root = ElementTree.fromstring(svg)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("key-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)
    assert svg.count("xlink:href=") > 10  # markers: HTML knows no other prefix
    assert plot.INK not in svg
    assert "currentColor" in svg
    assert (root[0].text, root[1].text) == ("A <title>", 'says "this" & that')
    assert root.get("aria-labelledby").split() == [root[0].get("id"), root[1].get("id")]
    assert "width" not in root.attrib
    texts = {node.text for node in root.iter(f"{{{plot.SVG}}}text")}
    assert {*NAMES, "nDCG@10"} <= texts
    assert {f"https://{site}" for site in re.findall(r"https?://([^/\"]+)", svg)} == {"https://www.w3.org"}


def test_save_plot_is_deterministic(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot.save_plot(plot.latency_plot(points(), "nDCG@10"), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert plot.INK in (tmp_path / "a.svg").read_text()  # a file has no page to take its ink from


def test_save_plot_chooses_format_by_suffix(tmp_path):
    figure = plot.line_plot({"a": [(1, 2), (2, 3)]}, plot.line_styles("a"), "x", "y")
    plot.save_plot(figure, tmp_path / "plot.png")
    plot.save_plot(figure, tmp_path / "plot.svg")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag == f"{{{plot.SVG}}}svg"
    with pytest.raises(ValueError, match=r"written as \.png or \.svg, got .*plot\.pdf"):
        plot.save_plot(figure, tmp_path / "plot.pdf")
    with pytest.raises(FileNotFoundError, match="none"):
        plot.save_plot(figure, tmp_path / "none" / "plot.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "plot.svg"]
