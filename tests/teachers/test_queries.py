"""Generated queries: what writes them, which are left out, and the files that they become."""

import json
from pathlib import Path

import pytest
import torch
from test_load import llama
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import hf_kd_ranking as kd
from hf_kd_ranking.data.texts import read_titles, scripts
from hf_kd_ranking.errors import InputError
from hf_kd_ranking.teachers import queries as module
from hf_kd_ranking.teachers.generators import QueryGenerator, load_generator, read_lines
from hf_kd_ranking.teachers.prompts import QUERIES_TEMPLATE, QueryPrompt
from hf_kd_ranking.teachers.queries import generate_queries

DOCUMENTS = {
    "d1": "Cats sleep all day. They hunt at night.",
    "d2": "Кошки спят весь день.",
    "d3": "Rain falls on the river. The river is long.",
    "d4": "River rain.",
}


@pytest.fixture
def store(tmp_path) -> kd.TextStore:
    (tmp_path / "collection.tsv").write_text("".join(f"{doc}\t{text}\n" for doc, text in DOCUMENTS.items()))
    return kd.TextStore.from_tsv(tmp_path / "collection.tsv")


def written_by(queries: dict[str, list[str]]) -> QueryGenerator:
    """A generator that writes the given queries of each document."""
    of_text = {DOCUMENTS[doc_id]: of_document for doc_id, of_document in queries.items()}
    return QueryGenerator("hand", lambda texts, titles, seed: [of_text.get(text, []) for text in texts], "hand")


def read(path: Path) -> dict[str, str]:
    return dict(line.split("\t") for line in path.read_text().splitlines())


# ---- What is left out -----------------------------------------------------------------------------------------------


def test_bad_queries_are_left_out_and_counted(store, tmp_path):
    generator = written_by(
        {
            "d1": ["when do  cats\tsleep", "", " ?! ", "cats sleep ALL day.  They hunt at night."],
            "d2": ["when do cats sleep in Russia", "когда спят кошки"],
            "d3": ["where does rain fall", "12 3"],
        }
    )
    counts = generate_queries(generator, store, tmp_path / "q.tsv")
    assert read(tmp_path / "q.tsv") == {
        "d1-q1": "when do cats sleep",
        "d2-q1": "когда спят кошки",
        "d3-q1": "where does rain fall",
        "d3-q2": "12 3",  # has no script
    }
    assert kd.read_qrels(tmp_path / "q.qrels.txt") == {
        f"{d}-q{n}": {d: 1} for d, n in zip(["d1", "d2", "d3", "d3"], [1, 1, 1, 2], strict=True)
    }
    wanted = {"documents": 4, "generated": 8, "empty": 2, "equal_to_document": 1, "other_script": 1}
    wanted |= {"near_duplicates": 0, "not_found": 0, "queries": 4, "documents_without_query": 1}
    assert counts == wanted
    description = json.loads((tmp_path / "q.json").read_text())
    assert wanted.items() <= description.items()
    assert (description["generator"], description["is_weak"], description["round_trip"]) == ("hand", False, None)


def test_near_duplicates_share_four_fifths_of_their_words(store, tmp_path):
    generator = written_by(
        {
            "d1": ["a b c d e", "E d c b, A!", "a b c d f", "b c d e"],  # the same; 4 of 6; 4 of 5
            "d3": ["a b c d e", "x y"],
        }
    )
    counts = generate_queries(generator, store, tmp_path / "q.tsv")
    assert read(tmp_path / "q.tsv") == {"d1-q1": "a b c d e", "d1-q2": "a b c d f", "d3-q1": "x y"}
    assert counts["near_duplicates"] == 3


def test_near_duplicates_are_those_of_all_pairs(store, tmp_path):
    """The words that are looked up leave no pair out."""
    rng = torch.Generator().manual_seed(0)
    queries = []
    for _ in range(300):
        queries.append(" ".join(f"w{word}" for word in torch.randint(0, 9, (6,), generator=rng).tolist()))
    kept = []
    for query in queries:
        words = set(query.split())
        if all(len(words & set(other.split())) < 0.8 * len(words | set(other.split())) for other in kept):
            kept.append(query)
    generate_queries(written_by({"d1": queries}), store, tmp_path / "q.tsv")
    assert list(read(tmp_path / "q.tsv").values()) == kept


