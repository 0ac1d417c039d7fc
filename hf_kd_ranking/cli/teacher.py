"""`hf-kd-ranking teacher ...`: make, average, inspect, expand and publish teacher scores; generate queries."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from ..artifacts import existing_file, refuse_existing
from ..data.passages import best_passages, choose_passages
from ..data.rows import check_format, load_teacher_scores, write_teacher_scores
from ..data.runs import Run, read_qrels, read_run
from ..data.texts import TextStore, read_titles
from ..errors import InputError
from ..hub.dataset_card import FILE, write_dataset_card
from ..hub.publish import check_name, files_to_publish, upload
from ..processes import processes
from ..ranker import check_model_paths
from ..retrieval.bm25 import BM25Index
from ..retrieval.fusion import mix_runs
from ..teachers.diagnose import diagnose_teachers
from ..teachers.diagnosis import diagnosis_text
from ..teachers.endpoint import PATHS, Endpoint, EndpointSettings, is_endpoint
from ..teachers.ensemble import METHODS, ensemble_teachers
from ..teachers.expand import expand_ids
from ..teachers.generators import FALLBACKS, load_generator
from ..teachers.load import KINDS, load_teacher
from ..teachers.orders import METHODS as ORDER_METHODS
from ..teachers.orders import combine_orders
from ..teachers.prompts import CHAT_TEMPLATE, INSTRUCTION, QWEN_TEMPLATE, Prompt, QueryPrompt
from ..teachers.queries import generate_queries, plan_queries
from ..teachers.sample import RELATIVE_MARGIN, SAMPLINGS, sample_triples
from ..teachers.score import plan_requests, score_teacher
from . import options
from .parser import add_verb, make_app

Concurrency = Annotated[int | None, typer.Option(min=1, help="Requests to an address at the same time [8].")]
RequestsPerMinute = Annotated[float | None, typer.Option(help="Most requests to an address per minute.")]
PlanOnly = Annotated[bool, typer.Option(help="Print requests and tokens to an address, and stop.")]


def score(
    model: Annotated[
        list[str], typer.Option(help="Teachers, or addresses; if several are given, the output is a folder.")
    ],
    queries: options.Queries,
    collection: options.Collection,
    output: options.Output,
    triples: Annotated[Path | None, typer.Option(help="TSV of query_id pos_id neg_id, or of teacher rows.")] = None,
    candidates: options.Candidates = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of teacher, if not detected: {', '.join(KINDS)}; of an address {', '.join(PATHS)}."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Output to read, if a classifier has several.")] = None,
    instruction: Annotated[str, typer.Option(help="Instruction in the prompt of a yes-no model.")] = INSTRUCTION,
    max_length: Annotated[int | None, typer.Option(help="Maximum tokens per pair; default: the model's.")] = None,
    batch_size: options.BatchSize = 32,
    tokens_per_batch: options.TokensPerBatch = None,
    dtype: options.Dtype = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    template: Annotated[Path | None, typer.Option(help="File with the prompt of a yes-no or chat model.")] = None,
    yes: Annotated[str | None, typer.Option(help="Its answer for relevant [yes].")] = None,
    no: Annotated[str | None, typer.Option(help="Its answer for not relevant [no].")] = None,
    plan_only: PlanOnly = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Score triples or candidates; the same command resumes where it was stopped. Works under accelerate launch.

    A teacher may be an address, http://HOST:PORT, whose key is in the environment variable HF_KD_RANKING_ENDPOINT_KEY.

    Example: hf-kd-ranking teacher score --model BAAI/bge-reranker-base --triples triples.tsv --queries queries.tsv
    --collection collection.tsv --output scored.tsv
    """
    if (triples is None) == (candidates is None):
        raise InputError("Give either --triples or --candidates.")
    check_model_paths(model)
    options.torch_dtype(dtype)
    endpoint = _endpoint_settings(model, concurrency, requests_per_minute, plan_only)
    prompt = _prompt(any(map(is_endpoint, model)), template, yes, no)
    source, suffix = triples, "tsv"
    if candidates is not None:
        source, suffix = read_run(candidates), "trec"
    outputs, folder = _outputs(model, kind, output, suffix)
    state = processes()
    with state.main_process_first():  # one process builds the stores, the others open them
        stores = TextStore.from_file(queries), TextStore.from_file(collection)
    if plan_only:
        asked = {name: Endpoint(name, kind, batch_size, prompt, endpoint) for name in model}
        plans = [{"teacher": name, **plan_requests(asked[name], source, *stores)} for name in model]
        _print_results(plans, folder, as_json)
        return
    settings = {"label": label, "instruction": instruction, "max_length": max_length, "batch_size": batch_size}
    settings |= {"tokens_per_batch": tokens_per_batch, "endpoint": endpoint, "prompt": prompt}
    results = []
    for name, path in outputs.items():
        if len(model) > 1 and path.exists() and not overwrite:  # written by an earlier start of the same command
            typer.echo(f"{path} exists and is kept (--overwrite scores again)", err=True)
            continue
        teacher = load_teacher(name, kind, **settings, dtype=options.torch_dtype(dtype), device=state.device)
        counts = score_teacher(teacher, source, *stores, path, overwrite)
        results.append({"output": str(path), "teacher": teacher.name, **counts})
        del teacher  # two would not fit a GPU that one fills
    if state.is_main_process:
        _print_results(results, folder, as_json)


