"""Damaged inputs: every file that a verb reads, damaged in every way, is read with the right values or refused.

A refusal is one line that begins with "error: " and names the file or its folder, exit status 2 (1 for a failure of
the operating system), without a traceback and without an output. `python -m pytest tests/test_fuzz.py -rP -k counts`
prints the number of cases.
"""

import gzip
import json
import math
import random
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import write_json
from hf_kd_ranking.data.rows import write_teacher_scores
from hf_kd_ranking.hub.manifest import write_manifest
from hf_kd_ranking.hub.model_card import write_model_card
from hf_kd_ranking.searcher import Pipeline, save_pipeline

# ---- Damages of text files ------------------------------------------------------------------------------------------


def change_line(change: Callable[[str, random.Random], str]) -> Callable[[bytes, random.Random], bytes]:
    """Return a damage that changes one line, drawn by chance."""

    def damage(content: bytes, rng: random.Random) -> bytes:
        lines = content.decode().splitlines(keepends=True)
        row = rng.randrange(len(lines))
        lines[row] = change(lines[row], rng)
        return "".join(lines).encode("utf-8", "surrogatepass")

    return damage


def change_field(value: str | None) -> Callable[[str, random.Random], str]:
    """Return a change of one column of a line, drawn by chance; None removes it."""

    def change(line: str, rng: random.Random) -> str:
        separator = "\t" if "\t" in line else " "
        fields = line.rstrip("\n").split(separator)
        place = rng.randrange(len(fields))
        fields[place : place + 1] = [] if value is None else [value]
        return separator.join(fields) + "\n"

    return change


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, len(content))]


TEXT_DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": cut,
    "truncated in the first line": lambda content, rng: content[:3],
    "empty": lambda content, rng: b"",
    "white space": lambda content, rng: b" \n\t\n \n",
    "line breaks": lambda content, rng: b"\n\n\n",
    "binary": lambda content, rng: rng.randbytes(300),
    "utf-16": lambda content, rng: content.decode().encode("utf-16"),
    "latin-1": change_line(lambda line, rng: line.rstrip("\n") + "\ufffd\n"),
    "not utf-8": lambda content, rng: content.replace(b"\n", b"\xfc\n", 2),
    "surrogate bytes": change_line(lambda line, rng: line.rstrip("\n") + "\ud800\n"),
    "bom": lambda content, rng: b"\xef\xbb\xbf" + content,
    "bom in the middle": change_line(lambda line, rng: "\ufeff" + line),
    "line twice": change_line(lambda line, rng: line + line),
    "file twice": lambda content, rng: content + content,
    "column missing": change_line(change_field(None)),
    "column added": change_line(lambda line, rng: line.rstrip("\n") + ("\t" if "\t" in line else " ") + "more\n"),
    "first column empty": change_line(lambda line, rng: line[line.index("\t") :] if "\t" in line else line),
    "nan": change_line(change_field("nan")),
    "infinite": change_line(change_field("-inf")),
    "huge": change_line(change_field("9" * 400)),
    "huge exponent": change_line(change_field("1e999")),
    "underscore": change_line(change_field("1_0")),
    "word": change_line(change_field("ten")),
    "comma": change_line(change_field("1,5")),
    "empty column": change_line(change_field("")),
    "unknown id": change_line(change_field("4040404")),
    "negative": change_line(change_field("-7")),
    "null bytes": change_line(lambda line, rng: "\0" + line),
    "null bytes in a column": change_line(change_field("1\x002")),
    "only null bytes": lambda content, rng: bytes(len(content)),
    "long line": change_line(lambda line, rng: line.rstrip("\n") + "x" * 300_000 + "\n"),
    "crlf": lambda content, rng: content.replace(b"\n", b"\r\n"),
    "cr": lambda content, rng: content.replace(b"\n", b"\r"),
    "no last line break": lambda content, rng: content.rstrip(b"\n"),
    "blank line": change_line(lambda line, rng: "\n" + line),
    "header": lambda content, rng: b"query_id\tdoc_id\tscore\n" + content,
    "quotes": change_line(lambda line, rng: '"' + line.rstrip("\n") + '"\n'),
    "open quote": change_line(lambda line, rng: '"' + line),
    "reversed lines": lambda content, rng: b"".join(content.splitlines(keepends=True)[::-1]),
    "gzip": lambda content, rng: gzip.compress(content),
    "markup": lambda content, rng: b"<!DOCTYPE html><html><body>404</body></html>\n",
    "arabic digits": change_line(change_field("٣")),
}
# Those that change nothing in what is read.
HARMLESS = ("bom", "bom in the middle", "crlf", "cr", "no last line break", "blank line")


