"""Suites of several sets: figures, tests, resuming, broken sets, and the evaluator of the trainer."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.artifacts import read_json, write_json
from hf_kd_ranking.cli import evaluate as evaluate_verb
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.evaluation import suites
from hf_kd_ranking.evaluation.rerank import rerank_run
from hf_kd_ranking.evaluation.significance import holm, paired_t_test
from hf_kd_ranking.evaluation.suites import SuiteEvaluator


@pytest.fixture
def suite(toy, tmp_path):
    """A suite of two sets: one with the toy candidates, the other with other judgments and a card in German."""
    folder = tmp_path / "suite"
    shutil.copytree(toy, folder / "a")
    shutil.copytree(toy, folder / "b")
    (folder / "b" / "candidates.trec").unlink()
    (folder / "b" / "README.md").write_text("---\nlanguage: de\n---\n")
    (folder / "a" / "README.md").write_text("---\nlanguage: [en, fr]\n---\n")
    write_qrels({"100": {"1": 1}, "101": {"2": 2}, "102": {"3": 1}}, folder / "b" / "qrels.txt")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture
def rankers(encoder, tokenizer, tmp_path) -> dict[str, kd.Ranker]:
    found = {}
    for name, pooling in (("first", "cls"), ("second", "mean")):
        lengths = {"max_query_length": 8, "max_document_length": 16}
        found[name] = kd.Ranker(kd.load_ranker(encoder, "bert_dot", pooling=pooling, **lengths), tokenizer)
        found[name].save_pretrained(tmp_path / name)
    return found


def wanted_runs(suite, ranker, retrieve: bool) -> dict[str, kd.Run]:
    """Return set -> run of a ranker, from the parts of the package that the suite is made of."""
    runs = {}
    for name in "ab":
        data = kd.load_collection(str(suite / name))
        if retrieve:
            runs[name] = kd.RetrievalEvaluator(data.qrels, data.queries, data.documents, k=7).retrieve(ranker)
            continue
        candidates = data.candidates or kd.BM25Index.build(data.documents).search(data.judged_queries(), 7)
        runs[name] = rerank_run(ranker, candidates.top(7), data.queries, data.documents)
    return runs


@pytest.mark.parametrize("retrieve", [False, True])
def test_suite_measures_every_set_and_tests_with_holm(call, suite, rankers, tmp_path, retrieve):
    command = f"evaluate --suite {suite} --results {tmp_path}/out --k 7 --measure nDCG@10 RR@5 --model"
    command += f" {tmp_path}/first other={tmp_path}/second" + " --retrieve" * retrieve
    status, out, err = call(f"{command} --json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result["rankers"]) == ["first_stage", "first", "other"]
    assert (result["sets"], result["languages"], result["failed"]) == (["a", "b"], {"de": ["b"]}, {})
    means = result["rankers"]["other"]["nDCG@10"]
    files = {name: read_json(tmp_path / "out" / f"{name}.json")["sets"] for name in result["rankers"]}
    for name, run in wanted_runs(suite, rankers["second"], retrieve).items():
        qrels = kd.read_qrels(suite / name / "qrels.txt")
        assert means[name] == pytest.approx(kd.evaluate_run(run, qrels)["nDCG@10"], abs=1e-6)
        assert 0 < means[name] < 1
    p_values = []
    for name in "ab":
        sides = [files[ranker][name]["queries"]["nDCG@10"] for ranker in ("other", "first_stage")]
        p_values.append(paired_t_test(*sides)["p_value"])
    tests = [test for test in result["tests"] if (test["ranker"], test["measure"]) == ("other", "nDCG@10")]
    assert [test["set"] for test in tests] == ["a", "b"]
    assert [test["p_value"] for test in tests] == pytest.approx(p_values)
    assert [test["p_corrected"] for test in tests] == pytest.approx(holm(p_values))
    assert holm(p_values) != p_values
    # The table is that of the files; a row has the sets, their mean, and the mean of the German set.
    status, table, _ = call(f"evaluate --results {tmp_path}/out")
    row = [means["a"], means["b"], (means["a"] + means["b"]) / 2, means["b"]]
    assert "| nDCG@10 | a | b | mean of 2 sets | de (1) |" in table
    assert f"| other | {' | '.join(map('{:.4f}'.format, row))} |" in table
    assert table.count("| RR@5 |") == 1 + 4  # a table, and two tests of two rankers


@pytest.mark.slow
@pytest.mark.parametrize("is_broken", [False, True])
def test_processes_share_a_suite(call, suite, rankers, tmp_path, is_broken):
    if is_broken:
        (suite / "a" / "collection.tsv").write_text("no tab\n")
    command = f"evaluate --suite {suite} --k 7 --json --model {tmp_path}/first --results {tmp_path}"
    status, alone, _ = call(f"{command}/alone")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    shared = [*launch, "-m", "hf_kd_ranking", *f"{command}/shared".split()]
    result = subprocess.run(shared, capture_output=True, text=True, timeout=240, check=False)
    assert (status, result.returncode) == (int(is_broken), int(is_broken)), result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 1, "one of the two is the main process"
    wanted, found = json.loads(alone), json.loads(result.stdout)
    assert found["rankers"]["first"]["nDCG@10"] == pytest.approx(wanted["rankers"]["first"]["nDCG@10"], abs=1e-6)
    assert found["failed"] == wanted["failed"] and list(found["failed"]) == ["a"] * is_broken
    assert found["sets"] == wanted["sets"]


def test_rankers_of_a_suite_share_their_work_and_one_process_writes(call, suite, rankers, tmp_path, monkeypatch):
    loaded, from_pretrained = [], kd.Ranker.from_pretrained

    def load(*args, **settings) -> kd.Ranker:
        loaded.append(settings.pop("is_distributed"))
        return from_pretrained(*args, **settings)

    state = SimpleNamespace(num_processes=2, is_main_process=False, device="cpu", wait_for_everyone=lambda: None)
    for module in (suites, evaluate_verb):
        monkeypatch.setattr(module, "processes", lambda: state)
    monkeypatch.setattr(kd.Ranker, "from_pretrained", load)
    status, out, err = call(f"evaluate --suite {suite} --k 7 --model {tmp_path}/first --results {tmp_path}/out")
    assert (status, out, loaded) == (0, "", [True]), err
    assert not list((tmp_path / "out").iterdir())


def test_suite_resumes_and_adds_rankers(call, suite, rankers, tmp_path, monkeypatch):
    command = f"evaluate --suite {suite} --results {tmp_path}/out --k 7 --model {tmp_path}/first"
    shutil.move(suite / "b", tmp_path / "b")
    assert call(command)[0] == 0
    shutil.move(tmp_path / "b", suite / "b")
    opened, open_set = [], suites.Suite.open
    monkeypatch.setattr(suites.Suite, "open", lambda self, source: opened.append(source) or open_set(self, source))
    status, out, _ = call(f"{command} --json")
    assert (status, opened) == (0, [str(suite / "b")])
    first = json.loads(out.splitlines()[-1])["rankers"]
    assert set(first["first"]["nDCG@10"]) == {"a", "b"}
    loaded = []
    monkeypatch.setattr("hf_kd_ranking.cli.options.load_ranker", lambda *_, **__: loaded.append(1))
    status, out, _ = call(f"{command} --json")
    assert (status, opened, loaded) == (0, [str(suite / "b")], [])
    assert json.loads(out.splitlines()[-1])["rankers"] == first
    monkeypatch.undo()
    status, out, _ = call(f"{command} {tmp_path}/second --json")
    assert (status, set(json.loads(out.splitlines()[-1])["rankers"])) == (0, {"first_stage", "first", "second"})


def test_suite_finishes_the_sets_beside_a_broken_one(call, suite, rankers, tmp_path):
    (suite / "a2" / "qrels").mkdir(parents=True)
    command = f"evaluate --suite {suite} --results {tmp_path}/out --k 7 --model {tmp_path}/first --json"
    status, out, err = call(command)
    result = json.loads(out.splitlines()[-1])
    assert status == 1
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: a2: {suite}/a2 lacks ")
    assert (result["sets"], list(result["failed"])) == (["a", "b"], ["a2"])
    write_qrels({"100": {"77": 1}, "101": {"78": 1}}, suite / "b" / "qrels.txt")  # documents that are not there
    shutil.rmtree(suite / "a2")
    shutil.rmtree(tmp_path / "out")
    status, out, _ = call(command)
    assert (status, list(json.loads(out.splitlines()[-1])["failed"])) == (1, ["b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--suite {folder}/none --results {folder}/out --model {folder}/first", "none': give a folder of collections"),
        ("--suite {folder}/first --results {folder}/out --model {folder}/first", "first is empty: it needs a folder"),
        ("--suite {folder} --results {folder}/out --model {folder}/first", "No set of {folder} can be measured; "),
        ("--suite {folder}/suite --model {folder}/first", "A suite needs --suite, --model and --results"),
        ("--suite {folder}/suite --results {folder}/out", "A suite needs --suite, --model and --results"),
        ("--results {folder}/none", "none, the folder of results, does not exist"),
        ("--suite {folder}/suite --run x --model y --results z", "with --suite does not read --run; leave out"),
        (
            "--suite {suite} --model {folder}/first --aggregation max",
            "--suite does not read --aggregation;",
        ),
        (
            "--results {folder}/old --measure RR@10 --k 5",
            "--results alone does not read --measure, --k;",
        ),
        ("--results {folder}/old --model {folder}/first", "--results alone does not read --model; leave out"),
        (
            "--results {folder}/old --config {folder}/options.yaml",
            "--results alone does not read --retrieve;",
        ),
        ("--suite {suite} --model first_stage={folder}/first", "first_stage is the name of the first stage"),
        ("--suite {suite} --model me/mine={folder}/first", "The name 'me/mine' cannot be that of a results file"),
        ("--suite {suite} --model {folder}/first --k 8", "old/first_stage.json has results with another k; give"),
        ("--suite {suite} --model {folder}/first --dtype bf16", "results with another dtype; give another folder"),
        ("--suite {suite} --model first={folder}/second", "old/first.json has the results of another ranker"),
        ("--suite {suite} --model {folder}/cat --retrieve", "another retrieve"),
        (
            "--suite {folder}/suite --model {folder}/cat --results {folder}/new --retrieve",
            "re-ranks and cannot search",
        ),
        (
            "--suite nanobeir --model {folder}/first --results {folder}/new",
            "error: No collection 'zeta-alpha-ai/NanoArguAna'",
        ),
        ("--results {folder}/first", "config.json is not a results file of version 2; move it"),
        ("--results {folder}/damaged", "a.json is damaged: it lacks settings or sets"),
        ("", "Give --run, or --suite with --model and --results."),
    ],
)
def test_suite_refuses_bad_input_in_one_line(call, suite, rankers, encoder, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    lengths = {"max_query_length": 8, "max_document_length": 16}
    cat = kd.Ranker(kd.load_ranker(encoder, "bert_cat", **lengths), rankers["first"].tokenizer)
    cat.save_pretrained(tmp_path / "cat")
    (tmp_path / "options.yaml").write_text("retrieve: true")
    (tmp_path / "damaged").mkdir()
    write_json(tmp_path / "damaged" / "a.json", {"kind": suites.KIND, "version": suites.VERSION, "sets": {}})
    old = f"{suite} --results {tmp_path}/old"
    assert call(f"evaluate --suite {old} --k 7 --model {tmp_path}/first")[0] == 0
    if "--k" not in options:
        old += " --k 7"
    status, _, err = call(f"evaluate {options.format(folder=tmp_path, suite=old)}")
    line = err.splitlines()[-1]
    assert (status, message.format(folder=tmp_path) in line, "Traceback" in err) == (2, True, False), err


PARTS = ["collection.tsv", "queries.tsv", "qrels.txt", "candidates.trec"]


@pytest.mark.parametrize("name", PARTS)
def test_suite_refuses_results_on_other_data(call, suite, rankers, tmp_path, name):
    command = f"evaluate --suite {suite} --results {tmp_path}/out --k 7"
    assert call(f"{command} --model {tmp_path}/first")[0] == 0
    path = suite / "a" / name
    before = path.read_text()
    path.write_text(before.replace("112\t", "112\tmoon ").replace("\n39\t", "\n39\tmoon ").replace(" 2\n", " 3\n"))
    if name == "candidates.trec":
        path.write_text("".join(before.splitlines(keepends=True)[:-1]))
    assert path.read_text() != before
    for models in (f"{tmp_path}/first", f"{tmp_path}/first {tmp_path}/second"):
        status, _, err = call(f"{command} --model {models}")
        wanted = f"error: {tmp_path}/out/first_stage.json has results on other data of the set a; give another folder"
        assert (status, err.splitlines()[-1]) == (2, f"{wanted} of results.")
    assert not (tmp_path / "out" / "second.json").exists()
    # Nor does the table mix them.
    assert call(f"evaluate --suite {suite} --results {tmp_path}/new --k 7 --model {tmp_path}/second")[0] == 0
    shutil.copy(tmp_path / "new" / "second.json", tmp_path / "out")
    status, _, err = call(f"evaluate --results {tmp_path}/out")
    assert (status, "out/second.json has results on other data of the set a" in err) == (2, True)
    path.write_text(before)
    (tmp_path / "out" / "second.json").unlink()
    assert call(f"{command} --model {tmp_path}/first")[0] == 0


def test_suite_leaves_out_documents_of_their_queries(suite, rankers, tmp_path):
    (suite / "b").rename(suite / "arguana")
    texts = "".join(f"{100 + i}\t{'apple bread'}\n" for i in range(4))
    (suite / "arguana" / "queries.tsv").write_text(texts)
    (suite / "arguana" / "collection.tsv").write_text(texts)
    write_qrels({"100": {"101": 1}, "102": {"103": 1}}, suite / "arguana" / "qrels.txt")
    for retrieve in (False, True):
        opened = suites.Suite(str(suite), retrieve=retrieve, k=3).open(str(suite / "arguana"))
        rank = opened.evaluator.retrieve if retrieve else opened.evaluator.rerank
        for run in (opened.candidates, rank(rankers["first"])):
            assert {query: {doc for doc, _ in ranking} for query, ranking in run.items()} == {
                "100": {"101", "102", "103"},
                "102": {"100", "101", "103"},
            }


def test_suite_leaves_out_documents_by_the_name_of_the_set_only(call, toy, rankers, tmp_path):
    folder = tmp_path / "quora" / "suite"
    for name in ("a", "NanoArguAna"):
        shutil.copytree(toy, folder / name)
    command = f"evaluate --suite {folder} --results {tmp_path}/out --k 7 --model {tmp_path}/first"
    status, _, err = call(command)
    assert status == 0, err
    sets = read_json(tmp_path / "out" / "first.json")["sets"]
    assert {name: measured["exclude_same_id"] for name, measured in sets.items()} == {"NanoArguAna": True, "a": False}


def test_suite_does_not_take_a_full_disk_for_broken_data(call, suite, rankers, tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(suites, "write_json", fail)
    status, out, err = call(f"evaluate --suite {suite} --results {tmp_path}/out --model {tmp_path}/first --k 7")
    assert (status, out, err.splitlines()[-1]) == (1, "", "error: No space left on device")


def test_suite_names_of_the_hub_are_complete():
    sets = {name: suites.Suite(name).sets() for name in suites.SUITES}
    assert {name: len(of) for name, of in sets.items()} == {"nanobeir": 13, "beir": 13}
    assert sets["nanobeir"]["SciFact"] == "zeta-alpha-ai/NanoSciFact"
    assert sets["beir"]["scifact"] == "mteb/scifact"


@pytest.mark.parametrize("model", ["bert_dot"], indirect=True)
def test_suite_evaluator_chooses_the_best_model(suite, model, make_trainer, tokenizer):
    evaluator = SuiteEvaluator.load(str(suite), k=7)
    values = evaluator(kd.Ranker(model, tokenizer))
    assert values["nDCG@10"] == pytest.approx((values["a_nDCG@10"] + values["b_nDCG@10"]) / 2)
    for name, run in wanted_runs(suite, kd.Ranker(model, tokenizer), False).items():
        wanted = kd.evaluate_run(run, kd.read_qrels(suite / name / "qrels.txt"))
        assert values[f"{name}_RR@10"] == pytest.approx(wanted["RR@10"], abs=1e-6)
    trainer = make_trainer(
        model,
        {"evaluator": evaluator},
        max_steps=3,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_nDCG@10",
        load_best_model_at_end=True,
    )
    trainer.train()
    logged = [entry["eval_nDCG@10"] for entry in trainer.state.log_history if "eval_nDCG@10" in entry]
    assert len(set(logged)) > 1
    assert trainer.state.best_metric == max(logged)
    assert evaluator(trainer.ranker)["nDCG@10"] == pytest.approx(max(logged))
    with pytest.raises(FileNotFoundError, match="b lacks "):
        (suite / "b" / "qrels.txt").unlink()
        SuiteEvaluator.load(str(suite))
