"""Generated queries of a distillation: what `distill` learns from where there are documents and no queries."""

from dataclasses import replace
from pathlib import Path

from ..artifacts import existing_file, read_json, writing
from ..data.texts import TextStore, read_titles
from ..errors import InputError
from ..processes import processes
from ..ranker import check_model_paths
from ..retrieval.bm25 import BM25Index
from ..teachers.endpoint import is_endpoint
from ..teachers.generators import FIRST_SENTENCE, load_generator
from ..teachers.queries import files_beside, generate_queries
from .job import DistillJob
from .queries import read_judgments
from .work import inputs_digest


def with_queries(job: DistillJob, is_plan: bool = False) -> DistillJob:
    """Return a job with its generated queries and their judgments, which are made unless they are there.

    A job that brings its training queries is returned as it is. Queries that the dev and test judgments name stay; all
    others of the job's file are not read. A plan that would need a model's work is an InputError.
    """
    if job.queries is not None and job.query_generator is None:
        return job
    if job.query_generator is None and (job.qrels is not None or job.scores):
        raise InputError("Give --queries: --qrels and --scores name queries whose texts are needed.")
    job = replace(job, query_generator=job.query_generator or FIRST_SENTENCE)
    job.check()
    if job.qrels is not None or job.scores:
        raise InputError(
            "Generated queries have judgments of their own and no scores: leave out --qrels and --scores; --dev-qrels "
            "and --test-qrels are what is measured on."
        )
    check_model_paths([job.query_generator])
    generated = Path(job.query_generator)
    if generated.suffix != ".tsv" or is_endpoint(job.query_generator):
        generated = _generate(job, is_plan)
    qrels, _ = files_beside(existing_file(generated, "generated queries"))
    existing_file(qrels, "judgments of generated queries")
    queries = generated if job.queries is None else _join(generated, job)
    return replace(job, queries=str(queries), qrels=str(qrels))


def describe(job: DistillJob) -> str:
    """Return in words what wrote the queries of a job, given its judgments as `with_queries` returns them."""
    path = Path(job.qrels).with_name(Path(job.qrels).name.replace(".qrels.txt", ".json"))
    description = read_json(path, what="description of generated queries")
    if description["is_weak"]:
        return f"{description['generator']}, weak"
    return description["generator"]


def _generate(job: DistillJob, is_plan: bool) -> Path:
    """Return the file of the generated queries, in a folder that is named by what they are made from."""
    state = processes()
    with state.main_process_first():  # one process builds the store, the others open it
        documents = TextStore.from_file(job.collection)
    device = job.device or state.device
    generator = load_generator(job.query_generator, job.queries_per_document, device=device)
    made_from = [generator.fingerprint, documents.fingerprint(), job.query_documents, job.k, job.language]
    path = Path(job.output, "queries", inputs_digest(made_from)[:16], "queries.tsv")
    if path.is_file():
        return path
    if is_plan and not generator.is_weak:
        raise InputError(
            f"A plan needs the queries, which {generator.name} has not written; make them by `teacher queries`, and "
            "give that output as --query-generator."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    search = BM25Index.build(documents, language=job.language).search if state.is_main_process else None
    titles = read_titles(job.collection) if generator.is_weak else {}
    generate_queries(generator, documents, path, titles, job.query_documents, search, job.k)
    return path


def _join(generated: Path, job: DistillJob) -> Path:
    """Write the generated queries and those that are measured on into one file."""
    path, state = Path(job.output, "queries", "all.tsv"), processes()
    measured = set().union(*(read_judgments(job)[split] for split in ("dev", "test")))
    with state.main_process_first():
        written, given = TextStore.from_file(generated), TextStore.from_file(job.queries)
    known = {query_id: text for query_id, text in given.items() if query_id in measured}
    if not known:
        raise InputError(f"None of the queries of --dev-qrels and --test-qrels has a text in {job.queries}.")
    for query_id in known:
        if query_id in written:
            raise InputError(f"The id {query_id!r} is one of {job.queries} and of a generated query; rename it.")
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as file:
            for texts in (written.items(), known.items()):
                file.writelines(f"{query_id}\t{' '.join(text.split())}\n" for query_id, text in texts)
    state.wait_for_everyone()
    return path
