"""What is distilled: the options of `distill`, and the checks before anything runs."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.texts import TextStore
from ..data.trec import read_qrels
from ..hub.manifest import digest
from ..models import ARCHITECTURES

SPLITS = ("train", "dev", "test")
LEAST_QUERIES = {"train": 8, "dev": 2, "test": 2}
# Where the encoder is long trained for mean pooling the user says so; these are the paper's choices, made small.
CONFIGS: dict[str, dict[str, Any]] = {"colbert": {"compression_dim": 128}}


@dataclass
class DistillJob:
    """A collection, a teacher and what is wanted of the ranker.

    Args:
        collection: documents, `id<TAB>text`, JSONL or a text store.
        queries: likewise.
        output: folder of all stages.
        teachers: one or several, see `load_teacher`; of several the students learn the standardised mean.
        qrels: judgments. Without them a query's positives are the teacher's best candidates, and rankers are measured
            by how well they agree with the teacher on held-out queries.
        model_name: the students' encoder.
        architectures: to train.
        budget_ms: the longest that a query may take against `candidates` passages; None takes the best ranker.
        candidates: of BM25, a query.
        triples_per_query: that are sampled.
        held_out: share of the queries for choosing (half of it) and for the final test (the other half).
        measure: that decides, in ir_measures' notation.
        learning_rates: tried on the queries for choosing, the same for every condition.
        epochs: of each training.
        seeds: trainings of each chosen student; the report shows their means.
        layers: the encoder's layers that students keep; None keeps all.
        configs: architecture -> fields of its config.
        force: go on though the teacher ranks worse than BM25.
    """

    collection: str
    queries: str
    output: str
    teachers: list[str]
    qrels: str | None = None
    model_name: str = "distilbert/distilbert-base-uncased"
    architectures: list[str] = field(default_factory=lambda: ["bert_dot", "colbert"])
    budget_ms: float | None = None
    candidates: int = 100
    triples_per_query: int = 8
    held_out: float = 0.2
    measure: str = "nDCG@10"
    learning_rates: list[float] = field(default_factory=lambda: [2e-5, 7e-5])
    epochs: float = 1
    seeds: int = 1
    batch_size: int = 32
    max_query_length: int = 30
    max_document_length: int = 200
    layers: list[int] | None = None
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    force: bool = False

    def check(self) -> dict[str, list[str]]:
        """Refuse what cannot work, and split the queries: by a digest of their ids, so that each stays where it is.

        Returns:
            "train", "dev" and "test" -> query ids, in their order; where there are judgments, those that have one.

        Raises:
            ValueError, FileNotFoundError: naming what is wrong.
        """
        if unknown := [name for name in self.architectures if name not in ARCHITECTURES]:
            raise ValueError(f"Unknown architectures {', '.join(unknown)}; there are {', '.join(ARCHITECTURES)}.")
        if not self.teachers or not self.architectures:
            raise ValueError("Distilling needs at least one teacher and one architecture.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share of the queries between 0 and 1, got {self.held_out}.")
        ids = [str(query_id) for query_id, _ in TextStore.from_file(self.queries).items()]
        if self.qrels is not None:
            qrels = read_qrels(self.qrels)
            ids = [query_id for query_id in ids if any(grade > 0 for grade in qrels.get(query_id, {}).values())]
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for query_id in ids:
            splits[_split_of(query_id, self.held_out)].append(query_id)
        if short := [split for split, least in LEAST_QUERIES.items() if len(splits[split]) < least]:
            counts = ", ".join(
                f"{split} {len(found)} (needed {LEAST_QUERIES[split]})" for split, found in splits.items()
            )
            raise ValueError(
                f"Too few queries{' with a relevant document' if self.qrels else ''} for {' and '.join(short)}: "
                f"{counts}; add queries, or change --held-out."
            )
        return splits

    def inputs(self, *names: str) -> dict[str, Any]:
        """Some of the options, files and local models by their digests: what a stage depends on."""
        found = {name: value for name, value in asdict(self).items() if name in names}
        for name in found.keys() & {"collection", "queries", "qrels", "model_name"}:
            found[name] = found[name] and digest_of(found[name])
        if "teachers" in found:
            found["teachers"] = [digest_of(teacher) for teacher in found["teachers"]]
        return found


def digest_of(path: str) -> str:
    """A file's sha256; a folder's, of the names and digests in it; a name on the Hub is itself."""
    if not Path(path).exists():
        return path
    if Path(path).is_file():
        return digest(path)
    listing = {str(part.relative_to(path)): digest(part) for part in sorted(Path(path).rglob("*")) if part.is_file()}
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _split_of(query_id: str, held_out: float) -> str:
    share = int.from_bytes(hashlib.sha256(query_id.encode()).digest()[:8]) / 2**64
    return "test" if share < held_out / 2 else "dev" if share < held_out else "train"
