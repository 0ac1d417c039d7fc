"""Compare recipes of distillation at equal compute: which documents a list has, and by which loss a student learns.

    python examples/benchmarks/recipes_data.py FOLDER --scifact DIR
    python examples/benchmarks/recipes.py FOLDER [--part losses|pydocs|scifact|orders] [--table]

Every training has 75 steps of 64 documents, unless its name says otherwise. A run appends a line to
FOLDER/results.jsonl, and is skipped if its line is there; `--table` makes the table from it, with paired t-tests
against `margin_mse` on random lists. Choose by the validation queries (split dev). Two hours on one CPU core.
`--part pydocs` and `--part scifact` train the best recipes of that comparison with three seeds, and measure them on
the test queries; `--part orders` compares losses that read only the order of the teacher's documents with Margin-MSE.
"""

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from recipes_data import DOCUMENTS_PER_STEP, TRAINING  # beside this script
from transformers import set_seed

import hf_kd_ranking as kd
from hf_kd_ranking.demo.backbone import find_backbone
from hf_kd_ranking.evaluation.metrics import evaluate_queries
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.evaluation.significance import paired_t_test
from hf_kd_ranking.ranker import load_tokenizer

RERANKED = 20
LAYERS_MARGIN = 1.5  # root mean square of the teacher's margins for the scores of a fresh layer
MEASURES = {"pydocs": "RR@10", "scifact": "nDCG@10"}
LENGTHS = {
    "pydocs": {"max_query_length": 20, "max_document_length": 48},
    "scifact": {"max_query_length": 32, "max_document_length": 96},
}
STUDENTS = {
    "bert_dot": {"layers": [0, 1, 5], "pooling": "mean"},
    "colbert": {"layers": [0, 1, 5], "compression_dim": 128},
    "bert_cat": {},  # rankers that read both texts at once learn little with fewer than all six layers
    "prettr": {"join_layer_idx": 1},
}
DUAL = "margin_mse:1,in_batch_margin_mse:1"
MIXED = "margin_mse:0.1,in_batch_kl_div:1"
# The best recipes on validation queries, and their control. A joint ranker does not learn from all pairs of a batch:
# it would read each of them.
BEST = (
    ("margin_mse", "random"),
    ("in_batch_kl_div", "random"),
    ("in_batch_kl_div", "stratified"),
    (MIXED, "random"),
)
BEST_OF_JOINT = (
    ("margin_mse", "random"),
    ("margin_mse", "stratified"),
    ("margin_mse", "top"),
    ("kl_div", "stratified"),
)
ORDERS = ("margin_mse", "order_ranknet", "list_mle", "adr_mse")


@dataclass(frozen=True)
class Recipe:
    """One run: everything that its result depends on."""

    architecture: str  # `teacher` measures the teacher
    sampling: str = "random"
    loss: str = "margin_mse"  # `mse_level` is `mse` of scores moved to the student's level; `none` does not train
    data: str = "pydocs"
    teacher: str = "bi_encoder"
    documents: int = 4  # per list
    queries: int = 1_200
    epochs: int = 1
    learning_rate: float = 1.5e-4
    seed: int = 0
    split: str = "dev"

    @property
    def name(self) -> str:
        """Name in tables, without the architecture and the seed."""
        text = f"{self.loss} / {self.sampling}"
        for field, value in asdict(self).items():
            if field not in ("architecture", "sampling", "loss", "seed") and value != getattr(Recipe, field):
                text += f", {field} {value}"
        return text


