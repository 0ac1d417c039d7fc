"""Material of `gpu.py`: random encoders, synthetic texts, and the floating-point operations of each architecture."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers.configuration_utils
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

# The models read two names of transformers 5.23. Release 5.17 has what a fresh ranker needs under other names, but
# cannot load a saved one. Set here, before the package is imported.
if not hasattr(transformers.configuration_utils, "SubConfigSpec"):
    transformers.configuration_utils.SubConfigSpec = SimpleNamespace
if not hasattr(PreTrainedModel, "is_activation_checkpointing"):
    PreTrainedModel.is_activation_checkpointing = PreTrainedModel.is_gradient_checkpointing

ARCHITECTURES = ("bert_dot", "bert_cat", "colbert", "prettr", "tk")
# Dense bfloat16 operations per second by the vendor's data sheets; the first name contained in the device's counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
# Mean and standard deviation (of the logarithm) of the tokens of MS MARCO's queries and passages, [CLS] and [SEP]
# included.
LENGTHS = {"queries": (9, 0.35), "passages": (76, 0.45)}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements; the defaults are those for a GPU."""

    pairs: tuple[int, ...] = (256, 32, 1024)  # rows of a query, a positive and a negative, per training step
    batches: int = 6  # the most different batches per measurement
    repetitions: int = 3
    loader_batches: int = 16
    workers: tuple[int, ...] = (0, 4, 8)
    queries: int = 4096
    passages: int = 8192
    scored: int = 8192  # pairs
    scoring_batch: int = 512
    in_batch: int = 128  # queries, of two documents each

    def batch_count(self, pairs: int) -> int:
        """Return the number of different batches of a size; few large ones, which take long to tokenise."""
        return max(2, min(self.batches, 1536 // pairs))


SMOKE_SIZES = Sizes(
    pairs=(4,),
    batches=2,
    repetitions=1,
    loader_batches=3,
    workers=(0, 1),
    queries=12,
    passages=24,
    scored=24,
    scoring_batch=8,
    in_batch=4,
)


@dataclass(frozen=True)
class Bench:
    """The device, the models and the texts that all sections share.

    Args:
        encoders: name -> folder of weights and tokenizer, the first the smallest.
        queries, documents: the stores of texts, `kd.TextStore`; ids are row numbers.
        texts: the same texts by name, "queries" and "passages".
        rows: teacher rows of random ids and scores.
        scratch: a folder for what a section writes.
    """

    device: torch.device
    sizes: Sizes
    encoders: dict[str, Path]
    queries: Any
    documents: Any
    texts: dict[str, list[str]]
    rows: list[dict]
    scratch: Path


def build_bench(folder: Path, is_smoke: bool, model: str | None) -> Bench:
    """Write encoders and texts into a folder; `model` is a folder of real weights, which replaces the encoders."""
    import hf_kd_ranking as kd

    sizes = Sizes()
    if is_smoke:
        sizes = SMOKE_SIZES
    encoders = {}
    if model is not None:
        encoders[Path(model).name] = Path(model)
    else:
        for name, config in encoder_configs(is_smoke).items():
            encoders[name] = folder / name
            write_encoder(encoders[name], config)
    tokenizer = AutoTokenizer.from_pretrained(next(iter(encoders.values())))
    texts, stores = {}, {}
    for name, count in (("queries", sizes.queries), ("passages", sizes.passages)):
        texts[name] = synthetic_texts(tokenizer, count, *LENGTHS[name])
        path = folder / f"{name}.tsv"
        with path.open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts[name]):
                file.write(f"{number}\t{text}\n")
        stores[name] = kd.TextStore.from_tsv(path, folder / name)
    rng, rows = random.Random(0), []
    count = 0
    for pairs in sizes.pairs:
        count = max(count, pairs * sizes.batch_count(pairs))
    for _ in range(count):
        scores = [rng.gauss(2, 3), rng.gauss(-2, 3)]
        documents = rng.sample(range(sizes.passages), 2)
        rows.append({"query_id": rng.randrange(sizes.queries), "doc_ids": documents, "teacher_scores": scores})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Bench(device, sizes, encoders, stores["queries"], stores["passages"], texts, rows, folder)


# ---- Encoders and texts ---------------------------------------------------------------------------------------------


def encoder_configs(is_smoke: bool) -> dict[str, PreTrainedConfig]:
    """Return the configs of MiniLM and DistilBERT, or a tiny one."""
    if is_smoke:
        return {"tiny": DistilBertConfig(vocab_size=400, dim=16, n_layers=2, n_heads=2, hidden_dim=32)}
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return {"minilm": BertConfig(**minilm), "distilbert": DistilBertConfig()}


def write_encoder(folder: Path, config: PreTrainedConfig) -> None:
    """Write an encoder with random weights, and a WordPiece tokenizer of as many synthetic words as it embeds."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokens = [*SPECIAL_TOKENS, *ascii_lowercase]
    for letter in ascii_lowercase:
        tokens.append(f"##{letter}")
    rng, words = random.Random(0), set()
    while len(words) < config.vocab_size - len(tokens):
        word = ""
        for _ in range(rng.choice((2, 3, 4))):
            word += rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou")
        words.add(word)
    tokens += sorted(words)
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    inputs = ["input_ids", "attention_mask"]  # DistilBERT has no token types
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)
    fast.save_pretrained(folder)


def synthetic_texts(tokenizer: PreTrainedTokenizerBase, count: int, mean: float, spread: float) -> list[str]:
    """Return texts of random whole words of a vocabulary, whose numbers of tokens are lognormal."""
    words = []
    for word in sorted(tokenizer.get_vocab()):
        if word.isascii() and word.isalpha() and len(word) > 2:
            words.append(word)
    rng = np.random.default_rng(count)
    tokens = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    texts = []
    for length in np.maximum(1, tokens.round().astype(int) - 2):  # without [CLS] and [SEP]
        texts.append(" ".join(rng.choice(words, size=length)))
    return texts


# ---- Floating-point operations --------------------------------------------------------------------------------------


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bfloat16 operations per second; None if it is not in the table."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in PEAK_FLOPS.items():
            if known in name:
                return flops
    return None


def batch_tokens(features: dict[str, Any]) -> int:
    """Return the number of tokens that the student reads, without padding."""
    if "query" not in features:  # both texts in one sequence
        return int(features["attention_mask"].sum())
    return int(features["query"]["attention_mask"].sum() + features["document"]["attention_mask"].sum())


def forward_flops(model: PreTrainedModel, features: dict[str, Any]) -> float:
    """Return the operations of the matrix products of a forward pass, 2 per multiplication, without padding.

    States that an architecture skips (the feed-forward network of the last layer of those that read [CLS] only) are
    not counted, so that the utilisation is that of work that is needed. A training step has three times as many.
    """
    config, architecture = model.config, model.config.model_type
    if architecture == "BERT_Cat":
        lengths = _lengths(features)
        return _encoder_flops(config.encoder_config, lengths, reads_first=True) + 2 * lengths.size * _width(config)
    queries, documents = _lengths(features["query"]), _lengths(features["document"])  # (B,), (B, n)
    if architecture == "TK":
        per_layer = _layer_flops(config.hidden_size, config.intermediate_size)
        encoding = config.num_hidden_layers * (per_layer(queries).sum() + per_layer(documents).sum())
        per_pair = 2 * (config.hidden_size + model.kernel_bin_weights.in_features)  # a cosine, and sums of kernels
        return encoding + per_pair * (queries[:, None] * documents).sum()
    encoder = config.encoder_config
    if architecture == "BERT_Dot":
        return _encoder_flops(encoder, queries, reads_first=True) + _encoder_flops(
            encoder, documents, reads_first=True
        )
    if architecture == "ColBERT":
        encoding = _encoder_flops(encoder, queries, reads_first=False)
        encoding += _encoder_flops(encoder, documents, reads_first=False)
        compression = 2 * (queries.sum() + documents.sum()) * _width(config) * config.compression_dim
        return encoding + compression + 2 * (queries[:, None] * documents).sum() * config.compression_dim
    lower = config.join_layer_idx
    upper = encoder.num_hidden_layers - lower
    documents = documents - 1  # without [CLS]
    separate = _encoder_flops(encoder, queries, lower, reads_first=False)
    separate += _encoder_flops(encoder, documents, lower, reads_first=False)
    joint = _encoder_flops(encoder, queries[:, None] + documents, upper, reads_first=True)
    return separate + joint + 2 * documents.size * _width(config)


def _lengths(side: dict[str, Any]) -> np.ndarray:
    return side["attention_mask"].sum(-1).cpu().numpy()


def _width(config: PreTrainedConfig) -> int:
    return config.encoder_config.hidden_size


def _layer_flops(size: int, intermediate: int) -> Any:
    """Return a function of lengths: operations of one layer for each sequence."""

    def flops(lengths: np.ndarray) -> np.ndarray:
        projections_and_network = (8 * size**2 + 4 * size * intermediate) * lengths
        return projections_and_network + 4 * size * lengths.astype(float) ** 2

    return flops


def _encoder_flops(
    config: PreTrainedConfig, lengths: np.ndarray, layers: int | None = None, *, reads_first: bool
) -> float:
    """Return the operations of some layers of an encoder, by default all; `reads_first` if only [CLS] is read."""
    size, intermediate = config.hidden_size, config.to_dict().get("intermediate_size") or config.hidden_dim
    if layers is None:
        layers = config.num_hidden_layers
    total = layers * _layer_flops(size, intermediate)(lengths).sum()
    if reads_first:
        total -= 4 * size * intermediate * (lengths - 1).sum()
    return float(total)


def output_file() -> Path | None:
    """Return the file for partial results in the folder that the variable OUT names; None without it."""
    folder = os.environ.get("OUT")
    return Path(folder, "gpu.json") if folder else None
