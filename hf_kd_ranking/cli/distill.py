"""Verb `distill`: a collection, queries and a teacher become the best ranker within a latency budget."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from ..distillation.job import DistillJob
from .options import Config, Json, report


def distill(
    collection: Annotated[str, typer.Option(help="Documents: id<TAB>text, JSONL, or a text store.")],
    queries: Annotated[str, typer.Option(help="Queries, likewise.")],
    teacher: Annotated[list[str], typer.Option(help="A ranker, cross-encoder or bi-encoder; several are averaged.")],
    output: Annotated[Path, typer.Option(help="Folder of all stages, of the report and of the best ranker.")],
    qrels: Annotated[
        str | None, typer.Option(help="Judgments; without them agreement with the teacher counts.")
    ] = None,
    model_name: Annotated[str, typer.Option(help="The students' encoder.")] = DistillJob.model_name,
    architecture: Annotated[list[str], typer.Option(help="To train; several times.")] = ("bert_dot", "colbert"),
    budget_ms: Annotated[float | None, typer.Option(min=0, help="The longest a query may take.")] = None,
    candidates: Annotated[int, typer.Option(min=2, help="Of BM25, a query.")] = DistillJob.candidates,
    triples_per_query: Annotated[int, typer.Option(min=1)] = DistillJob.triples_per_query,
    held_out: Annotated[
        float, typer.Option(help="Share of queries to choose by and to test on.")
    ] = DistillJob.held_out,
    measure: Annotated[str, typer.Option(help="That decides, as ir_measures names it.")] = DistillJob.measure,
    learning_rate: Annotated[list[float], typer.Option(help="Tried for every student.")] = (2e-5, 7e-5),
    epochs: Annotated[float, typer.Option()] = DistillJob.epochs,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each chosen student.")] = DistillJob.seeds,
    batch_size: Annotated[int, typer.Option(min=1, help="Triples a step.")] = DistillJob.batch_size,
    max_query_length: Annotated[int, typer.Option(help="Tokens.")] = DistillJob.max_query_length,
    max_document_length: Annotated[int, typer.Option(help="Tokens.")] = DistillJob.max_document_length,
    layer: Annotated[list[int], typer.Option(help="An encoder layer that students keep; all if none is given.")] = (),
    configs: Annotated[
        str | None, typer.Option(help="""JSON, for example '{"bert_dot": {"pooling": "mean"}}': config fields.""")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on though the teacher is no better than BM25.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Distil a slow ranker into fast ones and choose the best within a budget; done stages are not repeated."""
    from ..distillation.outcome import distill as distil
    from ..distillation.outcome import outcome_text

    try:
        fields = json_format.loads(configs or "{}")
    except json_format.JSONDecodeError as error:
        raise ValueError(f"--configs is no JSON ({error}): {configs!r}.") from None
    job = DistillJob(
        collection,
        queries,
        str(output),
        list(teacher),
        qrels,
        model_name,
        list(architecture),
        budget_ms,
        candidates,
        triples_per_query,
        held_out,
        measure,
        list(learning_rate),
        epochs,
        seeds,
        batch_size,
        max_query_length,
        max_document_length,
        list(layer) or None,
        configs=fields,
        force=force,
    )
    outcome = distil(job)
    if json:
        report(outcome, True)
    else:
        typer.echo(outcome_text(outcome, job))