def test_round_trip_keeps_queries_that_find_their_document(store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROUND_TRIPS_AT_ONCE", 2)
    generator = written_by({"d3": ["long", "rain river", "snow"], "d4": ["rain"]})
    search = kd.BM25Index.build(store).search
    for rank in (2, 1):
        output = tmp_path / f"{rank}.tsv"
        counts = generate_queries(generator, store, output, search=search, round_trip=rank)
        wanted = ["long"]
        for query, doc_id in (("rain river", "d3"), ("rain", "d4")):
            if doc_id in dict(search({"q": query}, rank)["q"]):
                wanted.append(query)
        assert list(read(output).values()) == wanted and len(wanted) == rank + 1
        assert counts["not_found"] == 4 - len(wanted)


def test_no_query_left_is_an_error_without_files(store, tmp_path):
    with pytest.raises(InputError, match=r"No query is left of hand's: documents 4, generated 1, empty 1"):
        generate_queries(written_by({"d1": [""]}), store, tmp_path / "q.tsv")
    assert [path.name for path in tmp_path.glob("q.*")] == ["q.tsv.parts"]  # what a model wrote is kept


@pytest.mark.parametrize("existing", ["q.tsv", "q.qrels.txt", "q.json"])
def test_existing_files_are_kept(store, tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    with pytest.raises(FileExistsError, match=existing):
        generate_queries(load_generator("first_sentence"), store, tmp_path / "q.tsv")
    assert (tmp_path / existing).read_text() == "mine"
    generate_queries(load_generator("first_sentence"), store, tmp_path / "q.tsv", overwrite=True)


def test_call_that_ended_while_it_wrote_is_repeated(store, tmp_path, monkeypatch):
    def stop(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            generate_queries(load_generator("first_sentence"), store, tmp_path / "q.tsv")
    assert (tmp_path / "q.qrels.txt").exists() and not (tmp_path / "q.tsv").exists()
    counts = generate_queries(load_generator("first_sentence"), store, tmp_path / "q.tsv")
    assert len(read(tmp_path / "q.tsv")) == counts["queries"] > 0


def test_scripts_of_a_text():
    assert scripts("Ab1 \uff21") == {"LATIN": 3}
    assert scripts("猫とネコ") == {"CJK": 4}
    assert scripts("да, no") == {"CYRILLIC": 2, "LATIN": 2}


# ---- Fallbacks ------------------------------------------------------------------------------------------------------


def test_first_sentence_is_weak_and_leaves_titles_out(tmp_path):
    rows = [
        {"_id": "a", "title": "A title.", "text": "1. Early. This one is long enough. The rest."},
        {"_id": "b", "title": "", "text": "第一の文はこれである、そして十分に長い。次の文。"},
        {"_id": "c", "title": "Only a title", "text": ""},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, titles = kd.TextStore.from_file(tmp_path / "c.jsonl"), read_titles(tmp_path / "c.jsonl")
    counts = generate_queries(load_generator("first_sentence"), store, tmp_path / "s.tsv", titles)
    assert read(tmp_path / "s.tsv") == {
        "a-q1": "1. Early. This one is long enough.",
        "b-q1": "第一の文はこれである、そして十分に長い。",
    }
    assert counts["empty"] == 1 and json.loads((tmp_path / "s.json").read_text())["is_weak"]
    counts = generate_queries(load_generator("title"), store, tmp_path / "t.tsv", titles)
    assert read(tmp_path / "t.tsv") == {"a-q1": "A title."}
    assert (counts["empty"], counts["equal_to_document"]) == (1, 1)


def test_title_needs_titles(store, tmp_path):
    with pytest.raises(InputError, match=r"collection\.tsv has no titles; .* take the fallback first_sentence"):
        generate_queries(load_generator("title"), store, tmp_path / "q.tsv", read_titles(tmp_path / "collection.tsv"))


def test_documents_are_evenly_spread(store, tmp_path):
    generator = written_by({"d1": ["cats"], "d2": ["кошки"], "d3": ["rain"], "d4": ["river"]})
    counts = generate_queries(generator, store, tmp_path / "q.tsv", most_documents=2)
    assert list(read(tmp_path / "q.tsv")) == ["d1-q1", "d4-q1"] and counts["documents"] == 2


# ---- Language models ------------------------------------------------------------------------------------------------


@pytest.fixture
def seq2seq(tmp_path, tokenizer) -> str:
    torch.manual_seed(0)
    words, _ = llama(tokenizer)
    words.pad_token = "[PAD]"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 1.0}
    ends = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=len(words), **sizes, **ends)).save_pretrained(tmp_path / "t5")
    words.save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


@pytest.fixture
def causal(tmp_path, tokenizer) -> str:
    torch.manual_seed(0)
    words, _ = llama(tokenizer)
    words.pad_token = "[PAD]"
    mark = ("[CLS]", words.convert_tokens_to_ids("[CLS]"))  # that a chat template has itself
    words.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[mark])
    words.chat_template = "{% for m in messages %}what {{ m.content }} a{% endfor %}"
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), eos_token_id=3, **sizes)).save_pretrained(tmp_path / "gpt")
    words.save_pretrained(tmp_path / "gpt")
    return str(tmp_path / "gpt")