def _outputs(models: list[str], kind: str | None, output: Path, suffix: str) -> tuple[dict[str, Path], Path | None]:
    """Return teacher -> its file, and, if several are given, the folder of their files, which is made."""
    if len(models) == 1:
        return {models[0]: output}, None
    outputs = {}
    for name in models:
        short = Endpoint(name, kind).name if is_endpoint(name) else Path(name).name
        outputs[name] = output / f"{short}.{suffix}"
    if len(set(outputs.values())) < len(models):
        raise InputError(f"Two models would write the same file, as their last names are equal: {', '.join(models)}.")
    output.mkdir(exist_ok=True)
    return outputs, output


def _print_results(results: list[dict[str, Any]], folder: Path | None, as_json: bool) -> None:
    """Print the result of one teacher, or, with their folder, the results of all teachers."""
    if folder is not None and as_json:
        options.print_result({"output": str(folder), "teachers": results}, as_json)
        return
    for result in results:
        options.print_result(result, as_json)


def _endpoint_settings(
    models: list[str], concurrency: int | None, requests_per_minute: float | None, plan_only: bool
) -> EndpointSettings:
    """Return the settings that are given; an InputError if a teacher would not read them."""
    given = {"concurrency": concurrency, "requests_per_minute": requests_per_minute}
    given = {name: value for name, value in given.items() if value is not None}
    unread = [f"--{name.replace('_', '-')}" for name in given] + ["--plan-only"] * plan_only
    for name in models:
        if unread and not is_endpoint(name):
            raise InputError(f"{unread[0]} is for the address of an endpoint, and {name} is a model.")
    return EndpointSettings(**given)


def _prompt(is_chat: bool, template: Path | None, yes: str | None, no: str | None) -> Prompt | None:
    """Return the prompt that is given; what is not given is as usual for the model. None if nothing is given."""
    if template is None and yes is None and no is None:
        return None
    text = CHAT_TEMPLATE if is_chat else QWEN_TEMPLATE
    if template is not None:
        text = existing_file(template, "template").read_text(encoding="utf-8")
    return Prompt(text, yes or "yes", no or "no")


