"""Render the diagnosis of teacher files as text."""

from collections.abc import Iterator, Sequence
from itertools import combinations

CELL_WIDTH = 60
Table = list[Sequence[str]]


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


def _sections(diagnosis: dict) -> Iterator[tuple[str, list[str], Table]]:
    """Yield titles, sentences, and tables whose first row names the columns."""
    names, warnings, columns = [], [], []
    for i, figures in enumerate(diagnosis["files"], 1):
        names.append(f"{i}: {figures['file']}")
        for warning in figures["warnings"]:
            warnings.append(f"Warning, file {i}: {warning}")
        columns.append({"": str(i)} | _shown_figures(figures))
    yield "Files", names + warnings, list(zip(columns[0], *map(dict.values, columns), strict=True))
    keys = ("shared_rows", "pearson", "spearman", "spearman_rows", "agreement", "kendall_tau", "inversions")
    table, disagreements = [["files", *keys]], []
    for (a, b), comparison in zip(combinations(range(1, len(names) + 1), 2), diagnosis["comparisons"], strict=True):
        table.append([f"{a} and {b}", *(_shown(comparison[key]) for key in keys)])
        examples = _example_table(comparison["queries"])
        disagreements.append((f"Queries on which {a} and {b} disagree most", [], examples))
    if disagreements:
        yield "Margins of two files; agreement is the share of rows with the same sign", [], table
    yield from disagreements
    negatives = diagnosis["false_negatives"]
    note = (
        f"In {negatives['count']:,} of {negatives['rows']:,} rows ({negatives['share']:.2%}) the negative scores "
        "above the positive, averaged over the files. It may be relevant but not judged: look at it, and drop such "
        "rows."
    )
    yield "Suspected false negatives", [note], _example_table(negatives["examples"])


def _shown_figures(figures: dict) -> dict[str, str]:
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
    table = [list(example) for example in examples[:1]]
    for example in examples:
        table.append(list(map(_shown, example.values())))
    return table


def _shown(value: str | float | list | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):  # a positive's and a negative's score for each file
        return " | ".join("-" if pair is None else " / ".join(map(_shown, pair)) for pair in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value
