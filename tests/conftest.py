"""Tiny rankers and a toy collection, made here: no test reaches the network or needs a download."""

import gc
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import issparse
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from toy_architecture import Toy, ToyConfig
from transformers import CONFIG_MAPPING, MODEL_MAPPING, BertConfig, BertModel, PreTrainedTokenizerFast
from workplace import make_workplace

import hf_kd_ranking as kd
from hf_kd_ranking.data.runs import write_qrels
from hf_kd_ranking.models import ARCHITECTURES as REGISTERED
from hf_kd_ranking.models import RankerModel, register_ranker, tokenization

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "apple bread cat dog earth fire glass house iron jam king lake moon night ocean paper queen river stone tree "
    "under violin water yellow zebra what is a the of and how to where"
).split()
# Constructor arguments of every architecture on the tiny encoder; a new architecture joins by one row.
ARCHITECTURES = {
    "bert_cat": {},
    "bert_cat-passages": {"passage_length": 4, "passage_stride": 2, "passage_pooling": "attention"},
    "bert_dot": {},
    "bert_dot-mean-compressed": {"pooling": "mean", "compression_dim": 6},
    "colbert": {"compression_dim": 6, "initializer_range": 0.1},  # scores sum over terms: keep them small
    "colbert-normalized": {"compression_dim": 6, "normalize": True},
    "prettr": {"join_layer_idx": 1},
    "prettr-query_length": {"join_layer_idx": 1, "document_position_offset": "query_length"},
    "prettr-compressed": {"join_layer_idx": 1, "compression_dim": 6},
    "splade": {},
    "tk": {"num_hidden_layers": 1, "intermediate_size": 32},
    "tkl": {
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "chunk_size": 5,
        "chunk_overlap": 2,
        "region_size": 4,
        "region_count": 2,
        "region_neighbors": 1,
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run."""
    for item in items:
        if item.get_closest_marker("data") and not os.environ.get("HF_KD_RANKING_DATA"):
            item.add_marker(pytest.mark.skip(reason="HF_KD_RANKING_DATA is not set"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a small vocabulary, [CLS] and [SEP] as BERT puts them."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, tokenizer) -> Path:
    """Folder of a random BERT with two layers of 16 features, and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from zero, so that scores differ by more than rounding
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(name: str, encoder: Path) -> RankerModel:
    torch.manual_seed(1)
    settings = {"max_query_length": 8, "max_document_length": 16, "initializer_range": 0.5} | ARCHITECTURES[name]
    model = kd.load_ranker(encoder, name.split("-")[0], **settings)
    if name == "splade":  # whose fresh head weighs no word of so small a vocabulary
        torch.nn.init.zeros_(model._expansion_head.bias)
    if name == "tkl":  # whose fresh kernels hardly tell texts apart
        torch.nn.init.normal_(model.kernel_bin_weights.weight, std=0.1)
    return model


@pytest.fixture(params=ARCHITECTURES)
def model(request, encoder) -> RankerModel:
    """A fresh ranker of each architecture, in evaluation mode."""
    return make_model(request.param, encoder)


@pytest.fixture(params=[name for name in ARCHITECTURES if not name.startswith("tk")])
def encoder_model(request, encoder) -> RankerModel:
    """The same, of those that have a pretrained encoder."""
    return make_model(request.param, encoder)


@pytest.fixture
def toy_architecture() -> Iterator[type[Toy]]:
    """The architecture of toy_architecture.py, registered as "toy" for one test."""
    register_ranker("toy", Toy)
    yield Toy
    del REGISTERED["toy"]
    del CONFIG_MAPPING._extra_content[ToyConfig.model_type]
    del MODEL_MAPPING._extra_content[ToyConfig]


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Folder of a toy data set: 40 documents, 12 queries, 64 teacher rows, candidates and qrels of 4 more queries."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for _ in range(40)]
    queries = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(16)]
    (folder / "collection.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(documents)))
    (folder / "queries.tsv").write_text("".join(f"{100 + i}\t{text}\n" for i, text in enumerate(queries)))
    rows = [(rng.gauss(2, 3), rng.gauss(0, 3), 100 + rng.randrange(12), *rng.sample(range(40), 2)) for _ in range(64)]
    (folder / "scores.tsv").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    candidates = {str(112 + i): rng.sample(range(40), 10) for i in range(4)}
    kd.write_run(
        {query: [(str(doc), 10.0 - rank) for rank, doc in enumerate(docs)] for query, docs in candidates.items()},
        folder / "candidates.trec",
    )
    write_qrels(
        {query: {str(docs[4]): 2, str(docs[7]): 1} for query, docs in candidates.items()}, folder / "qrels.txt"
    )
    return folder


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Leave what is alive out of later garbage collections.

    Every training ends with one, which takes seconds where it looks at the objects of all imports and earlier tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def warnings_of_cuts() -> None:
    """What a test cuts is said as if no other test had cut the same."""
    tokenization._warn_once.cache_clear()


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch) -> None:
    """Arrow files built by a test go into its own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[[str], tuple[int, str, str]]:
    """call("verb --option value"): exit status, standard output, standard error."""

    from hf_kd_ranking.cli import main  # imports every verb

    def run(command: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *command.split()])
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def student(model) -> RankerModel:
    """`model` without dropout, for runs that must agree."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def make_trainer(toy, tokenizer, tmp_path, private_cache) -> Callable[..., "kd.RankingTrainer"]:
    """make_trainer(model, parts, **arguments): a trainer on the toy data; `parts` are what `RankingTrainer` takes."""
    queries, documents = kd.TextStore.from_tsv(toy / "queries.tsv"), kd.TextStore.from_tsv(toy / "collection.tsv")
    rows = kd.load_teacher_scores(toy / "scores.tsv")
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }

    def make(model: RankerModel, parts: dict | None = None, **arguments) -> kd.RankingTrainer:
        parts = {"train_dataset": rows, "queries": queries, "documents": documents} | (parts or {})
        return kd.RankingTrainer(
            model, kd.RankingTrainingArguments(**(defaults | arguments)), processing_class=tokenizer, **parts
        )

    return make


