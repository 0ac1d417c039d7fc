"""`serve` as a process: answers, signals, a folder for Docker that serves the same, and bad input in one line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import yaml

import hf_kd_ranking as kd
from hf_kd_ranking.cli.serve import KEY
from hf_kd_ranking.searcher import load_pipeline


@pytest.fixture
def folder(model, tokenizer, toy, tmp_path):
    """A folder with the model, its vectors and the collection."""
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    kd.VectorStore.build(ranker, kd.TextStore.from_tsv(toy / "collection.tsv"), tmp_path / "index")
    return tmp_path


@contextmanager
def served(arguments, cwd, **environment):
    """Run the verb until it is ready; yields the process and its address."""
    command = [sys.executable, "-m", "hf_kd_ranking", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"} | environment
    environment["HF_DATASETS_CACHE"] = str(cwd / "cache")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=cwd, text=True, env=environment, **pipes)
    try:
        address = json.loads(process.stdout.readline())["address"]
        while httpx.get(f"{address}/health", timeout=60).status_code == 503:
            time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_docker_folder_serves_page_and_32_clients_until_sigterm(call, folder, toy, model, tokenizer):
    """Every answer is that of its own request; a request that runs when the signal comes is answered."""
    options = f"--model {folder}/model --collection {toy}/collection.tsv --index {folder}/index --rerank --fuse --k 9"
    options += f" --queries {toy}/queries.tsv"
    status, out, err = call(f'serve {options} --title A:"B" --docker {folder}/image --json')
    assert status == 0, err
    assert "building a BM25 index of 40 documents" in err
    assert json.loads(out.splitlines()[-1]) == {"docker": f"{folder}/image"}
    header = yaml.safe_load((folder / "image" / "README.md").read_text().split("---")[1])
    assert (header["sdk"], header["app_port"], header["title"]) == ("docker", 8000, 'A:"B"')
    assert (folder / "image" / "package" / "hf_kd_ranking" / "serving" / "static" / "page.js").is_file()
    assert not list((folder / "image").rglob("*.pyc"))
    arguments = read_command(folder / "image", "retrieval,serve")
    ranker, documents = kd.Ranker(model, tokenizer), kd.TextStore.from_tsv(toy / "collection.tsv")
    query = kd.TextStore.from_tsv(toy / "queries.tsv")["101"]
    with served(arguments, folder / "image", **{KEY: "key"}) as (process, address):
        client = httpx.Client(base_url=address, timeout=60, headers={"Authorization": "Bearer key"})
        assert "<form" in client.get("/").text
        about = client.get("/about").json()
        assert (len(about["examples"]), about["name"], about["documents"]) == (4, "model", 40)
        results = client.post("/search", json={"query": query}).json()
        pipeline = load_pipeline(folder / "image" / "pipeline" / "model")
        assert [hit["doc_id"] for hit in results["hits"]] == [doc_id for doc_id, _ in pipeline.search(query)]
        assert "reading vectors" in results["stages_ms"]
        check_many_clients(client, ranker, [documents[str(place)] for place in range(40)])
        texts = [f"{documents[str(place % 40)]} {place}" for place in range(1_000)]
        with ThreadPoolExecutor() as pool:
            before = read_batches(client)
            running = pool.submit(client.post, "/rerank", json={"query": query, "texts": texts, "raw_scores": True})
            while read_batches(client) == before and not running.done():
                pass
            process.send_signal(signal.SIGTERM)
            answer = running.result(60)
        assert process.wait(60) == -signal.SIGTERM
        log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
    assert [result["score"] for result in answer.json()] == pytest.approx(
        np.sort(ranker.score(query, texts))[::-1], abs=1e-4
    )
    assert sum(line["path"] == "/rerank" and line["status"] == 200 for line in log) == 321


def check_many_clients(client, ranker, texts):
    """Send 320 requests of 32 clients, half of them by id, and compare every answer with the ranker's."""
    cases = []
    for number in range(320):
        rows = [(7 * number + step) % 40 for step in range(1 + number % 7)]
        cases.append((texts[number % 40] + f" {number}", rows, number % 2 == 0))

    def ask(case):
        query, rows, is_by_id = case
        sent = [{"id": str(row)} if is_by_id else texts[row] for row in rows]
        answer = client.post("/rerank", json={"query": query, "documents": sent, "raw_scores": True})
        assert answer.status_code == 200, answer.text
        return {result["index"]: result["relevance_score"] for result in answer.json()["results"]}

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, cases))
    for (query, rows, _), answer in zip(cases, answers, strict=True):
        scores = ranker.score(query, [texts[row] for row in rows])
        assert [answer[place] for place in range(len(rows))] == pytest.approx(scores, abs=1e-4)


def read_batches(client):
    return re.search(r"^ranking_batch_jobs_count (.*)$", client.get("/metrics").text, re.MULTILINE).group(1)


def read_command(image, extras):
    """Return the command of a Dockerfile, with a free port of this machine."""
    docker = (image / "Dockerfile").read_text()
    assert f'RUN pip install --no-cache-dir "./package[{extras}]"' in docker
    verb, *arguments = json.loads(re.search(r"^CMD (\[\"hf.*)$", docker, re.MULTILINE).group(1))
    assert (verb, arguments[0], arguments[arguments.index("--port") + 1]) == ("hf-kd-ranking", "serve", "8000")
    arguments[arguments.index("--port") + 1] = "0"
    arguments[arguments.index("--host") + 1] = "127.0.0.1"
    return arguments


@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_docker_folder_of_the_api_alone(call, folder):
    for options, extras in (("", "serve"), (f"--index {folder}/index", "retrieval,serve")):
        image = folder / f"image{len(options)}"
        status, _, err = call(f"serve --model name={folder}/model {options} --docker {image}")
        assert status == 0, err
        arguments = read_command(image, extras)
        assert arguments[arguments.index("--model") + 1] == "name=model"
        kd.Ranker.from_pretrained(image / "model")
        assert ("--index" in arguments) == bool(options) == (image / "index").is_dir()


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_serve_builds_bm25_in_the_language(call, folder):
    (folder / "texts.tsv").write_text("1\tdie Häuser am Rand der Stadt\n2\tder Baum wird groß\n", encoding="utf-8")
    options = f"--model {folder}/model --collection {folder}/texts.tsv --language auto --docker {folder}/image"
    status, _, err = call(f"serve {options}")
    assert status == 0, err
    pipeline = load_pipeline(folder / "image" / "pipeline" / "model")
    assert pipeline.first_stage.description["language"] == "german"


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_serve_refuses_bad_input_in_one_line(call, folder, toy, encoder):
    other = kd.load_ranker(encoder, "bert_dot", max_document_length=16)
    kd.Ranker(other, kd.Ranker.from_pretrained(folder / "model").tokenizer).save_pretrained(folder / "other")
    collection, model = f"--collection {toy}/collection.tsv", f"--model {folder}/model"
    (folder / "few.tsv").write_text("1\tapple\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in [
            (collection, "Give --model, or --pipeline."),
            (
                f"--pipeline {folder}/none {model} --k 5 --fuse",
                "--pipeline has all its parts and settings; leave out --model, --fuse, --k.",
            ),
            (f"--pipeline {folder}/model --port 0", "model has no pipeline.json, so it is not a pipeline"),
            (
                f"{model} {collection} --port {port}",
                f"Cannot listen at 127.0.0.1, port {port}: Address",
            ),
            (f"{model} --port 0 --k 5 --fuse", "Give --collection, or --dataset, which --fuse, --k would search."),
            (f"--model x={folder}/none", "none does not exist; give a folder, or a name on the Hub"),
            (f"{model} --port 0 {collection} --index {folder}/none", "none/artifact.json does not exist"),
            (
                f"--model {folder}/other --port 0 {collection} --index {folder}/index",
                "index was built by another model: architecture TK there, BERT_Dot here",
            ),
            (
                f"{model} --port 0 --collection {folder}/few.tsv --candidates {folder}/bm25",
                "these have different ones: documents: few.tsv (fingerprint",
            ),
            (
                f"{model} --port 0 --collection {folder}/few.tsv --index {folder}/index",
                f"{folder}/index: collection.tsv (fingerprint",  # before a BM25 index is built
            ),
            (f"{model} {collection} --docker {folder}/model", "model exists"),
            (f"{model} --docker {folder}/none {collection} --language klingon", "The language is one of arabic, "),
            (f"{model} --port 0 --language auto", "Give --collection, or --dataset, which --language would search."),
            (
                f"{model} --docker {folder}/none {collection} --candidates {folder}/bm25 --language auto",
                "--language is for a BM25 index that serve builds; --candidates has its own.",
            ),
            (
                f"{model} --docker {folder}/none {collection} --index {folder}/index --settings nprobe=4",
                "--settings and --probes are for an --index that the ranker searches.",
            ),
            (
                f"{model} --docker {folder}/none {collection} --index {folder}/index --probes 4",
                "--settings and --probes are for an --index that the ranker searches.",
            ),
        ]:
            if "bm25" in options and not (folder / "bm25").exists():
                kd.BM25Index.build(kd.TextStore.from_tsv(toy / "collection.tsv")).save(folder / "bm25")
            status, _, err = call(f"serve {options}")
            lines = err.splitlines()
            assert (status, message in lines[-1], "Traceback" in err) == (2, True, False), err


@pytest.mark.parametrize("model", ["tk"], indirect=True)
def test_serve_names_the_missing_library(call, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for name in ("service", "app", "api"):
        monkeypatch.delitem(sys.modules, f"hf_kd_ranking.serving.{name}", raising=False)
    status, _, err = call(f"serve --model {folder}/model")
    assert (status, err.splitlines()[-1]) == (
        2,
        "error: serve needs prometheus_client: pip install 'hf_kd_ranking[serve]'.",
    )