def queries(
    collection: options.Collection,
    output: options.Output,
    model: Annotated[
        str | None, typer.Option(help="Sequence-to-sequence or causal language model, or address of a chat endpoint.")
    ] = None,
    fallback: Annotated[str | None, typer.Option(help=f"Weak, without a model: {', '.join(FALLBACKS)}.")] = None,
    per_document: Annotated[int, typer.Option(min=1, help="Largest number of queries per document.")] = 3,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Number of documents, evenly spread; all if not given.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="File with the prompt: {document}, and {count} if wanted.")
    ] = None,
    round_trip: Annotated[
        int, typer.Option(min=0, help="Rank within which BM25 must find the document; 0 keeps all queries.")
    ] = 20,
    language: options.Language = None,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = None,
    concurrency: Concurrency = None,
    requests_per_minute: RequestsPerMinute = None,
    most_tokens: Annotated[
        int | None, typer.Option(help="Most tokens that an address may cost, as estimated.")
    ] = None,
    plan_only: PlanOnly = False,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Generate queries for documents, and judgments that name the document of each query.

    Beside the output it writes STEM.qrels.txt (the judgments) and STEM.json (the counts). The same command resumes an
    interrupted run.

    Example: hf-kd-ranking teacher queries --collection corpus.jsonl --fallback title --output generated.tsv
    """
    if (model is None) == (fallback is None):
        raise InputError("Give either --model or --fallback.")
    if fallback not in (None, *FALLBACKS):
        raise InputError(f"--fallback is one of {', '.join(FALLBACKS)}, got {fallback!r}.")
    check_model_paths([model or ""])
    settings = _endpoint_settings([model or fallback], concurrency, requests_per_minute, plan_only)
    prompt = template and QueryPrompt(existing_file(template, "template").read_text(encoding="utf-8"))
    state = processes()
    with state.main_process_first():  # one process builds the store, the others open it
        texts = TextStore.from_file(collection)
    options_of_model = {"dtype": options.torch_dtype(dtype), "device": state.device, "endpoint": settings}
    generator = load_generator(model or fallback, per_document, prompt, batch_size, **options_of_model)
    if plan_only or most_tokens is not None:
        plan = plan_queries(generator, texts, documents)
        if plan_only:
            return plan
        if plan["tokens"] > most_tokens:
            raise InputError(
                f"The {plan['documents']:,} documents may cost {plan['tokens']:,} tokens, more than --most-tokens "
                f"{most_tokens:,}; take fewer (--documents), or raise it."
            )
    search = BM25Index.build(texts, language=language).search if round_trip and state.is_main_process else None
    titles = read_titles(collection) if fallback else {}
    counts = generate_queries(generator, texts, output, titles, documents, search, round_trip, overwrite)
    return {"output": str(output), "is_weak": generator.is_weak, **counts} if state.is_main_process else None


def ensemble(
    scores: options.ScoreFiles,
    output: options.Output,
    method: Annotated[
        str, typer.Option(help=f"Method: {', '.join(METHODS)}; for orders {', '.join(ORDER_METHODS)}.")
    ] = "mean",
    weights: options.Weights = None,
    on_missing: Annotated[str, typer.Option(help="Treatment of missing pairs: error, average, drop.")] = "error",
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Average the scores of teachers (the paper's T2); rows and their order are those of the first file.

    Orders, such as the results of RankLLM and runs without meaningful scores, become scores: a run, or whole lists.

    Example: hf-kd-ranking teacher ensemble --scores scores.tsv other.tsv --method standardized --output t2.tsv
    """
    if method in ORDER_METHODS:
        if on_missing != "error":
            raise InputError(f"--on-missing is for scores; {method} takes orders of different documents as they are.")
        counts = combine_orders(scores, output, method, weights, overwrite)
    else:
        counts = ensemble_teachers(scores, output, method, weights, on_missing, overwrite)
    return {"output": str(output), **counts}


