"""`hf-kd-ranking report`: a folder of results as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import refuse_existing
from ..errors import InputError
from ..evaluation.metrics import DEFAULT_MEASURES
from ..reporting.report import write_report
from . import options


def report(
    results: Annotated[Path, typer.Option(help="Folder with runs/NAME.trec, qrels.txt and, optionally, more.")],
    output: options.Output,
    measure: options.Measures = DEFAULT_MEASURES,
    arrow: Annotated[list[str], typer.Option(help="Names of two runs, CONTROL=TREATMENT.")] = (),
    plot: Annotated[Path | None, typer.Option(help="File of the plot against latency, .png or .svg.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Rankers compared",
    qrels: options.Qrels = None,
    queries: options.Queries = None,
    collection: options.Collection = None,
    candidates: options.Candidates = None,
    intersect: Annotated[bool, typer.Option(help="Leave out queries that a run does not have.")] = False,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Write tables, tests, plots and single queries of rankers as one HTML file that loads nothing.

    Judgments, texts and candidates that are not given are those in the folder of results.

    Example: hf-kd-ranking report --results results --output report.html
    """
    refuse_existing(output, overwrite)
    if plot is not None:
        refuse_existing(plot, overwrite)
    arrows = []
    for pair in arrow:
        control, equals, treatment = pair.partition("=")
        if not equals:
            raise InputError(f"--arrow is CONTROL=TREATMENT, got {pair!r}.")
        arrows.append((control, treatment))
    files = {"qrels": qrels, "queries": queries, "collection": collection, "candidates": candidates}
    given = {kind: path for kind, path in files.items() if path is not None}
    return write_report(results, output, measure, arrows, plot, title, intersect, given)