# ---- Damages of JSON objects ----------------------------------------------------------------------------------------

VALUES = [
    None,
    "text",
    "",
    -1,
    0,
    1.5,
    1e400,
    10**400,
    True,
    [],
    [None],
    [1],
    {},
    {"a": [None]},
    "\ud800",
    "x" * 100_000,
]


def change_value(content: bytes, rng: random.Random) -> bytes:
    """Give one value of a JSON object, at any depth, another type."""
    first = content.decode().splitlines()[0] if content.count(b"\n{") else content.decode()
    value = json.loads(first)
    inner = value
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = rng.choice(keys)
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.4:
            break
        inner = inner[key]
    inner[key] = rng.choice(VALUES)
    return content.replace(first.encode(), json.dumps(value).encode(), 1)


def remove_key(content: bytes, rng: random.Random) -> bytes:
    first = content.decode().splitlines()[0] if content.count(b"\n{") else content.decode()
    value = json.loads(first)
    if isinstance(value, dict):
        del value[rng.choice(list(value))]
    else:
        value.pop()
    return content.replace(first.encode(), json.dumps(value).encode(), 1)


JSON_DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": cut,
    "empty": lambda content, rng: b"",
    "white space": lambda content, rng: b" \n",
    "binary": lambda content, rng: rng.randbytes(300),
    "utf-16": lambda content, rng: content.decode().encode("utf-16"),
    "not utf-8": lambda content, rng: content.replace(b'"', b'"\xfc', 1),
    "bom": lambda content, rng: b"\xef\xbb\xbf" + content,
    "null": lambda content, rng: b"null",
    "a number": lambda content, rng: b"17\n",
    "a text": lambda content, rng: b'"text"\n',
    "a list": lambda content, rng: b"[1, 2]\n",
    "a list of nothing": lambda content, rng: b"[]\n",
    "an empty object": lambda content, rng: b"{}\n",
    "nan": lambda content, rng: b"NaN\n",
    "deep": lambda content, rng: b"[" * 100_000,
    "markup": lambda content, rng: b"<!DOCTYPE html><html><body>404</body></html>\n",
    "null bytes": lambda content, rng: bytes(len(content)),
    "two objects": lambda content, rng: content.rstrip() + b" " + content,
    **{f"value {number}": change_value for number in range(10)},
    **{f"key removed {number}": remove_key for number in range(4)},
}


# For files whose content has a digest, or is read by a slow verb.
FEW_JSON_DAMAGES = {
    name: damage for name, damage in JSON_DAMAGES.items() if not name.startswith(("value", "key")) or name[-1] in "123"
}


# ---- Damages of binary files ----------------------------------------------------------------------------------------


def flip_in_header(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(min(len(content), 60))] ^= 0xFF
    return bytes(changed)


BINARY_DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": cut,
    "truncated by a byte": lambda content, rng: content[:-1],
    "truncated in the header": lambda content, rng: content[:7],
    "empty": lambda content, rng: b"",
    "binary": lambda content, rng: rng.randbytes(len(content)),
    "text": lambda content, rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n",
    "null bytes": lambda content, rng: bytes(len(content)),
    "header all ones": lambda content, rng: b"\xff" * 8 + content[8:],
    "twice": lambda content, rng: content + content,
    "longer": lambda content, rng: content + b"more",
    **{f"flip in the header {number}": flip_in_header for number in range(4)},
}


