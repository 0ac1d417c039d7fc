"""Render the diagnosis of teacher files as text and as a page."""

import base64
import html
import io
import os
from collections.abc import Iterator
from itertools import combinations

from ..artifacts import refuse_existing, writing

CELL_WIDTH = 60
STYLE = "<style>body{font:15px sans-serif}td{border-bottom:1px solid #ccc;padding:.2em .8em}</style>"
Table = list[list[str]]


def diagnosis_text(diagnosis: dict) -> str:
    """Render what `diagnose_teachers` returns as tables; cells are cut at 60 characters."""
    lines = []
    for title, notes, table in _sections(diagnosis):
        lines += [title, *notes]
        cells = []
        for row in table:
            cells.append([" ".join(cell.split())[:CELL_WIDTH] for cell in row])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        lines.append("")
    return "\n".join(lines)


def diagnosis_html(diagnosis: dict, path: str | os.PathLike) -> None:
    """Write what `diagnose_teachers` returns as a page that loads nothing; its histograms need matplotlib.

    Raises:
        FileNotFoundError: if the folder of the path does not exist.
    """
    refuse_existing(path, overwrite=True)
    lines = ['<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Teacher scores</title>', STYLE]
    for title, notes, table in _sections(diagnosis):
        lines.append(f"<h2>{title}</h2>")
        for note in notes:
            lines.append(f"<p>{html.escape(note)}</p>")
        lines.append("<table>")
        for row in table:
            cells = "</td><td>".join(map(html.escape, row))
            lines.append(f"<tr><td>{cells}</td></tr>")
        lines.append("</table>")
    lines += ["<h2>Histograms</h2>", _histograms(diagnosis["files"]), "</html>\n"]
    with writing(path) as file:
        file.write("\n".join(lines))


def _sections(diagnosis: dict) -> Iterator[tuple[str, list[str], Table]]:
    """Yield titles, sentences, and tables whose first row names the columns."""
    files = diagnosis["files"]
    yield "Files", _file_notes(files), _file_table(files)
    pairs = [f"{a} and {b}" for a, b in combinations(range(1, len(files) + 1), 2)]
    comparisons = dict(zip(pairs, diagnosis["comparisons"], strict=True))
    if comparisons:
        keys = ("shared_rows", "pearson", "spearman", "spearman_rows", "agreement")
        table = [["files", *keys]]
        for pair, comparison in comparisons.items():
            table.append([pair, *(_shown(comparison[key]) for key in keys)])
        yield "Margins of two files; agreement is the share of rows with the same sign", [], table
    for pair, comparison in comparisons.items():
        yield f"Queries on which {pair} disagree most", [], _example_table(comparison["queries"])
    negatives = diagnosis["false_negatives"]
    note = (
        f"In {negatives['count']:,} of {negatives['rows']:,} rows ({negatives['share']:.2%}) the negative scores "
        "above the positive, averaged over the files. It may be relevant but not judged: look at it, and drop such "
        "rows."
    )
    yield "Suspected false negatives", [note], _example_table(negatives["examples"])


def _file_notes(files: list[dict]) -> list[str]:
    names, warnings = [], []
    for i, figures in enumerate(files, 1):
        names.append(f"{i}: {figures['file']}")
        for warning in figures["warnings"]:
            warnings.append(f"Warning, file {i}: {warning}")
    return names + warnings


def _file_table(files: list[dict]) -> Table:
    rows: dict[str, list[str]] = {"": []}
    for i, figures in enumerate(files, 1):
        rows[""].append(str(i))
        for name, value in _file_figures(figures).items():
            rows.setdefault(name, []).append(value)
    return [[name, *values] for name, values in rows.items()]


def _file_figures(figures: dict) -> dict[str, str]:
    shown = {}
    for name in ("rows", "queries", "pairs", "duplicate_rows", "same_ids"):
        shown[name] = _shown(figures[name])
    for kind in ("scores", "margins"):
        for name in ("min", "max", "mean", "std"):
            shown[f"{kind} {name}"] = _shown(figures[kind] and figures[kind][name])
    for name, value in figures["margins"]["quantiles"].items():
        shown[f"margins {name}"] = _shown(value)
    for name in ("negative", "zero"):
        shown[f"{name} margins"] = f"{figures['margins'][name]:.2%}"
    return shown


def _example_table(examples: list[dict]) -> Table:
    if not examples:
        return []
    table = [list(examples[0])]
    for example in examples:
        table.append(list(map(_shown, example.values())))
    return table


def _shown(value: str | float | list | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):  # a positive's and a negative's score for each file
        pairs = ["-" if pair is None else " / ".join(map(_shown, pair)) for pair in value]
        return " | ".join(pairs)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _histograms(files: list[dict]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>matplotlib is missing; install it (extra [report]) to see them.</p>"
    figure = Figure(figsize=(10, 2.5 * len(files)), layout="constrained")
    rows = figure.subplots(len(files), 2, squeeze=False)
    for i, (figures, axes) in enumerate(zip(files, rows, strict=True), 1):
        for kind, axis in zip(("scores", "margins"), axes, strict=True):
            if figures[kind]:
                axis.stairs(figures[kind]["histogram"]["counts"], figures[kind]["histogram"]["edges"], fill=True)
            axis.set_title(f"{kind} of file {i}")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return f'<img alt="Histograms" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'
