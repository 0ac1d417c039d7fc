"""`serve` as a process: a page that answers, a Space that runs the same, and bad input in one line."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest
import yaml

import hf_kd_ranking as kd


@pytest.fixture
def folder(model, tokenizer, toy, tmp_path):
    """A folder with the model, its vectors and the collection."""
    ranker = kd.Ranker(model, tokenizer)
    ranker.save_pretrained(tmp_path / "model")
    kd.VectorStore.build(ranker, kd.TextStore.from_tsv(toy / "collection.tsv"), tmp_path / "index")
    return tmp_path


@contextmanager
def served(arguments, cwd):
    """Run the verb; yields what it says, once it listens."""
    command = [sys.executable, "-m", "hf_kd_ranking", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(cwd / "cache")
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


def fetch(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["colbert"], indirect=True)
def test_a_space_finds_what_serve_finds(call, folder, toy):
    options = f"--model {folder}/model --collection {toy}/collection.tsv --index {folder}/index --rerank --fuse --k 9"
    options += f" --queries {toy}/queries.tsv"
    status, out, err = call(f'serve {options} --title A:"B" --space {folder}/space --json')
    assert status == 0, err
    assert "building a BM25 index of 40 documents" in err
    assert json.loads(out.splitlines()[-1]) == {"space": f"{folder}/space", "documents": 40}
    header = yaml.safe_load((folder / "space" / "README.md").read_text().split("---")[1])
    assert (header["sdk"], header["app_port"], header["title"]) == ("docker", 7860, 'A:"B"')
    docker = (folder / "space" / "Dockerfile").read_text()
    assert 'RUN pip install --no-cache-dir "./package[retrieval,serve]"' in docker
    package = folder / "space" / "package"
    assert (package / "setup.cfg").is_file()
    assert (package / "hf_kd_ranking" / "serving" / "static" / "page.js").is_file()
    assert not list((folder / "space").rglob("*.pyc"))
    verb, *arguments = json.loads(re.search(r"^CMD (.*)$", docker, re.MULTILINE).group(1))
    assert (verb, arguments[0], arguments[arguments.index("--port") + 1]) == ("hf-kd-ranking", "serve", "7860")
    arguments[arguments.index("--port") + 1] = "0"
    arguments[arguments.index("--host") + 1] = "127.0.0.1"
    query = kd.TextStore.from_tsv(toy / "queries.tsv")["101"]
    found = []
    for command, cwd in [(arguments, folder / "space"), (["serve", *options.split(), "--port", "0"], folder)]:
        with served(command, cwd) as said:
            assert said["documents"] == 40
            assert "<form" in fetch(f"{said['address']}/")
            about = json.loads(fetch(f"{said['address']}/api/about"))
            assert (len(about["examples"]), about["name"]) == (4, "model")
            results = json.loads(fetch(f"{said['address']}/api/search?q={urllib.parse.quote(query)}"))
            found.append(results["hits"])
            assert "reading vectors" in results["stages_ms"]
    assert found[0] == found[1] != []


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
            (f"{model} --port 0", "Give --collection, or --dataset."),
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
            (f"{model} {collection} --space {folder}/model", "model exists"),
            (
                f"{model} --space {folder}/none {collection} --index {folder}/index --settings nprobe=4",
                "--settings and --probes are for an --index that the ranker searches.",
            ),
            (
                f"{model} --space {folder}/none {collection} --index {folder}/index --probes 4",
                "--settings and --probes are for an --index that the ranker searches.",
            ),
        ]:
            if "bm25" in options:
                kd.BM25Index.build(kd.TextStore.from_tsv(toy / "collection.tsv")).save(folder / "bm25")
            status, _, err = call(f"serve {options}")
            lines = err.splitlines()
            assert (status, message in lines[-1], "Traceback" in err) == (2, True, False), err
