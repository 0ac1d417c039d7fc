"""`hf-kd-ranking teacher VERB` on the toy data: each verb does its work; bad input is one line and status 2."""

import json
import re
import resource
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
import yaml

import hf_kd_ranking as kd
from hf_kd_ranking.cli import main, teacher


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, encoder, tokenizer) -> list[Path]:
    """Two rankers of ours."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("bert_cat", "bert_dot"):
        torch.manual_seed(1)
        model = kd.load_ranker(encoder, name, max_query_length=8, max_document_length=16, initializer_range=0.5)
        kd.Ranker(model, tokenizer).save_pretrained(folder / name)
    return [folder / "bert_cat", folder / "bert_dot"]


@pytest.fixture
def run(monkeypatch, capsys):
    """run("expand", "--scores", path, ...): the exit status, lines of standard output, lines of errors."""

    def call(*arguments) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["hf-kd-ranking", "teacher", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
        return exit_.value.code, printed.out.splitlines(), errors

    return call


@pytest.fixture
def texts(toy) -> list:
    return ["--queries", toy / "queries.tsv", "--collection", toy / "collection.tsv"]


def by_hand(model: Path, queries: list[str], documents: list[str]) -> list:
    return pytest.approx(kd.Ranker.from_pretrained(model, device="cpu").score(queries, documents), rel=1e-4, abs=1e-4)


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


# ---- Each verb ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_score_writes_the_scores_of_the_model(run, teachers, texts, toy, tmp_path, dtype):
    output = tmp_path / "out.tsv"
    options = ["--triples", toy / "scores.tsv", "--output", output, "--batch-size", "5", "--dtype", dtype]
    status, printed, _ = run("score", "--model", teachers[0], *texts, *options, "--json")
    assert status == 0
    result = json.loads(printed[-1])
    expected = {"output": str(output), "teacher": "bert_cat", "rows": 64, "pairs": result["pairs"], "resumed": 0}
    assert result == expected | {"cut_texts": 0.0, "cut_tokens": 0.0}
    assert [row[2:] for row in rows_of(output)] == [row[2:] for row in rows_of(toy / "scores.tsv")]
    queries, documents = kd.TextStore.from_file(texts[1]), kd.TextStore.from_file(texts[3])
    rows = rows_of(output)
    wanted = by_hand(teachers[0], queries[[row[2] for row in rows]], documents[[row[4] for row in rows]])
    if dtype == "fp32":
        assert [float(row[1]) for row in rows] == wanted
    else:
        assert [float(row[1]) for row in rows] != wanted, "the weights are not bf16"


def test_score_writes_a_run_per_model(run, teachers, texts, toy, tmp_path):
    options = ["--candidates", toy / "candidates.trec", "--output", tmp_path / "runs", "--json"]
    status, (line,), _ = run("score", "--model", *teachers, *texts, *options)
    result = json.loads(line)
    assert (status, result["output"]) == (0, str(tmp_path / "runs"))
    names = [str(tmp_path / "runs" / f"{name}.trec") for name in ("bert_cat", "bert_dot")]
    assert [teacher["output"] for teacher in result["teachers"]] == names
    given, queries = kd.read_run(toy / "candidates.trec"), kd.TextStore.from_file(texts[1])
    documents = kd.TextStore.from_file(texts[3])
    for model in teachers:
        for query, ranking in kd.read_run(tmp_path / "runs" / f"{model.name}.trec").items():
            assert {doc for doc, _ in ranking} == {doc for doc, _ in given[query]}
            wanted = by_hand(model, [queries[query]] * 10, documents[[doc for doc, _ in ranking]])
            assert [score for _, score in ranking] == wanted
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["bert_cat.trec", "bert_dot.trec"]
    status, (line,), _ = run("score", "--model", *teachers, *texts, *options)
    assert (status, json.loads(line)["teachers"]) == (0, [])  # the runs are complete and kept


def test_score_reads_candidates_in_ms_marcos_form(run, teachers, texts, tmp_path):
    (tmp_path / "top.tsv").write_text("101\t3\t1\n101\t7\t2\n102\t5\t1\n")
    options = ["--candidates", tmp_path / "top.tsv", "--output", tmp_path / "out.trec"]
    status, _, errors = run("score", "--model", teachers[0], *texts, *options)
    assert status == 0, errors
    scored = kd.read_run(tmp_path / "out.trec")
    assert {query_id: set(dict(ranking)) for query_id, ranking in scored.items()} == {"101": {"3", "7"}, "102": {"5"}}


def test_what_cannot_work_is_refused_before_the_work(run, teachers, texts, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "load_teacher", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(teacher, "sample_triples", lambda *_, **__: pytest.fail("sampled"))
    score = ["score", "--model", teachers[0], tmp_path / "gone", "--triples", toy / "scores.tsv", *texts]
    triples = ["triples", "--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt"]
    for arguments, output, message in [
        (score, "out", "gone does not exist; give a folder, or a name on the Hub"),
        ([*score[:3], *score[4:], "--dtype", "int3"], "out", "--dtype is one of"),
        ([*triples, "--documents", "4"], "out.tsv", "more than two documents do not fit into columns"),
        (triples, "out.jsonl", "rows without scores are written as .tsv or .parquet"),
    ]:
        status, _, errors = run(*arguments, "--output", tmp_path / output)
        assert (status, len(errors), message in errors[0]) == (2, 1, True), errors
        assert not (tmp_path / output).exists()


def test_score_resumes_where_it_was_stopped(run, teachers, texts, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kd_ranking.teachers.score.PAIRS_PER_BLOCK", 30)
    arguments = ["score", "--model", teachers[1], *texts, "--triples", toy / "scores.tsv", "--json", "--output"]
    load, asked = teacher.load_teacher, []

    def stopped(*args, **kwargs):
        loaded = load(*args, **kwargs)

        def score(queries, documents):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(queries)
            return loaded.score(queries, documents)

        return type(loaded)(loaded.name, score, loaded.fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "load_teacher", stopped)
        assert run(*arguments, tmp_path / "out.tsv")[0] == 130
    assert not (tmp_path / "out.tsv").exists()
    status, printed, _ = run(*arguments, tmp_path / "out.tsv")
    assert (status, json.loads(printed[-1])["resumed"]) == (0, 60)
    run(*arguments, tmp_path / "whole.tsv")
    assert (tmp_path / "out.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()


@pytest.fixture
def two_files(toy, tmp_path) -> list:
    """The toy rows, and the same with all scores twice as high."""
    path = tmp_path / "twice.tsv"
    rows = [(2 * float(pos), 2 * float(neg), *ids) for pos, neg, *ids in rows_of(toy / "scores.tsv")]
    # In the same order: some pairs stand in several rows, and their last score counts.
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return [toy / "scores.tsv", path]


def test_ensemble_weights_the_files(run, two_files, tmp_path):
    options = ["--weights", "1", "3", "--output", tmp_path / "out.tsv"]
    status, printed, _ = run("ensemble", "--scores", *two_files, *options, "--json")
    assert status == 0
    assert json.loads(printed[-1]) == {"output": str(tmp_path / "out.tsv"), "rows": 64, "dropped": 0, "incomplete": 0}
    run("ensemble", "--scores", two_files[0], "--output", tmp_path / "one.tsv")
    one, averaged = rows_of(tmp_path / "one.tsv"), rows_of(tmp_path / "out.tsv")
    assert [float(row[0]) for row in averaged] == pytest.approx([(1 + 3 * 2) / 4 * float(row[0]) for row in one])
    assert [row[2:] for row in averaged] == [row[2:] for row in one]


@pytest.mark.parametrize(
    ("options", "left"),
    [(["--method", "standardized"], 64), (["--method", "median"], 64), (["--on-missing", "drop"], 3)],
)
def test_ensemble_takes_method_and_on_missing(run, two_files, tmp_path, options, left):
    if "drop" in options:
        path = two_files[1]
        path.write_text("".join("\t".join(row) + "\n" for row in rows_of(path)[:3]))
    status, printed, _ = run("ensemble", "--scores", *two_files, *options, "--output", tmp_path / "out.tsv", "--json")
    counts = json.loads(printed[-1])
    assert (status, counts["rows"], counts["dropped"]) == (0, left, 64 - left)


def test_expand_replaces_ids_by_texts(run, texts, toy, tmp_path):
    status, printed, _ = run(
        "expand", "--scores", toy / "scores.tsv", *texts, "--output", tmp_path / "out.tsv", "--json"
    )
    assert (status, json.loads(printed[-1])) == (0, {"output": str(tmp_path / "out.tsv"), "rows": 64, "skipped": 0})
    queries, documents = kd.TextStore.from_file(texts[1]), kd.TextStore.from_file(texts[3])
    assert rows_of(tmp_path / "out.tsv") == [
        [pos, neg, queries[query], *documents[ids]] for pos, neg, query, *ids in rows_of(toy / "scores.tsv")
    ]


def test_expand_skips_unknown_ids_if_asked(run, texts, toy, tmp_path):
    (tmp_path / "scores.tsv").write_text((toy / "scores.tsv").read_text() + "1\t2\t100\t1\t404\n")
    options = ["--scores", tmp_path / "scores.tsv", *texts, "--output", tmp_path / "out.tsv", "--on-missing", "skip"]
    status, printed, _ = run("expand", *options)
    assert (status, printed[-1]) == (0, f"output {tmp_path / 'out.tsv'}, rows 64, skipped 1, neg_id 1")


def test_diagnose_prints_text_or_json(run, two_files, texts):
    status, printed, _ = run("diagnose", "--scores", *two_files, *texts, "--examples", "2", "--json")
    assert status == 0
    found = json.loads(printed[-1])
    assert [file["rows"] for file in found["files"]] == [64, 64]
    assert len(found["comparisons"]) == 1
    status, printed, _ = run("diagnose", "--scores", *two_files)
    assert status == 0 and len(printed) > 20


def test_triples_writes_rows_that_score_can_read(run, toy, tmp_path):
    options = ["--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt", "--output", tmp_path / "out.tsv"]
    status, printed, _ = run("triples", *options, "--per-query", "3", "--ranks", "2", "4", "--seed", "7", "--json")
    assert status == 0
    wanted = {"output": str(tmp_path / "out.tsv"), "rows": 12, "queries": 4, "duplicates": 0}
    wanted |= {"suspected_false_negatives": 0, "queries_without_positive": 0, "queries_without_negative": 0}
    assert json.loads(printed[-1]) == wanted
    wanted = kd.sample_triples(
        kd.read_run(toy / "candidates.trec"), kd.read_qrels(toy / "qrels.txt"), per_query=3, ranks=(2, 4), seed=7
    )
    assert rows_of(tmp_path / "out.tsv") == [[row["query_id"], *row["doc_ids"]] for row in wanted.rows]


def test_triples_filters_negatives_by_a_teacher(run, toy, tmp_path):
    candidates = kd.read_run(toy / "candidates.trec")  # whose own scores fall by 1 a rank; positives at ranks 5 and 8
    options = ["--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt", "--per-query", "1000"]
    options += ["--scores", toy / "candidates.trec", "--margin", "2.5", "--output", tmp_path / "out.tsv"]
    assert run("triples", *options)[0] == 0
    ranks = {query: {doc: rank for rank, (doc, _) in enumerate(ranking, 1)} for query, ranking in candidates.items()}
    found = set()
    for positive_score, negative_score, query, positive, negative in rows_of(tmp_path / "out.tsv"):
        found.add((ranks[query][positive], ranks[query][negative]))
        assert [float(positive_score), float(negative_score)] == [
            dict(candidates[query])[d] for d in (positive, negative)
        ]
    assert found == {(5, 9), (5, 10)}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_triples_writes_lists_with_the_scores_of_a_teacher(run, toy, tmp_path, suffix):
    copies = tmp_path / "copies.tsv"  # every document is a copy of another: 0 of 1, 2 of 3, ...
    copies.write_text("".join(f"{i}\ttext {i // 2}\n" for i in range(40)))
    options = [
        "--candidates",
        toy / "candidates.trec",
        "--qrels",
        toy / "qrels.txt",
        "--scores",
        toy / "candidates.trec",
    ]
    options += ["--documents", "4", "--sampling", "stratified", "--relative-margin", "0.9", "--collection", copies]
    output = tmp_path / f"out.{suffix}"
    status, printed, errors = run("triples", *options, "--minimum-grade", "2", "--output", output, "--json")
    assert status == 0, errors
    left_out = Counter()
    wanted = kd.sample_triples(
        kd.read_run(toy / "candidates.trec"),
        kd.read_qrels(toy / "qrels.txt"),
        teacher=kd.read_run(toy / "candidates.trec"),
        texts=kd.TextStore.from_file(copies),
        left_out=left_out,
        minimum_grade=2,
        documents=4,
        sampling="stratified",
        relative_margin=0.9,
    )
    assert json.loads(printed[-1]) == {"output": str(output), "rows": 4, "queries": 4, **left_out}
    assert left_out["suspected_false_negatives"] > 0
    rows = kd.load_teacher_scores(output).rows
    assert [list(map(str, row["doc_ids"])) for row in rows] == wanted.rows["doc_ids"][:]
    assert rows["teacher_scores"][:] == wanted.rows["teacher_scores"][:]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> list:
    """The Hub's place: what was pushed stays in `pushed`."""
    calls = []

    def upload(files, repo_id, repo_type, message, private, overwrite):
        calls.append((repo_id, private))
        files["README.md"].rename(tmp_path / "pushed.md")
        files[teacher.FILE].rename(tmp_path / "pushed.parquet")
        return "https://hub/commit"

    monkeypatch.setattr(teacher, "upload", upload)
    return calls


