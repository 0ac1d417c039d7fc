"""The demo up to the students: collection, BM25 candidates, triples, teachers, their scores. Each stage is kept.

Every file has the format of the published ones, so that what follows is the main job on files: a stage whose output is
there is not run again, and an interrupted training goes on from its last checkpoint.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.formats import writing
from ..data.texts import TextStore
from ..data.trec import Run, read_qrels, read_run, write_qrels, write_run
from ..data.triples import sample_triples
from ..ranker import Ranker
from ..retrieval.bm25 import BM25Index
from ..teachers.adapters import Teacher, fingerprint
from ..teachers.ensemble import ensemble_teachers
from ..teachers.score import score_teacher
from ..training.arguments import RankingTrainingArguments
from ..training.job import TrainingJob, train_ranker
from .backbone import find_backbone
from .pydocs import SPLITS, build_pydocs

logger = logging.getLogger(__name__)

TRIPLES = 800  # sizes are chosen for the time: under 15 minutes on 2 cores in float32
CANDIDATES = 20
QUERIES = {"train": TRIPLES, "dev": 120, "test": 320}
QUERY_TOKENS, DOCUMENT_TOKENS = 20, 48
MEASURE = "RR@10"
SEED = 42


@dataclass(frozen=True)
class Inputs:
    """The files that teachers and students share."""

    output: Path
    collection: Path
    queries: Path
    labels: Path
    stats: dict

    def candidates(self, split: str) -> Path:
        """BM25's candidates of a split, a TREC run."""
        return self.output / f"candidates.{split}.trec"

    def qrels(self, split: str) -> Path:
        """The judgments of a split's queries that have candidates."""
        return self.output / f"qrels.{split}.txt"


def prepare(output: Path) -> Inputs:
    """Build the collection, BM25's candidates of every split, and the training triples with their labels as scores."""
    docs = build_pydocs(output / "collection")
    _check_same(output / "settings.json", {"collection": docs.stats, "queries": QUERIES, "candidates": CANDIDATES})
    inputs = Inputs(output, docs.collection, output / "queries.tsv", output / "labels.tsv", docs.stats)
    if not inputs.queries.is_file():
        with writing(inputs.queries) as file:
            file.writelines(docs.queries[split].read_text(encoding="utf-8") for split in SPLITS)
    queries = {split: dict(TextStore.from_tsv(docs.queries[split]).items()) for split in SPLITS}
    if not all(inputs.candidates(split).is_file() for split in SPLITS):
        index = BM25Index.build(TextStore.from_tsv(inputs.collection))
        for split in SPLITS:
            qrels = read_qrels(docs.qrels[split])
            run = _with_positive(index.search(queries[split], CANDIDATES), qrels)
            run = Run({query_id: run[query_id] for query_id in list(run)[: QUERIES[split]]})
            write_qrels({query_id: qrels[query_id] for query_id in run}, inputs.qrels(split))
            write_run(run, inputs.candidates(split), tag="BM25")
    if not inputs.labels.is_file():
        triples = sample_triples(read_run(inputs.candidates("train")), read_qrels(inputs.qrels("train")), seed=SEED)
        with writing(inputs.labels) as file:
            file.writelines(f"1\t0\t{row['query_id']}\t{row['pos_id']}\t{row['neg_id']}\n" for row in triples)
    return inputs


def _check_same(path: Path, settings: dict) -> None:
    """Refuse to go on in a folder whose stages were made from other packages or other numbers."""
    if not path.is_file():
        with writing(path) as file:
            json.dump(settings, file)
    elif json.loads(path.read_text(encoding="utf-8")) != settings:
        raise ValueError(
            f"{path.parent} was made from other packages or by another version of the demo; give another --output, or "
            "remove the folder."
        )


def _with_positive(run: Run, qrels: dict[str, dict[str, int]]) -> Run:
    """Queries whose positive is among the candidates: re-ranking cannot help the others."""
    return Run(
        {
            query_id: ranking
            for query_id, ranking in run.items()
            if any(doc_id in qrels[query_id] for doc_id, _ in ranking)
        }
    )


def training(
    inputs: Inputs, name: str, job: dict, loss: str, learning_rate: float, epochs: int, seed: int, **settings: object
) -> tuple[TrainingJob, RankingTrainingArguments]:
    """A training of the demo, evaluated on the development split, resumable, in a folder of its own."""
    job = TrainingJob(
        model_name=find_backbone(),
        max_query_length=QUERY_TOKENS,
        max_document_length=DOCUMENT_TOKENS,
        collection=str(inputs.collection),
        queries=str(inputs.queries),
        candidates=str(inputs.candidates("dev")),
        qrels=str(inputs.qrels("dev")),
        measures=[MEASURE, "nDCG@10"],
        **job,
    )
    args = RankingTrainingArguments(
        output_dir=str(inputs.output / "runs" / name),
        loss=loss,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        seed=seed,
        weight_decay=0.01,
        warmup_steps=0.1,
        logging_steps=10,
        save_strategy="epoch",
        save_total_limit=1,
        resume_from_checkpoint="true",
        dataloader_pin_memory=torch.cuda.is_available(),  # it warns where there is nothing to pin for
        data_name="PyDocs, docstrings of installed Python packages",
        **settings,
    )
    return job, args


def run_once(job: TrainingJob, args: RankingTrainingArguments) -> dict:
    """Run a job, or read what it gave when it ran before."""
    results = Path(args.output_dir) / "results.json"
    if results.is_file():
        logger.info("%s is done", args.output_dir)
        return json.loads(results.read_text(encoding="utf-8"))
    return train_ranker(job, args)


def train_teacher(inputs: Inputs) -> dict:
    """BERT_CAT on the labels (RankNet), all six layers; its settings are fixed."""
    job, args = training(
        inputs,
        "teacher",
        {"architecture": "bert_cat", "teacher_scores": str(inputs.labels)},
        loss="ranknet",
        learning_rate=2e-4,
        head_learning_rate=1e-3,
        epochs=2,
        seed=SEED,
        teacher_name="the labels of the triples",
    )
    return run_once(job, args)


def teachers(inputs: Inputs) -> dict[str, Ranker]:
    """The two teachers: the trained BERT_CAT, and the backbone itself as a bi-encoder, which is not trained here."""
    lengths = {"max_query_length": QUERY_TOKENS, "max_document_length": DOCUMENT_TOKENS}
    return {
        "T1": Ranker.from_pretrained(inputs.output / "runs" / "teacher"),
        "MiniLM": Ranker.from_pretrained(find_backbone(), "bert_dot", pooling="mean", **lengths),
    }


def score_triples(inputs: Inputs) -> dict[str, Path]:
    """Teacher scores of the triples: T1 (BERT_CAT alone) and T2 (its mean with the second teacher).

    The scales of the two differ, so that T2 averages standardised scores.
    """
    files = {name: inputs.output / f"scores.{name}.tsv" for name in ("T1", "MiniLM", "T2")}
    queries, documents = TextStore.from_tsv(inputs.queries), TextStore.from_tsv(inputs.collection)
    for name, ranker in teachers(inputs).items():
        if not files[name].is_file():
            teacher = Teacher(name, ranker.score, fingerprint(ranker.model))
            score_teacher(teacher, inputs.labels, queries, documents, files[name])
    if not files["T2"].is_file():
        ensemble_teachers([files["T1"], files["MiniLM"]], files["T2"], method="standardized")
    return {name: files[name] for name in ("T1", "T2")}
