"""`hf-kd-ranking report`: a folder of results as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import refuse_existing
from ..evaluation.metrics import DEFAULT_MEASURES
from ..reporting.report import FILES, write_report
from . import options
from .evaluate import Measures


def report(
    results: Annotated[Path, typer.Option(help="A folder with runs/NAME.trec, qrels.txt and, optionally, more.")],
    output: options.Output,
    measure: Measures = DEFAULT_MEASURES,
    arrow: Annotated[list[str], typer.Option(help="CONTROL=TREATMENT, two runs' names; several times.")] = (),
    plot: Annotated[Path | None, typer.Option(help="The plot against latency, .png or .svg.")] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Rankers compared",
    qrels: Annotated[Path | None, typer.Option(help=f"Judgments; {FILES['qrels']} of the results.")] = None,
    queries: Annotated[Path | None, typer.Option(help=f"Texts; {FILES['queries']} of the results.")] = None,
    collection: Annotated[Path | None, typer.Option(help=f"Texts; {FILES['collection']} of the results.")] = None,
    candidates: Annotated[
        Path | None, typer.Option(help=f"First stage; {FILES['candidates']} of the results.")
    ] = None,
    intersect: Annotated[
        bool, typer.Option("--intersect", help="Leave out queries that a run does not have.")
    ] = False,
    overwrite: options.Overwrite = False,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Write tables, tests, plots and single queries of rankers as one HTML file that loads nothing."""
    for path in filter(None, (output, plot)):
        refuse_existing(path, overwrite)
    arrows = [tuple(pair.split("=", 1)) for pair in arrow]
    if wrong := [pair for pair in arrow if "=" not in pair]:
        raise ValueError(f"--arrow is CONTROL=TREATMENT, got {wrong[0]!r}.")
    files = {"qrels": qrels, "queries": queries, "collection": collection, "candidates": candidates}
    files = {kind: path for kind, path in files.items() if path is not None}
    options.report(write_report(results, output, measure, arrows, plot, title, intersect, files), json)