def test_push_publishes_parquet_with_a_card(run, hub, toy, tmp_path):
    options = ["--push-to", "me/scores", "--texts", "my texts", "--teacher", "one", "--teacher", "two", "--private"]
    status, printed, _ = run("push", "--scores", toy / "scores.tsv", *options, "--license", "mit", "--json")
    assert (status, json.loads(printed[-1])) == (0, {"rows": 64, "address": "https://hub/commit"})
    assert hub == [("me/scores", True)]
    card = (tmp_path / "pushed.md").read_text()
    assert all(words in card for words in ("license: mit", "- one\n- two\n", "my texts", "64 rows"))
    again = kd.load_teacher_scores(datasets.Dataset.from_parquet(str(tmp_path / "pushed.parquet")))
    assert again.rows[:] == kd.load_teacher_scores(toy / "scores.tsv").rows[:]


# ---- Option files ---------------------------------------------------------------------------------------------------


def option_file(folder: Path, options: dict) -> Path:
    (folder / "options.yaml").write_text(yaml.safe_dump(options))
    return folder / "options.yaml"


def test_ensemble_takes_lists_from_an_option_file(run, two_files, tmp_path):
    options = {
        "scores": list(map(str, two_files)),
        "weights": [0, 1],
        "on-missing": "drop",
        "output": str(tmp_path / "file.tsv"),
        "json": True,
    }
    config = option_file(tmp_path, options)
    status, printed, _ = run("ensemble", "--config", config)
    assert (status, json.loads(printed[-1])["output"]) == (0, str(tmp_path / "file.tsv"))
    run("ensemble", "--scores", two_files[1], "--output", tmp_path / "second.tsv")
    assert (tmp_path / "file.tsv").read_bytes() == (tmp_path / "second.tsv").read_bytes()


