"""`hf-kd-ranking teacher ...`: score, average, look into and write out teacher rows."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..artifacts import refuse_existing
from ..data.rows import load_teacher_scores, sample_triples, write_teacher_scores
from ..data.runs import read_qrels, read_run
from ..data.texts import TextStore
from ..hub.dataset_card import FILE, write_dataset_card
from ..hub.publish import check_name, files_to_publish, upload
from ..processes import processes
from ..teachers.diagnose import diagnose_teachers
from ..teachers.diagnosis import diagnosis_html, diagnosis_text
from ..teachers.ensemble import METHODS, ensemble_teachers
from ..teachers.expand import expand_ids
from ..teachers.load import INSTRUCTION, KINDS, MAX_LENGTH, load_teacher
from ..teachers.score import score_teacher
from .options import Collection, Config, Dtype, Json, Output, Overwrite, Queries, report, torch_dtype

app = typer.Typer(help="Teacher scores: make, average, inspect, expand.", no_args_is_help=True)


@app.command()
def score(
    model: Annotated[list[str], typer.Option(help="Teachers; with several the output is a folder.")],
    queries: Queries,
    collection: Collection,
    output: Output,
    triples: Annotated[
        Path | None, typer.Option(help="TSV of query_id pos_id neg_id (scores before are not read).")
    ] = None,
    candidates: Annotated[Path | None, typer.Option(help="TREC run, in place of triples.")] = None,
    kind: Annotated[
        str | None, typer.Option(help=f"{', '.join(KINDS)}; read from the checkpoint if not given.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Output of a classifier that has several.")] = None,
    instruction: Annotated[str, typer.Option(help="Of a yes-no model's prompt.")] = INSTRUCTION,
    max_length: Annotated[int, typer.Option(help="Tokens of a pair.")] = MAX_LENGTH,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: Dtype = "fp32",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Score triples or candidates; the same command goes on where it was stopped, alone or under accelerate launch."""
    if (triples is None) == (candidates is None):
        raise ValueError("Give either --triples or --candidates.")
    if len({Path(name).name for name in model}) < len(model):
        raise ValueError(f"Two models would write one file, their last names being equal: {', '.join(model)}.")
    if len(model) > 1:
        output.mkdir(exist_ok=True)
    state = processes()
    with state.main_process_first():  # one process builds the stores, the others open them
        stores = TextStore.from_file(queries), TextStore.from_file(collection)
    suffix = "tsv" if candidates is None else "trec"
    for name in model:
        path = output / f"{Path(name).name}.{suffix}" if len(model) > 1 else output
        if len(model) > 1 and path.exists() and not overwrite:  # of an earlier start of the same command
            typer.echo(f"{path} is there and kept (--overwrite scores again)", err=True)
            continue
        settings = {"label": label, "instruction": instruction, "max_length": max_length, "batch_size": batch_size}
        settings |= {"dtype": torch_dtype(dtype), "device": state.device}
        teacher = load_teacher(name, kind, **settings)
        counts = score_teacher(teacher, triples or candidates, *stores, path, overwrite)
        if state.is_main_process:
            report({"output": str(path), "teacher": teacher.name} | counts, json)
        del teacher  # two would not fit a GPU that one fills


@app.command()
def ensemble(
    scores: Annotated[list[Path], typer.Option(help="Files of teacher rows; the first gives rows and order.")],
    output: Output,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "mean",
    weights: Annotated[list[float] | None, typer.Option(help="One for each file.")] = None,
    on_missing: Annotated[str, typer.Option(help="error, average or drop.")] = "error",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Average the scores of several teachers (the paper's T2)."""
    report({"output": str(output)} | ensemble_teachers(scores, output, method, weights, on_missing, overwrite), json)


@app.command()
def expand(
    scores: Annotated[Path, typer.Option(help="Five-column TSV of ids.")],
    collection: Collection,
    queries: Queries,
    output: Output,
    on_missing: Annotated[str, typer.Option(help="error, or skip rows with unknown ids and count them.")] = "error",
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Replace the ids of teacher rows by their texts."""
    stores = TextStore.from_file(collection), TextStore.from_file(queries)
    report({"output": str(output)} | expand_ids(scores, *stores, output, on_missing, overwrite), json)


@app.command()
def diagnose(
    scores: Annotated[list[Path], typer.Option(help="Files of teacher rows.")],
    queries: Annotated[Path | None, typer.Option(help="To show texts.")] = None,
    collection: Annotated[Path | None, typer.Option(help="To show texts.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML file.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Rows and queries to show.")] = 10,
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Look for what would spoil training: squashed or constant scores, false negatives, teachers that disagree."""
    if output is not None:
        refuse_existing(output, overwrite)
    stores = (None if path is None else TextStore.from_file(path) for path in (queries, collection))
    found = diagnose_teachers(scores, *stores, examples=examples)
    if output is not None:
        diagnosis_html(found, output)
    if json:
        report(found, True)
    else:
        typer.echo(diagnosis_text(found))


@app.command()
def triples(
    candidates: Annotated[Path, typer.Option(help="TREC run that negatives come from.")],
    qrels: Annotated[Path, typer.Option(help="TREC judgments that positives come from.")],
    output: Output,
    per_query: Annotated[int, typer.Option(min=1)] = 1,
    minimum_grade: Annotated[int, typer.Option(help="A document is a positive from this grade on.")] = 1,
    ranks: Annotated[tuple[int, int] | None, typer.Option(help="First and last rank of negatives.")] = None,
    scores: Annotated[
        Path | None, typer.Option(help="A teacher's run of candidates and positives, to filter.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Negatives above the positive minus this are left out.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 42,
    overwrite: Overwrite = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Sample (query, positive, negative) from one's own collection, to be scored by a teacher."""
    refuse_existing(output, overwrite)
    teacher = None if scores is None else read_run(scores)
    rows = sample_triples(
        read_run(candidates), read_qrels(qrels), per_query, minimum_grade, ranks, teacher, margin, seed
    )
    write_teacher_scores(rows, output)
    report({"output": str(output), "rows": len(rows), "queries": len(set(rows["query_id"]))}, json)


@app.command()
def push(
    scores: Annotated[Path, typer.Option(help="File of teacher rows.")],
    push_to: Annotated[str, typer.Option(help="Data set on the Hub, owner/name.")],
    teacher: Annotated[list[str], typer.Option(help="What made the scores, for the card.")],
    texts: Annotated[str, typer.Option(help="The data set that the ids belong to, for the card.")],
    license: Annotated[str, typer.Option(help="As the Hub spells it.")] = "other",
    private: Annotated[bool, typer.Option("--private")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Commit onto a data set that exists.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Publish teacher rows as a Parquet data set with a card."""
    check_name(push_to)
    rows = load_teacher_scores(scores)
    with tempfile.TemporaryDirectory() as folder:
        write_teacher_scores(rows, Path(folder) / FILE)
        write_dataset_card(folder, push_to, len(rows), teacher, texts, license)
        files, message = files_to_publish(Path(folder)), "Upload teacher scores by hf_kd_ranking"
        address = upload(files, push_to, "dataset", message, private, overwrite)
        report({"rows": len(rows), "address": address}, json)