def plan() -> Iterator[Recipe]:
    """Yield all runs in their order."""
    dot, colbert, cat = Recipe("bert_dot"), Recipe("colbert"), Recipe("bert_cat", learning_rate=2e-4)
    # 1. Losses and samplings, with the bi-encoder
    yield Recipe("teacher")
    for student in (dot, colbert):
        for loss in ("none", "ranknet", "mse_level", MIXED):
            yield replace(student, loss=loss)
        for loss in ("margin_mse", "kl_div", DUAL, "in_batch_kl_div"):
            for sampling in ("random", "stratified", "top"):
                yield replace(student, loss=loss, sampling=sampling)
    # 2. With the cross-encoders, which cannot score a whole batch
    yield Recipe("teacher", teacher="cross_encoders")
    for student in (dot, colbert, cat):
        for loss in ("ranknet", "margin_mse", "kl_div"):
            for sampling in ("random", "stratified"):
                yield replace(student, loss=loss, sampling=sampling, teacher="cross_encoders")
    # 3. The best loss: length of the lists, learning rate, steps, another collection, seeds
    for student in (dot, colbert):
        best = replace(student, loss="in_batch_kl_div")
        for documents in (2, 8):
            yield replace(best, documents=documents, queries=4_800 // documents)
        yield replace(best, learning_rate=3e-4)
        yield replace(best, epochs=2)
        for loss in ("none", "margin_mse", "in_batch_kl_div"):
            yield replace(student, loss=loss, data="scifact")
        for seed, split in product(range(3), ("dev", "test")):
            for loss in ("margin_mse", "ranknet", "in_batch_kl_div"):
                yield replace(student, loss=loss, seed=seed, split=split)


def plan_orders() -> Iterator[Recipe]:
    """Yield losses that read only the order of the teacher's documents, and Margin-MSE, with three seeds."""
    for seed, loss in product(range(3), ORDERS):
        yield Recipe("bert_dot", "stratified", loss, seed=seed, split="test")


def plan_seeds(data: str) -> Iterator[Recipe]:
    """Yield the best recipes of one collection with three seeds, on its test queries."""
    for seed, architecture, (loss, sampling) in product(range(3), ("bert_dot", "colbert"), BEST):
        yield Recipe(architecture, sampling, loss, data=data, seed=seed, split="test")
    for seed, (loss, sampling) in product(range(3), BEST_OF_JOINT):
        yield Recipe("prettr", sampling, loss, data=data, learning_rate=2e-4, seed=seed, split="test")


class Data:
    """A collection with candidates and teachers, as `recipes_data.py` leaves it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measure = MEASURES[folder.name]
        self.lengths = LENGTHS[folder.name]
        self.splits = {}
        for split in ("train", "dev", "test"):
            self.splits[split] = kd.load_collection(str(folder / "collection"), split)
        self.queries, self.documents = self.splits["train"].queries, self.splits["train"].documents

    def bi_encoder(self) -> kd.Ranker:
        """Return all-MiniLM-L6-v2 as it is."""
        return in_bfloat16(kd.Ranker.from_pretrained(find_backbone(), **self.lengths))

    def rows(self, recipe: Recipe) -> list[dict]:
        """Return the first full lists that a recipe asks for: the positive, and sampled candidates."""
        teacher, qrels = kd.read_run(self.folder / f"{recipe.teacher}.train.trec"), self.splits["train"].qrels
        options = {"documents": recipe.documents, "sampling": recipe.sampling, "seed": recipe.seed}
        rows = kd.sample_triples(teacher, qrels, teacher=teacher, texts=self.documents, **options).rows
        return [row for row in rows if len(row["doc_ids"]) == recipe.documents][: recipe.queries]


def in_bfloat16(ranker: kd.Ranker) -> kd.Ranker:
    """Let a ranker compute in bfloat16, as training does."""
    ranker.model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(ranker.model, evaluation_mode=True)
    return ranker


def load_student(recipe: Recipe, data: Data) -> kd.Ranker:
    """Return a ranker before its training."""
    set_seed(recipe.seed)
    model = kd.load_ranker(find_backbone(), recipe.architecture, **data.lengths, **STUDENTS[recipe.architecture])
    return kd.Ranker(model, load_tokenizer(find_backbone()))


def margin_size(scores: np.ndarray) -> float:
    """Return the root mean square of the positives' margins, (B, n)."""
    return float(np.square(scores[:, :1] - scores[:, 1:]).mean()) ** 0.5


def move_to_level(rows: list[dict], ranker: kd.Ranker, data: Data) -> None:
    """Give the teacher's scores the mean, and its margins the size, of an untrained student's on the first rows."""
    teacher = np.array([row["teacher_scores"] for row in rows])
    query_ids = [row["query_id"] for row in rows[:128] for _ in row["doc_ids"]]
    doc_ids = [doc_id for row in rows[:128] for doc_id in row["doc_ids"]]
    student = ranker.score(data.queries[query_ids], data.documents[doc_ids]).reshape(-1, teacher.shape[1])
    moved = (teacher - teacher.mean()) * margin_size(student) / margin_size(teacher) + student.mean()
    for row, scores in zip(rows, moved, strict=True):
        row["teacher_scores"] = scores.tolist()


def train(recipe: Recipe, rows: list[dict], data: Data) -> kd.Ranker:
    """Train a student on lists."""
    ranker = load_student(recipe, data)
    scale = "match"
    if recipe.loss == "mse_level":
        move_to_level(rows, ranker, data)
    if recipe.loss in ("mse_level", "ranknet", *ORDERS[1:]):
        scale = "1"
    elif recipe.architecture in ("bert_cat", "prettr"):
        scale = str(LAYERS_MARGIN / margin_size(np.array([row["teacher_scores"] for row in rows])))
    args = kd.RankingTrainingArguments(
        str(data.folder / "training"),
        loss=recipe.loss.removesuffix("_level"),
        teacher_scale=scale,
        learning_rate=recipe.learning_rate,
        head_learning_rate=None if recipe.architecture == "bert_dot" else 1e-3,
        max_steps=recipe.queries * recipe.documents * recipe.epochs // DOCUMENTS_PER_STEP,
        per_device_train_batch_size=DOCUMENTS_PER_STEP // recipe.documents,
        seed=recipe.seed,
        **TRAINING,
    )
    trainer = kd.RankingTrainer(
        ranker.model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        queries=data.queries,
        documents=data.documents,
        processing_class=ranker.tokenizer,
        in_batch_teacher=data.bi_encoder() if "in_batch" in recipe.loss else None,
    )
    trainer.train()
    if trainer.termination.is_asked:
        raise SystemExit("Stopped; the same command resumes.")
    return trainer.ranker


def trained_student(recipe: Recipe, data: Data) -> kd.Ranker:
    """Train a student, or open it: one training is measured on validation and on test queries."""
    if recipe.loss == "none":
        return in_bfloat16(load_student(recipe, data))
    folder = data.folder / "students" / f"{zlib.crc32(repr(replace(recipe, split='')).encode()):08x}"
    if not (folder / "config.json").is_file():
        train(recipe, data.rows(recipe), data).save_pretrained(folder)
    return in_bfloat16(kd.Ranker.from_pretrained(folder))


def run(recipe: Recipe, data: Data) -> dict:
    """Train and measure: the mean value, the value of each query, and the seconds of training."""
    start, seconds = time.perf_counter(), 0.0
    if recipe.architecture == "teacher":
        ranking = kd.read_run(data.folder / f"{recipe.teacher}.{recipe.split}.trec")
    else:
        ranker, collection = trained_student(recipe, data), data.splits[recipe.split]
        seconds = time.perf_counter() - start
        candidates = kd.read_run(data.folder / f"candidates.{recipe.split}.trec").top(RERANKED)
        ranking = rerank_run(ranker, candidates, collection.queries, collection.documents)
    qrels = {query_id: data.splits[recipe.split].qrels[query_id] for query_id in ranking}
    by_query = evaluate_queries(ranking, qrels, [data.measure])[data.measure]
    return {"recipe": asdict(recipe), "value": fmean(by_query.values()), "seconds": seconds, "by_query": by_query}


def read_results(path: Path) -> dict[Recipe, dict]:
    """Read what is done."""
    done = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            done[Recipe(**result.pop("recipe"))] = result
    return done


def make_table(done: Mapping[Recipe, dict]) -> str:
    """Return the runs as a Markdown table; those that differ only in the seed are one row."""
    groups, means = {}, {}
    for recipe, result in done.items():
        groups.setdefault(replace(recipe, seed=0), []).append(result)
    for recipe, group in groups.items():
        means[recipe] = {}
        for query_id in group[0]["by_query"]:
            means[recipe][query_id] = fmean(result["by_query"][query_id] for result in group)
    lines = ["| architecture | recipe | value | seeds | seconds | difference | p |", "| --- " * 7 + "|"]
    for recipe, by_query in sorted(means.items(), key=lambda item: (item[0].architecture, item[0].name)):
        seconds = fmean(result["seconds"] for result in groups[recipe])
        cells = [recipe.architecture, recipe.name, f"{fmean(by_query.values()):.4f}", str(len(groups[recipe]))]
        cells += [f"{seconds:.0f}", "", ""]
        control = Recipe(recipe.architecture, data=recipe.data, split=recipe.split)
        if recipe.architecture in ("bert_cat", "prettr"):
            control = replace(control, teacher=recipe.teacher, learning_rate=recipe.learning_rate)
        if control in means and control != recipe:
            test = paired_t_test(by_query, means[control])
            cells[-2:] = [f"{test['difference']:+.4f}", f"{test['p_value']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not done, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=("losses", "pydocs", "scifact", "orders"), default="losses")
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path, loaded = args.folder / "results.jsonl", {}
    recipes = plan()
    if args.part == "orders":
        recipes = plan_orders()
    elif args.part != "losses":
        recipes = plan_seeds(args.part)
    for recipe in () if args.table else recipes:
        if recipe not in read_results(path):
            if recipe.data not in loaded:
                loaded[recipe.data] = Data(args.folder / recipe.data)
            result = run(recipe, loaded[recipe.data])
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print(make_table(read_results(path)))


if __name__ == "__main__":
    main()