def test_sequence_to_sequence_model_samples_by_a_seed(seq2seq):
    generator = load_generator(seq2seq, 3, batch_size=2)
    texts = ["apple bread", "cat", "moon river " * 300]
    first = generator.generate(texts, [""] * 3, 7)
    assert [len(queries) for queries in first] == [3, 3, 3]
    assert len({query for queries in first for query in queries}) > 3
    assert generator.generate(texts, [""] * 3, 7) == first
    assert generator.generate(texts, [""] * 3, 8) != first
    others = [load_generator(seq2seq, 2), load_generator(seq2seq, 3, QueryPrompt("of {document}"), batch_size=2)]
    assert len({generator.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_causal_model_reads_its_chat_template_and_is_cut(causal):
    """By hand: the likeliest words after the prompt of one document; a longer document is cut to what fits."""
    prompt = QueryPrompt("of {document} and")
    alone, padded = (load_generator(causal, 1, prompt, batch_size=size) for size in (1, 2))
    room = 256 - 64 - 4  # positions, new tokens, and "what of ... and a"
    texts = ["cat", "moon river " * 300]
    model, words = GPT2LMHeadModel.from_pretrained(causal).eval(), kd.ranker.load_tokenizer(causal)
    assert len(words("a")["input_ids"]) == len(words("a", add_special_tokens=False)["input_ids"]) + 1
    found = [generator.generate(texts, ["", ""], 0) for generator in (alone, padded)]
    for text, [query], [of_padded] in zip(texts, *found, strict=True):
        kept = " ".join(text.split()[:room])
        ids = words(f"what of {kept} and a", return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**ids, do_sample=False, max_new_tokens=64)[0, ids["input_ids"].shape[1] :]
        (wanted,) = read_lines(words.decode(answer, skip_special_tokens=True), 1)
        assert query == wanted and len(wanted.split()) > 3
        # Padding changes the rounding, which may turn a near tie of a random model: later words may differ.
        assert of_padded.split()[:3] == wanted.split()[:3]


def test_prompt_without_room_is_refused(causal):
    generator = load_generator(causal, 4)
    with pytest.raises(InputError, match="256 new tokens leave no room for a document: the model reads 256 tokens"):
        generator.generate(["cat"], [""], 0)


def test_model_that_writes_nothing_is_refused(encoder):
    with pytest.raises(InputError, match="is a bert of class BertModel, which generates no text"):
        load_generator(str(encoder))
    with pytest.raises(FileNotFoundError, match="No model"):
        load_generator(str(encoder / "nothing"))
    with pytest.raises(InputError, match="The fallback title reads no prompt"):
        load_generator("title", prompt=QueryPrompt("{document}"))


@pytest.mark.parametrize("template", ["no place", "{document} {document}", "{document} {query}"])
def test_template_needs_its_placeholder(template):
    with pytest.raises(InputError, match=r"needs \{document\} once"):
        QueryPrompt(template)


def test_prompt_keeps_the_braces_of_a_text():
    assert QueryPrompt("{count} of {document}").fill("a {count} {document} {", 3) == "3 of a {count} {document} {"


@pytest.mark.parametrize(
    ("answer", "queries"),
    [
        ("one\n\n two \nthree", ["one", "two"]),
        ("Here they are:\n1. one\n2) “two”\n3. three", ["one", "two"]),
        ("<think>1. hm\n</think>\n- 'one'\n* two", ["one", "two"]),
        ("<think>no end", []),
        ("3 cats", ["3 cats"]),
    ],
)
def test_lines_of_an_answer(answer, queries):
    assert read_lines(answer, 2) == queries


# ---- Chat endpoints, and the verb -----------------------------------------------------------------------------------


def write(path: str, body: dict) -> dict:
    """Answer with two queries of the document."""
    document = body["messages"][0]["content"].split("Document: ")[1]
    content = "\n".join(f"{number}. query {number} of {document}" for number in (1, 2))
    return {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": 5}}


@pytest.fixture
def command(server, toy, tmp_path) -> str:
    server.answer = write
    texts = f"--collection {toy / 'collection.tsv'} --output {tmp_path / 'q.tsv'}"
    return f"teacher queries --model http://{server.address}?model=m {texts} --per-document 2 --round-trip 0 --json"


def test_endpoint_is_planned_asked_and_resumed(command, server, toy, tmp_path, call, waits, monkeypatch):
    monkeypatch.setattr(module, "DOCUMENTS_PER_BLOCK", 16)
    status, printed, error = call(f"{command} --plan-only")
    assert status == 0, error
    plan = json.loads(printed)
    documents = dict(kd.TextStore.from_tsv(toy / "collection.tsv").items())
    tokens = [-(-len(QueryPrompt(QUERIES_TEMPLATE).fill(text, 2)) // 4) + 128 for text in documents.values()]
    assert plan == {"documents": 40, "requests": 40, "tokens": sum(tokens)}
    status, _, error = call(f"{command} --most-tokens 99")
    assert status == 2 and f"may cost {sum(tokens):,} tokens, more than --most-tokens 99" in error
    assert not server.bodies and not list(tmp_path.glob("q.*"))
    server.answer = lambda path, body: write(path, body) if len(server.bodies) < 21 else "broken"
    status, _, error = call(f"{command} --concurrency 1")
    assert status == 1 and "the same command resumes" in error and not (tmp_path / "q.tsv").exists()
    server.bodies.clear()
    server.answer = write
    status, printed, error = call(f"{command} --most-tokens {sum(tokens)}")
    assert status == 0, error
    counts = json.loads(printed)
    assert (counts["generated"], counts["requests"], counts["tokens"]) == (80, 24, 120)
    assert [body["model"] for body in server.bodies] == ["m"] * 24
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0, 128)}
    assert read(tmp_path / "q.tsv")["0-q1"] == f"query 1 of {documents['0']}"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "does not answer as an API of the kind chat: IndexError"),
        ({"choices": [{"message": {"content": 3}}]}, "AttributeError"),
        ([1], "does not answer as an API of the kind chat"),
    ],
)
def test_answer_that_is_no_chat_is_refused(command, server, tmp_path, call, answer, message):
    server.answer = lambda path, body: answer
    status, _, error = call(command)
    assert status == 2 and message in error and not (tmp_path / "q.tsv").exists()