def test_triples_takes_ranks_from_an_option_file(run, toy, tmp_path):
    options = {"candidates": str(toy / "candidates.trec"), "qrels": str(toy / "qrels.txt"), "ranks": [1, 1]}
    config = option_file(tmp_path, options | {"per_query": 1000, "output": str(tmp_path / "out.tsv")})
    assert run("triples", "--config", config)[0] == 0
    firsts = {(query, ranking[0][0]) for query, ranking in kd.read_run(toy / "candidates.trec").items()}
    assert {(query, negative) for query, _, negative in rows_of(tmp_path / "out.tsv")} == firsts


# ---- Bad input ------------------------------------------------------------------------------------------------------

# verb, options, what the error says; {toy} and {tmp} are folders, {model} a teacher
TEXTS = "--queries {toy}/queries.tsv --collection {toy}/collection.tsv"
SCORE, EXPAND = f"score --model {{model}} {TEXTS}", f"expand {TEXTS}"
TRIPLES = "triples --candidates {toy}/candidates.trec"
BAD_INPUT = {
    "no source": (SCORE, "Give either --triples or --candidates."),
    "two sources": (
        f"{SCORE} --triples {{toy}}/scores.tsv --candidates {{toy}}/candidates.trec",
        "Give either --triples or --candidates.",
    ),
    "dtype": (f"{SCORE} --triples {{toy}}/scores.tsv --dtype fp8", "--dtype is one of fp32, tf32, bf16, fp16, got"),
    "kind": (f"{SCORE} --triples {{toy}}/scores.tsv --kind oracle", "Unknown kind of teacher 'oracle'"),
    "no model": (
        f"score --model {{tmp}}/cache {TEXTS} --triples {{toy}}/scores.tsv",
        "cache does not exist; give a folder, or a name",
    ),
    "unknown id": (f"{SCORE} --triples {{tmp}}/unknown.tsv", "unknown.tsv line 2: id '404' is not among the 40 texts"),
    "columns": (f"{SCORE} --triples {{tmp}}/short.tsv", "short.tsv line 2: needed 5 tab-separated columns"),
    "no folder": (
        f"{SCORE} --triples {{toy}}/scores.tsv --output {{tmp}}/none/out.tsv",
        "none, the folder of the output out.tsv, does not exist; create it.",
    ),
    "expand: unknown id": (f"{EXPAND} --scores {{tmp}}/unknown.tsv", "unknown.tsv line 2: neg_id '404' is not among"),
    "expand: columns": (f"{EXPAND} --scores {{tmp}}/short.tsv", "short.tsv line 2: needed 5 tab-separated columns"),
    "expand: missing": (f"{EXPAND} --scores {{tmp}}/none.tsv", "none.tsv does not exist"),
    "expand: empty": (f"{EXPAND} --scores {{tmp}}/empty.tsv", "empty.tsv is empty"),
    "ensemble: method": (
        "ensemble --scores {toy}/scores.tsv --method max",
        "Unknown method 'max'; choose one of",
    ),
    "ensemble: missing pair": (
        "ensemble --scores {tmp}/unknown.tsv --scores {toy}/scores.tsv",
        "unknown.tsv line 1: the pair '100' '1' is not in",
    ),
    "diagnose: no number": ("diagnose --scores {tmp}/word.tsv", "word.tsv line 1: pos_score must be a finite number"),
    "triples: ranks": (
        f"{TRIPLES} --qrels {{toy}}/qrels.txt --ranks 3 2",
        "ranks must be a first and a last rank, from 1, got (3, 2)",
    ),
    "triples: none": (f"{TRIPLES} --qrels {{toy}}/qrels.txt --minimum-grade 9", "No triple: none of the 4 queries"),
    "triples: no scores": (
        f"{TRIPLES} --qrels {{toy}}/qrels.txt --sampling top",
        "sampling 'top' needs a teacher's scores of the candidates",
    ),
    "triples: lists in TSV": (
        f"{TRIPLES} --qrels {{toy}}/qrels.txt --documents 4",
        "rows of more than two documents do not fit into columns; write .jsonl or .parquet.",
    ),
    "triples: qrels": (f"{TRIPLES} --qrels {{tmp}}/short.tsv", "short.tsv line 1: needed 4 columns"),
    "diagnose: no scores": (
        "diagnose --scores {tmp}/triples.tsv",
        "triples.tsv has no teacher scores; `teacher score`",
    ),
    "push: no scores": (
        "push --scores {tmp}/triples.tsv --push-to me/x --teacher t --texts t",
        "triples.tsv has no teacher scores; `teacher score`",
    ),
    "push: no number": (
        "push --scores {tmp}/word.tsv --push-to me/x --teacher t --texts t",
        "word.tsv line 1: pos_score must be a finite number",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_output(run, hub, teachers, toy, tmp_path, case):
    files = {
        "unknown.tsv": "1\t2\t100\t1\t2\n1\t2\t100\t1\t404\n",
        "short.tsv": "1\t2\t100\t1\t2\n1\t2\t100\n",
        "word.tsv": "high\t2\t100\t1\t2\n",
        "empty.tsv": "",
        "triples.tsv": "100\t1\t2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command, message = BAD_INPUT[case]
    if "--output" not in command and not command.startswith(("push", "diagnose")):
        command += " --output {tmp}/out"
    status, printed, errors = run(*command.format(toy=toy, tmp=tmp_path, model=teachers[0]).split())
    assert (status, printed) == (2, [])
    assert len(errors) == 1 and message in errors[0]
    left = {path.name for path in tmp_path.iterdir()} - {*files, "cache"}
    assert left <= {"out.parts"}  # score's work folder
    assert not hub


# ---- No room --------------------------------------------------------------------------------------------------------


@contextmanager
def no_room_after(bytes_: int):
    """Let every write beyond a size fail in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", ["score", "ensemble", "expand", "triples"])
def test_full_disk_leaves_no_output(monkeypatch, capsys, texts, teachers, toy, tmp_path, verb):
    rows = (toy / "scores.tsv").read_text() * 40
    (tmp_path / "scores.tsv").write_text(rows)
    options = {
        "score": ["--model", teachers[1], *texts, "--triples", tmp_path / "scores.tsv"],
        "ensemble": ["--scores", tmp_path / "scores.tsv"],
        "expand": ["--scores", tmp_path / "scores.tsv", *texts],
        "triples": ["--candidates", toy / "candidates.trec", "--qrels", toy / "qrels.txt", "--per-query", "1000"],
    }[verb]
    for path in texts[1::2]:
        kd.TextStore.from_file(path)  # built while there is room
    before = {path.name for path in tmp_path.iterdir()}
    arguments = ["hf-kd-ranking", "teacher", verb, *options, "--output", tmp_path / "out.tsv"]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    room = {"score": 60_000, "triples": 500}.get(verb, 100_000)
    with no_room_after(room), pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    assert re.search(r"^error: .*(too large|requested and \d+ written)", capsys.readouterr().err, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} - before <= {"out.tsv.parts"}
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert (tmp_path / "out.tsv").stat().st_size > room, "there was room enough"
