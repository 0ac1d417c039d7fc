"""Texts and ids of other scripts, and emoji, survive every path from a file to an answer."""

import json
import unicodedata
from pathlib import Path

import datasets
import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hf_kd_ranking as kd
from hf_kd_ranking.serving.app import make_app
from hf_kd_ranking.serving.model import ServedModel
from hf_kd_ranking.serving.service import Service

# Three passages each; every one is the query of its own.
TEXTS = {
    "arabic": ("القاهرة عاصمة مصر", "يُكتب من اليمين إلى اليسار", "الخبز والملح على المائدة"),
    "chinese": ("北京大学的自然语言处理", "今天的天气非常好", "面包和盐在桌子上"),
    "hindi": ("हिन्दी भारत की भाषा है", "क्षेत्र में बारिश हो रही है", "मेज़ पर रोटी और नमक"),
    "japanese": ("東京タワーの夜景", "カメラを買いました。が美しい", "パンと塩がテーブルに"),
    "thai": ("ภาษาไทยสวยงาม", "ที่นี่ฝนตกหนัก", "ขนมปังกับเกลือ"),
    "emoji": ("party 🎉🥳", "family 👩‍👩‍👧 at home 🏡", "flag 🏳️‍🌈 and hand 👍🏽"),
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def ranker() -> kd.Ranker:
    """A bi-encoder of random weights that reads bytes; the cosine of a text with itself is the largest."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), initializer_range=0.5, **sizes)
    lengths = {"max_query_length": 128, "max_document_length": 128}
    model = kd.BertDot(kd.BertDotConfig(encoder_config=config, pooling="mean", normalize=True, **lengths))
    model.bert_model.load_state_dict(BertModel(config, add_pooling_layer=False).state_dict())
    return kd.Ranker(model.eval(), tokenizer)


@pytest.fixture(params=TEXTS)
def data(request, ranker, tmp_path) -> Path:
    """A folder with a ranker, and a collection in BEIR's layout whose ids are in the script as well."""
    texts = TEXTS[request.param]
    start = unicodedata.normalize("NFC", texts[0].split()[-1])
    folder = tmp_path / "suite" / texts[0].split()[0]
    (folder / "qrels").mkdir(parents=True)
    lines = {"corpus": [], "queries": []}
    qrels, rows = "query-id\tcorpus-id\tscore\n", ""
    for place, text in enumerate(texts):
        lines["corpus"].append({"_id": f"{start}{place}", "title": "", "text": text})
        lines["queries"].append({"_id": f"?{start}{place}", "text": text})
        qrels += f"?{start}{place}\t{start}{place}\t1\n"
        rows += f"?{start}{place}\t{start}{place}\t{start}{(place + 1) % 3}\n"
    for name, content in lines.items():
        written = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(written, encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    (tmp_path / "triples.tsv").write_text(rows, encoding="utf-8")
    ranker.save_pretrained(tmp_path / "model")
    return folder


def items(store: kd.TextStore) -> list[tuple[str, str]]:
    return list(store.items())


def read_stores(data: Path, call, ranker) -> None:
    """TSV, JSON lines with and without escapes, and data sets give the same texts."""
    rows = [json.loads(line) for line in (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = [(row["_id"], row["text"]) for row in rows]
    (data / "c.tsv").write_text("".join(f"{id_}\t{text}\n" for id_, text in wanted), encoding="utf-8")
    (data / "escaped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.Dataset.from_list(rows)
    stores = [kd.TextStore.from_file(data / name) for name in ("corpus.jsonl", "c.tsv", "escaped.jsonl")]
    stores.append(kd.TextStore.from_dataset(dataset, data / "store", id_column="_id"))
    assert [items(store) for store in stores] == [wanted] * 4


def run_of(data: Path, call, command: str) -> None:
    """A verb that writes a run finds for every query its own text."""
    status, _, err = call(f"{command} --output {data}/run.trec")
    assert status == 0, err
    assert kd.evaluate_run(kd.read_run(data / "run.trec"), kd.read_qrels(data / "qrels" / "test.tsv"))["RR@10"] == 1


def search_bm25(data: Path, call, ranker) -> None:
    """`index` and `search` by words."""
    for language in ("", "--language auto"):
        assert call(f"index --dataset {data} --output {data}/bm25 --overwrite {language}")[0] == 0
        run_of(data, call, f"search --dataset {data} --index {data}/bm25 --overwrite")


def search_vectors(data: Path, call, ranker) -> None:
    """`index` and `search` by vectors."""
    model = f"--model {data.parents[1]}/model"
    assert call(f"index {model} --dataset {data} --output {data}/vectors")[0] == 0
    run_of(data, call, f"search {model} --dataset {data} --index {data}/vectors")


def rerank(data: Path, call, ranker) -> None:
    """`rerank` of BM25's candidates, and the page of `report`, which shows the texts."""
    run_of(data, call, f"rerank --model {data.parents[1]}/model --dataset {data}")
    (data / "runs").mkdir()
    for name in ("one", "two"):
        (data / "runs" / f"{name}.trec").write_bytes((data / "run.trec").read_bytes())
    files = {name: data / f"{file}.jsonl" for name, file in (("queries", "queries"), ("collection", "corpus"))}
    kd.write_report(data, data / "report.html", files=files | {"qrels": data / "qrels" / "test.tsv"})
    page = (data / "report.html").read_text(encoding="utf-8")
    for text in kd.TextStore.from_file(data / "queries.jsonl").texts.to_pylist():
        assert text in page or json.dumps(text)[1:-1] in page


def measure_suite(data: Path, call, ranker) -> None:
    """`evaluate --suite`: the name of the set is in the script."""
    folder = data.parents[1]
    command = f"evaluate --suite {data.parent} --model {folder}/model --results {folder}/out --retrieve --json"
    status, out, err = call(command)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["rankers"]["model"]["nDCG@10"] == {data.name: 1.0}


def score_and_train(data: Path, call, ranker) -> None:
    """`teacher score` writes rows, and `train` reads them and writes its held-out run."""
    folder = data.parents[1]
    texts = f"--collection {data}/corpus.jsonl --queries {data}/queries.jsonl"
    command = (
        f"teacher score --model {folder}/model --triples {folder}/triples.tsv {texts} --output {folder}/scores.tsv"
    )
    status, _, err = call(command)
    assert status == 0, err
    rows = kd.load_teacher_scores(folder / "scores.tsv")
    assert rows[0]["query_id"].startswith("?") and rows[0]["teacher_scores"][0] == max(rows[0]["teacher_scores"])
    run_of(data, call, f"rerank --model {folder}/model --dataset {data}")
    command = f"train --model {folder}/model --scores {folder}/scores.tsv {texts} --output {folder}/trained"
    command += f" --candidates {data}/run.trec --qrels {data}/qrels/test.tsv --max-steps 1 --use-cpu"
    status, _, err = call(command)
    assert status == 0, err
    assert len(kd.read_run(folder / "trained" / "runs" / "held_out.trec")) == 3


def serve(data: Path, call, ranker) -> None:
    """The rerank API returns the texts that it was given."""
    texts = kd.TextStore.from_file(data / "corpus.jsonl").texts.to_pylist()
    service = Service(lambda progress: ServedModel("model", ranker))
    with TestClient(make_app(service, None, None), base_url="http://localhost") as client:
        while client.get("/health").status_code == 503:
            pass
        for place, text in enumerate(texts):
            answer = client.post("/v1/rerank", json={"query": text, "documents": texts, "return_documents": True})
            best = answer.json()["results"][0]
            assert (best["index"], best["document"]["text"]) == (place, text)


PATHS = [read_stores, search_bm25, search_vectors, rerank, measure_suite, score_and_train, serve]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_texts_of_every_script_survive_the_path(data, path, call, ranker):
    path(data, call, ranker)