def test_refusal_of_a_chat_model_is_an_empty_query(command, server, call):
    refused = {"choices": [{"message": {"content": None}}]}
    server.answer = lambda path, body: refused if "apple" in body["messages"][0]["content"] else write(path, body)
    status, printed, error = call(command)
    assert status == 0, error
    counts = json.loads(printed)
    assert counts["generated"] < 80 and counts["documents_without_query"] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("", "Give either --model or --fallback"),
        ("--model m --fallback title", "Give either --model or --fallback"),
        ("--fallback abstract", "--fallback is one of title, first_sentence, got 'abstract'"),
        ("--fallback title --plan-only", "--plan-only is for the address of an endpoint"),
        ("--fallback first_sentence --most-tokens 9", "A plan is for an endpoint; first_sentence is not one"),
        ("--fallback first_sentence --language klingon", "The language is one of"),
        ("--model score+http://localhost:1", "got 'chat'"),
        ("--model ./nothing", "The model ./nothing does not exist"),
        ("--fallback first_sentence --template {file}", "needs {document} once"),
    ],
)
def test_bad_options_are_one_line(toy, tmp_path, call, changed, message):
    (tmp_path / "bad.txt").write_text("nothing")
    changed = changed.replace("{file}", str(tmp_path / "bad.txt"))
    status, _, error = call(
        f"teacher queries --collection {toy / 'collection.tsv'} --output {tmp_path / 'q.tsv'} {changed}"
    )
    assert status == 2 and message in error.splitlines()[-1] and not (tmp_path / "q.tsv").exists()


def test_verb_writes_the_fallback_after_a_round_trip(store, tmp_path, call):
    files = f"--collection {store.source} --output {tmp_path / 'q.tsv'}"
    status, printed, error = call(f"teacher queries {files} --fallback first_sentence --round-trip 1")
    assert status == 0, error
    assert printed == (
        f"output {tmp_path / 'q.tsv'}, is_weak True, documents 4, generated 4, empty 0, equal_to_document 3, "
        "other_script 0, near_duplicates 0, not_found 0, queries 1, documents_without_query 3\n"
    )
    assert read(tmp_path / "q.tsv") == {"d3-q1": "Rain falls on the river."}
