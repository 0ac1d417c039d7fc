"""Measure time to the first batch and memory of training on many rows: N random triples x M short passages.

    python examples/benchmarks/train_memory.py FOLDER [--rows 4000000] [--passages 1000000] [--workers 4] [--steps 20]

Builds the data once in FOLDER, at a quarter of the size and in full (ids are shuffled integers, not row numbers), then
trains a tiny random BERT_DOT on each in a process of its own. Reported per size: seconds from the end of the imports
until the first batch reaches the model, of which `check_seconds` are the look-up of every row (`_cpu`: the main
process's own processor time, for a machine that does other work beside); anonymous memory in MB beyond what the
process had with imports and model loaded, at the last step: `main_mb` (RssAnon) and `all_mb` (Pss_Anon of the main
process and its workers, so that a page that forks share counts once). Mapped files are cache and do not count.
`at_40m` extends all linearly to 40M rows x 8.8M passages. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

import hf_kd_ranking as kd
from hf_kd_ranking.training import checks

TARGET_ROWS = 40_000_000
WORDS = np.array([f"w{i}" for i in range(1000)])


def main() -> None:
    """Measure at a quarter and at the whole size, and extrapolate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    figures = {}
    for name, share in (("quarter", 4), ("full", 1)):
        rows, passages = args.rows // share, args.passages // share
        folder = args.folder / f"{rows}x{passages}"
        build(folder, rows, passages)
        options = ["--workers", str(args.workers), "--steps", str(args.steps), "--measure"]
        options += ["--rows", str(rows), "--passages", str(passages)]
        for _ in range(2):  # the first run warms the page cache
            result = subprocess.run([sys.executable, __file__, str(folder), *options], capture_output=True, text=True)
            if result.returncode:
                sys.exit(result.stderr)
        figures[name] = json.loads(result.stdout.splitlines()[-1])
        print(name, figures[name], flush=True)
    quarter, full = figures["quarter"], figures["full"]
    factor = (TARGET_ROWS - full["rows"]) / (full["rows"] - quarter["rows"])
    names = ("first_batch_seconds", "first_batch_cpu", "check_seconds", "check_cpu", "main_mb", "all_mb")
    figures["at_40m"] = {name: round(full[name] + factor * (full[name] - quarter[name]), 1) for name in names}
    print(json.dumps(figures))


# ---- Data -----------------------------------------------------------------------------------------------------------


def build(folder: Path, rows: int, passages: int) -> None:
    """Write a collection, queries and teacher scores of random words, unless they exist."""
    if (folder / "scores.tsv").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng, queries = np.random.default_rng(0), passages // 10
    ids = rng.permutation(2 * passages)[:passages]
    for name, count, length in (("collection", passages, 30), ("queries", queries, 6)):
        with (folder / f"{name}.tsv").open("w") as file:
            for start in range(0, count, 10_000):
                words = WORDS[rng.integers(0, len(WORDS), (min(10_000, count - start), length))]
                lines = zip(ids[start : start + 10_000], words, strict=False)
                file.writelines(f"{number}\t{' '.join(text)}\n" for number, text in lines)
    options = pa.csv.WriteOptions(include_header=False, delimiter="\t")
    with (folder / "scores.tmp").open("wb") as file:
        for start in range(0, rows, 500_000):
            n = min(500_000, rows - start)
            positives = rng.integers(0, passages, n)
            negatives = (positives + rng.integers(1, passages, n)) % passages
            columns = [*rng.normal(0, 5, (2, n)).round(4), ids[rng.integers(0, queries, n)]]
            columns += [ids[positives], ids[negatives]]
            pa.csv.write_csv(pa.table(dict(zip("abcde", columns, strict=True))), file, options)
    (folder / "scores.tmp").rename(folder / "scores.tsv")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of the collection."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS.tolist()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# ---- Measuring ------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """The time of the first batch, and the memory at the last step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Keep the time of the first batch."""
        if state.global_step == 0:
            self.first_batch = np.array(clocks())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Measure the memory at the last step."""
        if state.global_step == state.max_steps:
            workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.main = anonymous_mb("status", "RssAnon")
            self.all = sum(anonymous_mb("smaps_rollup", "Pss_Anon", process) for process in ("self", *workers))
            self.workers = len(workers)


def clocks() -> tuple[float, float]:
    """Return wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def anonymous_mb(file: str, name: str, process: str = "self") -> float:
    """Return one figure of a process's memory."""
    lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def measure(args: argparse.Namespace) -> dict:
    """Train a few steps on a tiny model."""
    # 1. A tiny model; what the process has now is not counted
    start, folder = np.array(clocks()), args.folder
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = tempfile.mkdtemp()
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **sizes)).save_pretrained(encoder)
    model = kd.load_ranker(encoder, "bert_dot")
    before = {"main": anonymous_mb("status", "RssAnon"), "all": anonymous_mb("smaps_rollup", "Pss_Anon")}

    # 2. Data, trainer, some steps
    rows = kd.load_teacher_scores(folder / "scores.tsv", cache_dir=folder)
    queries = kd.TextStore.from_tsv(folder / "queries.tsv", folder / "queries")
    documents = kd.TextStore.from_tsv(folder / "collection.tsv", folder / "collection")
    before_check, watch = np.array(clocks()), Watch()
    checks.check_rows(rows, queries, documents)
    check = np.array(clocks()) - before_check
    start += check  # the trainer does it again
    settings = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = kd.RankingTrainer(
        model,
        kd.RankingTrainingArguments(
            tempfile.mkdtemp(), max_steps=args.steps, dataloader_num_workers=args.workers, **settings
        ),
        train_dataset=rows,
        queries=queries,
        documents=documents,
        processing_class=tiny_tokenizer(),
        callbacks=[watch],
    )
    trainer.train()
    first_batch, check = (watch.first_batch - start).round(2).tolist(), check.round(2).tolist()
    return {
        "rows": len(rows),
        "passages": len(documents),
        "first_batch_seconds": first_batch[0],
        "first_batch_cpu": first_batch[1],
        "check_seconds": check[0],
        "check_cpu": check[1],
        "main_mb": round(watch.main - before["main"], 1),
        "all_mb": round(watch.all - before["all"], 1),
        "workers": watch.workers,
    }


if __name__ == "__main__":
    main()