# ---- What is read, by a second implementation -----------------------------------------------------------------------


def lines_of(content: bytes) -> list[str]:
    """Lines without marks and line breaks, but not blank ones."""
    text = content.decode("utf-8", "surrogateescape")
    lines = [line.removeprefix("\ufeff") for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return [line for line in lines if line.strip()]


def finite(text: str) -> float:
    if "_" in text or not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def run_values(content: bytes) -> dict:
    run: dict[str, dict[str, float]] = {}
    for line in lines_of(content):
        query_id, _, doc_id, _, score, _ = line.split()
        query_id.encode(), doc_id.encode()  # the other columns are not read
        if doc_id in run.setdefault(query_id, {}):
            raise ValueError(line)
        run[query_id][doc_id] = finite(score)
    return run


def qrels_values(content: bytes) -> dict:
    qrels: dict[str, dict[str, int]] = {}
    lines = lines_of(content)
    count = len(lines[0].split())
    for line in lines:
        fields = line.split()
        if fields == ["query-id", "corpus-id", "score"]:  # BEIR's header, several times in joined files
            continue
        query_id, *_, doc_id, grade = fields
        line.encode()
        if len(fields) != count or count not in (3, 4) or not grade.isascii() or "_" in grade:
            raise ValueError(line)
        if qrels.setdefault(query_id, {}).setdefault(doc_id, int(grade)) != int(grade):
            raise ValueError(line)
    return qrels


def texts_values(content: bytes) -> dict:
    texts: dict[str, str] = {}
    for line in lines_of(content):
        id_, text = line.split("\t")
        line.encode()
        if texts.setdefault(id_, text) != text:
            raise ValueError(line)
    return texts


def json_texts_values(content: bytes) -> dict:
    texts: dict[str, str] = {}
    for line in lines_of(content):
        row = json.loads(line.encode())
        if not isinstance(row["_id"], str | int) or isinstance(row["_id"], bool) or not isinstance(row["text"], str):
            raise ValueError(line)
        text = f"{row.get('title') or ''} {row['text']}".strip() if "title" in row else row["text"]
        text.encode()
        if texts.setdefault(str(row["_id"]), text) != text:
            raise ValueError(line)
    return texts


def pairs_values(content: bytes) -> list:
    rows = []
    for line in lines_of(content):
        positive, negative, query_id, *doc_ids = line.split("\t")
        line.encode()
        if len(doc_ids) != 2:
            raise ValueError(line)
        scores = [float(np.float32(finite(score))) for score in (positive, negative)]
        finite(str(scores[0])), finite(str(scores[1]))
        rows.append((query_id, doc_ids, scores))
    return rows


def lists_values(content: bytes) -> list:
    rows = []
    for line in lines_of(content):
        row = json.loads(line.encode())
        ids, scores = row["doc_ids"], row["teacher_scores"]
        if len(ids) != len(scores) or len(ids) < 2 or not all(isinstance(score, int | float) for score in scores):
            raise ValueError(line)
        scores = [finite(str(float(np.float32(score)))) for score in scores]
        rows.append((str(row["query_id"]), [str(id_) for id_ in ids], scores))
    return rows


def read_rows(path: Path) -> list:
    rows = []
    for row in kd.load_teacher_scores(path).rows:
        rows.append((str(row["query_id"]), [str(id_) for id_ in row["doc_ids"]], row["teacher_scores"]))
    return rows


# ---- The files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A file that verbs read.

    Args:
        kind: for the counts.
        file: its path below the folder of good files. Files inside a folder are damaged in a copy of the folder.
        commands: verbs that read it: {file} is the damaged file, or the folder around it, {good} the folder of good
            files, {out} the output.
        damages: name -> function of the good content.
        read: reads the file by the public Python function.
        values: the same values by the second implementation, or any exception.
        harmless: damages that change nothing in what is read.
        has_twin: whether the undamaged file passes.
    """

    kind: str
    file: str
    commands: Sequence[str]
    damages: dict[str, Callable[[bytes, random.Random], bytes]]
    read: Callable[[Path], object] | None = None
    values: Callable[[bytes], object] | None = None
    harmless: Sequence[str] = ()
    has_twin: bool = True


def texts_of(path: Path) -> dict[str, str]:
    return dict(kd.TextStore.from_file(path).items())


def run_of(path: Path) -> dict[str, dict[str, float]]:
    return {query_id: dict(ranking) for query_id, ranking in kd.read_run(path).items()}


SCORE = "--queries {good}/queries.tsv --collection {good}/collection.tsv --model {good}/model --output {out}/x.tsv"
SEARCH = "search --index {good}/bm25 --queries {file} --output {out}/x.trec"
RERANK = (
    "rerank --model {good}/model --queries {good}/queries.tsv --collection {good}/collection.tsv "
    "--candidates {file} --output {out}/x.trec"
)
TRIPLES = "teacher triples --output {out}/x.tsv"
CHECKPOINT = (
    "rerank --model {file} --queries {good}/queries.tsv --collection {good}/collection.tsv "
    "--candidates {good}/run.trec --output {out}/x.trec"
)
TRAIN = (
    "train --model {good}/model --scores {file} --queries {good}/queries.tsv --collection {good}/collection.tsv "
    "--output {out}/x --max-steps 1 --use-cpu --report-to none --max-query-length 8 --max-document-length 16"
)
TEXT = {"damages": TEXT_DAMAGES, "harmless": HARMLESS}
READERS = [
    Reader(
        "texts, TSV",
        "collection.tsv",
        ["index --collection {file} --output {out}/x"],
        read=texts_of,
        values=texts_values,
        **TEXT,
    ),
    Reader("queries, TSV", "queries.tsv", [SEARCH], read=texts_of, values=texts_values, **TEXT),
    Reader(
        "texts, JSON lines",
        "collection.jsonl",
        ["index --collection {file} --output {out}/x"],
        TEXT_DAMAGES | JSON_DAMAGES,
        texts_of,
        json_texts_values,
        HARMLESS,
    ),
    Reader(
        "run",
        "run.trec",
        [
            "fuse --run {file} --run {good}/run.trec --output {out}/x.trec",
            "evaluate --run {file} --qrels {good}/qrels.txt",
            f"{TRIPLES} --candidates {{file}} --qrels {{good}}/qrels.txt",
            RERANK,
        ],
        read=run_of,
        values=run_values,
        **TEXT,
    ),
    Reader(
        "qrels",
        "qrels.txt",
        [
            "evaluate --run {good}/run.trec --qrels {file}",
            "compare --run {good}/run.trec --run b={good}/run2.trec --qrels {file}",
            f"{TRIPLES} --candidates {{good}}/run.trec --qrels {{file}}",
        ],
        read=kd.read_qrels,
        values=qrels_values,
        **TEXT,
    ),
    Reader(
        "qrels, BEIR",
        "beir.tsv",
        ["evaluate --run {good}/run.trec --qrels {file}"],
        read=kd.read_qrels,
        values=qrels_values,
        **TEXT,
    ),
    Reader(
        "teacher rows, TSV",
        "scores.tsv",
        [
            "teacher ensemble --scores {file} --scores {good}/scores.tsv --output {out}/x.tsv",
            "teacher diagnose --scores {file}",
            "teacher expand --scores {file} --collection {good}/collection.tsv --queries {good}/queries.tsv "
            "--output {out}/x.tsv",
        ],
        read=read_rows,
        values=pairs_values,
        **TEXT,
    ),
    Reader(
        "teacher rows, JSON lines",
        "scores.jsonl",
        ["teacher diagnose --scores {file}"],
        TEXT_DAMAGES | JSON_DAMAGES,
        read_rows,
        lists_values,
        HARMLESS,
    ),
    Reader("triples", "triples.tsv", [f"teacher score --triples {{file}} {SCORE}"], **TEXT),
]
YAML_DAMAGES = {name: TEXT_DAMAGES[name] for name in ("truncated", "empty", "binary", "utf-16", "not utf-8", "bom")}
YAML_DAMAGES |= {name: TEXT_DAMAGES[name] for name in ("line twice", "null bytes", "crlf", "open quote", "markup")}
YAML_DAMAGES |= {
    "surrogate": lambda content, rng: content.replace(b"method", b"#") + b'method: "\\ud800"\n',
    "a list": lambda content, rng: b"- method\n- k\n",
    "a number": lambda content, rng: b"17\n",
    "a tag": lambda content, rng: content.replace(b"method", b"#") + b"method: !!python/object/apply:os.system [ls]\n",
    "tabs": lambda content, rng: b"\tmethod: rank\n",
    "unknown option": lambda content, rng: content + b"unknown: 1\n",
    "a list for one value": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: [1, 2]\n",
    "an object for a value": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: {a: 1}\n",
    "an empty list": lambda content, rng: content.replace(b"weights", b"#") + b"weights: []\n",
    "a word for a number": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: ten\n",
    "a negative number": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: -3\n",
    "nan": lambda content, rng: content.replace(b"weights", b"#") + b"weights: [.nan, 1]\n",
    "a null key": lambda content, rng: content + b"null: 3\n",
    "a key of a list": lambda content, rng: content + b"? [k]\n: 3\n",
    "an anchor that is missing": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: *nothing\n",
    "a date": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: 2020-02-30\n",
    "deep": lambda content, rng: content.replace(b"k: 5\n", b"") + b"k: " + b"[" * 20_000,
    "two documents": lambda content, rng: content + b"---\n" + content,
}
READERS += [
    Reader("options, YAML", "options.yaml", ["fuse --config {file} --output {out}/x.trec"], YAML_DAMAGES),
    Reader(
        "teacher rows, Parquet",
        "scores.parquet",
        ["teacher diagnose --scores {file}"],
        BINARY_DAMAGES,
    ),
    Reader(
        "measured efficiency",
        "results/efficiency.json",
        ["report --results {file} --output {out}/x.html", "push {good}/model me/x --dry-run --efficiency {path}"],
        FEW_JSON_DAMAGES,
    ),
    Reader(
        "training history",
        "results/training/a.json",
        ["report --results {file} --output {out}/x.html"],
        FEW_JSON_DAMAGES,
    ),
    Reader("manifest", "model/manifest.json", ["push {file} me/x --dry-run"], JSON_DAMAGES),
    Reader("config", "model/config.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("tokenizer", "model/tokenizer.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("tokenizer's config", "model/tokenizer_config.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("weights", "model/model.safetensors", [CHECKPOINT], BINARY_DAMAGES),
    Reader("modules", "bi/modules.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("pooling", "bi/1_Pooling/config.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("sentence-transformers' settings", "bi/config_sentence_transformers.json", [CHECKPOINT], JSON_DAMAGES),
    Reader("encoder's settings", "bi/sentence_bert_config.json", [CHECKPOINT], JSON_DAMAGES),
    Reader(
        "word vectors",
        "words.txt",
        [
            "benchmark --model {file} --architecture tk --queries {good}/queries.tsv "
            "--collection {good}/collection.tsv --candidates {good}/run.trec --rounds 1 --warm-up 0"
        ],
        {name: damage for name, damage in TEXT_DAMAGES.items() if name != "gzip"},
    ),
]
SEARCH_INDEX = "search --index {file} --queries {good}/queries.tsv --output {out}/x.trec"
for file in ("v1/vocab.index.json", "v1/params.index.json"):
    READERS.append(Reader(f"BM25, {file}", f"bm25/{file}", [SEARCH_INDEX], FEW_JSON_DAMAGES))
for file in ("v1/data.csc.index.npy", "v1/indptr.csc.index.npy"):
    READERS.append(Reader(f"BM25, {file}", f"bm25/{file}", [SEARCH_INDEX], BINARY_DAMAGES))
READERS += [
    Reader("BM25's description", "bm25/artifact.json", [SEARCH_INDEX], FEW_JSON_DAMAGES),
    Reader(
        "vectors' description", "vectors/artifact.json", [SEARCH_INDEX + " --model {good}/model"], FEW_JSON_DAMAGES
    ),
    Reader("vectors", "vectors/v1/vectors.npy", [SEARCH_INDEX + " --model {good}/model"], BINARY_DAMAGES),
    Reader("faiss index", "vectors/dense/v1/dense.faiss", [SEARCH_INDEX + " --model {good}/model"], BINARY_DAMAGES),
]
INDEX_STORE = "index --collection {file} --output {out}/x"
for file in ("texts.bin", "texts.offsets.npy", "ids.bin", "ids.offsets.npy", "keys.npy", "rows.npy"):
    READERS.append(Reader(f"text store, {file}", f"store/{file}", [INDEX_STORE], BINARY_DAMAGES))
READERS += [
    Reader("text store's description", "store/store.json", [INDEX_STORE], JSON_DAMAGES),
    Reader("pipeline", "pipeline/pipeline.json", ["serve --pipeline {file} --docker {out}/x"], JSON_DAMAGES),
]
# The other verbs read the same files, and load or train a model for each case.
FEW = ("truncated", "empty", "binary", "utf-16", "column missing", "nan", "long line", "null bytes")
FEW_TEXT = {"damages": {name: TEXT_DAMAGES[name] for name in FEW}}
FEW_BINARY = {name: BINARY_DAMAGES[name] for name in ("truncated", "empty", "null bytes")}
BENCHMARK = (
    "benchmark --model {good}/model --queries {good}/queries.tsv --collection {good}/collection.tsv "
    "--candidates {file} --rounds 1 --warm-up 0 --output {out}/x.json"
)
DISTILL = (
    "distill --collection {file} --queries {good}/queries.tsv --teacher {good}/model --output {out}/x --plan-only "
    "--held-out 0.4"
)
DISTILL_DAMAGES = {name: TEXT_DAMAGES[name] for name in ("empty", "binary", "utf-16", "column missing", "not utf-8")}
READERS += [
    Reader("training's rows", "scores.tsv", [TRAIN], **FEW_TEXT),
    Reader("candidates that are timed", "run.trec", [BENCHMARK], **FEW_TEXT),
    # Without an undamaged one, whose plan would need the encoders of the students.
    Reader("collection to distil on", "collection.tsv", [DISTILL], DISTILL_DAMAGES, has_twin=False),
    Reader(
        "weights to export",
        "model/model.safetensors",
        ["export --model {file} --to sentence-transformer --output {out}/x"],
        FEW_BINARY,
    ),
]


# ---- The test -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory, toy, encoder, tokenizer) -> Path:
    """Folder of undamaged files."""
    folder = tmp_path_factory.mktemp("good")
    for name in ("collection.tsv", "queries.tsv", "scores.tsv"):
        text = (toy / name).read_text()
        if name != "scores.tsv":
            text = text.replace("\t", "\tGrüße ")
        (folder / name).write_text(text, encoding="utf-8")
    rows = [line.split("\t") for line in (toy / "scores.tsv").read_text().splitlines()]
    (folder / "triples.tsv").write_text("".join("\t".join(row[2:]) + "\n" for row in rows))
    lists = [
        {"query_id": row[2], "doc_ids": [row[3], row[4]], "teacher_scores": [float(row[0]), float(row[1])]}
        for row in rows
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    write_teacher_scores(kd.load_teacher_scores(toy / "scores.tsv", folder / "cache"), folder / "scores.parquet")
    documents = [line.split("\t") for line in (folder / "collection.tsv").read_text(encoding="utf-8").splitlines()]
    texts = [{"_id": id_, "title": "Ein Titel", "text": text} for id_, text in documents]
    (folder / "collection.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    run = kd.read_run(toy / "candidates.trec")
    kd.write_run(run, folder / "run.trec")
    kd.write_run(
        {query: [(doc, -score) for doc, score in docs][::-1] for query, docs in run.items()}, folder / "run2.trec"
    )
    shutil.copy(toy / "qrels.txt", folder)
    lines = ["query-id\tcorpus-id\tscore"]
    for query, grades in kd.read_qrels(toy / "qrels.txt").items():
        lines += [f"{query}\t{doc}\t{grade}" for doc, grade in grades.items()]
    (folder / "beir.tsv").write_text("\n".join(lines) + "\n")
    (folder / "options.yaml").write_text(
        f"run: [{folder}/run.trec, {folder}/run2.trec]\nmethod: weighted_sum\nk: 5\nweights: [1, 7e-1]\n"
    )
    (folder / "words.txt").write_text(
        "".join(f"{word} {i} 0.5 -1 2\n" for i, word in enumerate("apple king moon night".split()))
    )
    _add_folders(folder, encoder, tokenizer)
    return folder


def _add_folders(folder: Path, encoder: Path, tokenizer) -> None:
    """Add checkpoints, indexes and results to the good files."""
    model = make_model("bert_dot", encoder)
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(folder / "model")
    arguments = kd.RankingTrainingArguments(str(folder / "model"), use_cpu=True).to_dict()
    results = {"after": {"nDCG@10": 0.5}, "before": {"nDCG@10": 0.25}}
    write_manifest(folder / "model", arguments, 64, results, {"scores": folder / "scores.tsv"}, ["train", "--a", "b"])
    write_model_card(folder / "model")
    documents = kd.TextStore.from_tsv(folder / "collection.tsv", folder / "numbers")
    (folder / "named.tsv").write_text((folder / "collection.tsv").read_text("utf-8").replace("\t", "x\t"), "utf-8")
    kd.TextStore.from_tsv(folder / "named.tsv", folder / "store")
    bm25 = kd.BM25Index.build(documents, folder / "bm25")
    vectors = kd.VectorStore.build(ranker, documents, folder / "vectors")
    kd.DenseIndex.build(vectors, factory="HNSW8").save(folder / "vectors" / "dense")
    save_pipeline(folder / "pipeline", Pipeline(documents, bm25, ranker, depth=5))
    (folder / "results" / "runs").mkdir(parents=True)
    (folder / "results" / "training").mkdir()
    shutil.copy(folder / "run.trec", folder / "results" / "runs" / "model.trec")
    shutil.copy(folder / "qrels.txt", folder / "results")
    history = [{"step": 1, "loss": 0.5, "epoch": 0.5}, {"step": 2, "eval_nDCG@10": 0.25, "epoch": 1.0}]
    write_json(folder / "results" / "training" / "a.json", {"log_history": history})
    measured = kd.measure_efficiency({"model": lambda: ranker}, ["apple"], ["king", "moon night"])
    write_json(folder / "results" / "efficiency.json", measured)
    shutil.copytree(encoder, folder / "bi")
    modules = []
    for name, path in {"Transformer": "", "Pooling": "1_Pooling"}.items():
        modules.append(
            {"idx": len(modules), "name": path, "path": path, "type": f"sentence_transformers.models.{name}"}
        )
    write_json(folder / "bi" / "modules.json", modules)
    (folder / "bi" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write_json(folder / "bi" / "1_Pooling" / "config.json", pooling | {"include_prompt": True})
    settings = {"prompts": {"query": "what is ", "document": ""}, "default_prompt_name": None}
    settings |= {"similarity_fn_name": "dot", "model_type": "SentenceTransformer"}
    write_json(folder / "bi" / "config_sentence_transformers.json", settings)
    write_json(folder / "bi" / "sentence_bert_config.json", {"max_seq_length": 16, "do_lower_case": False})


def arguments_of(reader: Reader, command: str, good: Path, folder: Path, content: bytes) -> tuple[str, Path]:
    """Write the damaged file into a folder; return the command that reads it, and its path."""
    path = folder / reader.file
    top = path
    if "/" in reader.file:
        top = folder / Path(reader.file).parts[0]
        shutil.copytree(good / top.name, top)
    path.write_bytes(content)
    (folder / "out").mkdir()
    return command.format(file=top, path=path, good=good, out=folder / "out"), path


def fault_of(reader: Reader, name: str, outcome: tuple, path: Path, content: bytes) -> str | None:
    """Return what is wrong with the outcome of a case; None if it is right."""
    status, _, err = outcome
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if status not in (0, 1, 2):
        return f"status {status}"
    if status == 0:
        if errors or reader.read is None:
            return f"errors although the status is 0: {errors}" if errors else None
        try:
            wanted = reader.values(content)
        except Exception as error:
            return f"it is read, and should be refused ({type(error).__name__} {error})"[:300]
        return None if reader.read(path) == wanted else "other values are read"
    if name in reader.harmless:
        return f"refused: {err[-300:]}"
    if len(errors) != 1 or not err.rstrip().endswith(errors[0]) or "Traceback" in err:
        return f"not one line: {err[-300:]!r}"
    if len(errors[0]) > 1_500:
        return f"a message of {len(errors[0])} characters"
    left = [str(part.relative_to(path.anchor)) for part in (path.parents[reader.file.count("/")] / "out").iterdir()]
    if left:
        return f"left behind: {left}"
    names = {path.name, *reader.file.split("/")[:1]}
    # Or the id that is not in another file, or cannot be in a run.
    is_named = any(part in errors[0] for part in (*names, "ids are not among", "cannot hold the id"))
    if reader.kind != "options, YAML" and not is_named:
        return f"does not name the file: {errors[0][:300]}"
    return None


@pytest.mark.parametrize("reader", READERS, ids=[reader.kind for reader in READERS])
def test_damaged_files_are_read_or_refused(reader, good, call, tmp_path, monkeypatch):
    content, faults = (good / reader.file).read_bytes(), []
    cases = []
    if reader.has_twin:
        cases = [("undamaged", number, content) for number in range(len(reader.commands))]
    for number, (name, damage) in enumerate(reader.damages.items()):
        damaged = damage(content, random.Random(f"{reader.kind} {name}"))
        cases.append((name, number, damaged))
    for place, (name, number, damaged) in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        command = reader.commands[number % len(reader.commands)]
        arguments, path = arguments_of(reader, command, good, folder, damaged)
        monkeypatch.chdir(folder)
        try:
            outcome = call(arguments)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} at {where.filename[-40:]}:{where.lineno}: {error}"[:300]
        else:
            fault = fault_of(reader, name, outcome, path, damaged)
            if name == "undamaged" and outcome[0] != 0:
                fault = outcome[2][-300:]
        if fault is not None:
            faults.append(f"{name} ({command.split(' --')[0]}): {fault}")
        monkeypatch.undo()
        shutil.rmtree(folder)
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def test_counts():
    """Print the number of cases by kind; `-rP` shows it."""
    total = 0
    for reader in READERS:
        count = len(reader.damages) + len(reader.commands) * reader.has_twin
        print(f"{count:5}  {reader.kind}")
        total += count

    print(f"{total:5}  in all")
    assert total >= 500