def expand(
    scores: options.Scores,
    collection: options.Collection,
    queries: options.Queries,
    output: options.Output,
    on_missing: Annotated[str, typer.Option(help="Treatment of unknown ids: error, or skip the row.")] = "error",
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Replace the ids of teacher rows by their texts.

    Example: hf-kd-ranking teacher expand --scores scores.tsv --queries queries.tsv --collection collection.tsv
    --output texts.tsv
    """
    stores = TextStore.from_file(collection), TextStore.from_file(queries)
    counts = expand_ids(scores, *stores, output, on_missing, overwrite)
    return {"output": str(output), **counts}


def diagnose(
    scores: options.ScoreFiles,
    queries: options.Queries = None,
    collection: options.Collection = None,
    examples: Annotated[int, typer.Option(min=0, help="Number of rows and queries to show.")] = 10,
) -> options.Result:
    """Find what would spoil training: squashed or constant scores, false negatives, teachers that disagree.

    Example: hf-kd-ranking teacher diagnose --scores scores.tsv other.tsv --queries queries.tsv --collection
    collection.tsv
    """
    stores = (path and TextStore.from_file(path) for path in (queries, collection))
    diagnosis = diagnose_teachers(scores, *stores, examples=examples)
    return diagnosis, diagnosis_text(diagnosis)


def triples(
    candidates: Annotated[list[Path], typer.Option(help="TREC runs that negatives are drawn from.")],
    qrels: Annotated[Path, typer.Option(help="TREC qrels that positives are drawn from.")],
    output: options.Output,
    shares: Annotated[list[float] | None, typer.Option(help="Share of each run of candidates; they sum to 1.")] = None,
    per_query: Annotated[int, typer.Option(min=1, help="Number of rows per query.")] = 1,
    documents: Annotated[int, typer.Option(min=2, help="Number of documents per row, the positive included.")] = 2,
    sampling: Annotated[str, typer.Option(help=f"Choice of negatives: {', '.join(SAMPLINGS)}.")] = "random",
    minimum_grade: Annotated[int, typer.Option(help="Lowest grade of a positive.")] = 1,
    ranks: Annotated[tuple[int, int] | None, typer.Option(help="First and last rank of negatives.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Teacher's run: filters negatives, scores the rows.")] = None,
    margin: Annotated[float, typer.Option(help="Least margin of a positive over its negatives.")] = 0.0,
    relative_margin: Annotated[
        float | None,
        typer.Option(
            help=f"Highest score of a negative as a share of its positive's [with scores: {RELATIVE_MARGIN}]."
        ),
    ] = None,
    collection: Annotated[Path | None, typer.Option(help="Documents, to leave out copies of positives.")] = None,
    exclude_same_id: options.ExcludeSameId = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 42,
    overwrite: options.Overwrite = False,
) -> options.Result:
    """Sample triples or longer lists from your own collection: a positive and negatives per row.

    They are to be scored by a teacher, or have the scores of `--scores`.

    Example: hf-kd-ranking teacher triples --candidates bm25.trec --qrels qrels.txt --per-query 20 --output sampled.tsv
    """
    refuse_existing(output, overwrite)
    check_format(output, has_scores=scores is not None, are_pairs=documents == 2)
    runs, judgments = list(map(read_run, candidates)), read_qrels(qrels)
    run = runs[0]
    if len(runs) > 1 or shares is not None:
        run = mix_runs(runs, shares or [1 / len(runs)] * len(runs))
    if exclude_same_id:
        run = run.without_same_ids()
    teacher = scores and read_run(scores)
    texts = collection and TextStore.from_file(collection)
    if texts is not None and texts.aggregation is not None:
        if teacher is None:
            raise InputError(
                "For a collection of passages, give --scores: the teacher's run says which passage is best."
            )
        run, judgments = choose_passages(run, teacher, judgments, texts)
        teacher = Run((query_id, list(best_passages(ranking).values())) for query_id, ranking in teacher.items())
    left_out: Counter[str] = Counter()
    sample = sample_triples(
        run,
        judgments,
        per_query,
        teacher,
        texts,
        left_out,
        minimum_grade=minimum_grade,
        ranks=ranks,
        documents=documents,
        sampling=sampling,
        teacher_margin=margin,
        relative_margin=relative_margin,
        seed=seed,
    )
    write_teacher_scores(sample, output)
    counts = {"rows": len(sample), "queries": len(sample.rows.unique("query_id")), **left_out}
    return {"output": str(output), **counts}


def push(
    scores: options.Scores,
    push_to: Annotated[str, typer.Option(help="Data set on the Hub, owner/name.")],
    teacher: Annotated[list[str], typer.Option(help="Models that made the scores, for the card.")],
    texts: Annotated[str, typer.Option(help="Data set that the ids belong to, for the card.")],
    license: Annotated[str, typer.Option(help="License, as the Hub spells it.")] = "other",
    private: options.Private = False,
    overwrite: Annotated[bool, typer.Option(help="Commit onto a data set that exists.")] = False,
) -> options.Result:
    """Publish teacher rows as a Parquet data set with a card.

    Example: hf-kd-ranking teacher push --scores scores.tsv --push-to me/scores --teacher BAAI/bge-reranker-base
    --texts me/collection
    """
    check_name(push_to)
    rows = load_teacher_scores(scores)
    rows.check_scores()
    with tempfile.TemporaryDirectory() as folder:
        write_teacher_scores(rows, Path(folder) / FILE)
        write_dataset_card(folder, push_to, len(rows), teacher, texts, license)
        files = files_to_publish(Path(folder))
        address = upload(files, push_to, "dataset", "Upload teacher scores by hf_kd_ranking", private, overwrite)
    return {"rows": len(rows), "address": address}


app = make_app("Teacher scores: make, average, inspect, expand, publish; generated queries.")
for verb in (score, ensemble, expand, diagnose, triples, queries, push):
    add_verb(app, verb)