@pytest.fixture
def check_threads() -> Iterator[Callable]:
    """check_threads(functions, wanted=None): four threads that call them get what one thread gets before.

    The threads begin every call at the same time, and take turns so often that they see each other's changes.
    """
    count, turns = 4, 25

    def check(functions: Sequence[Callable], wanted: Sequence | None = None) -> None:
        if wanted is None:
            wanted = [function() for function in functions]
        barrier, wrong = threading.Barrier(count), []

        def work(thread: int) -> None:
            try:
                for turn in range(turns):
                    barrier.wait(60)
                    chosen = (thread + turn) % len(functions)
                    for got, value in zip(functions[chosen](), wanted[chosen], strict=True):
                        if issparse(value):
                            got, value = got.toarray(), value.toarray()
                        is_number = isinstance(value, np.ndarray | np.floating)
                        is_equal = np.allclose(got, value, rtol=1e-4, atol=1e-4) if is_number else got == value
                        assert is_equal, f"call {chosen}"
            except BaseException as error:
                wrong.append(error)
                barrier.abort()

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    interval, torch_threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield check
    sys.setswitchinterval(interval)
    torch.set_num_threads(torch_threads)


@pytest.fixture(scope="session")
def finished_workplace(tmp_path_factory, tokenizer) -> Path:
    """The folder of workplace.py; a test works in a copy of it."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder.parent / "cache")
        make_workplace(folder, tokenizer, WORDS)
    return folder


@pytest.fixture
def workplace(finished_workplace, tmp_path, monkeypatch) -> Path:
    """The current folder: a copy of the folder of workplace.py."""
    folder = tmp_path / "workplace"
    shutil.copytree(finished_workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder
