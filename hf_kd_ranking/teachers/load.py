"""Load any model that scores a text for a query as a teacher: raw scores, without a sigmoid or a softmax."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..errors import InputError
from ..inference import fingerprint, score_pairs
from ..models import ARCHITECTURES, RankingOutput, RankingProcessor, TokenLists, find_architecture, load_ranker
from ..models.encoder import max_positions
from ..models.foreign import read_json
from ..models.tk import TRAINING_CONFIG
from ..ranker import load_tokenizer

KINDS = (*ARCHITECTURES, "classifier", "bi-encoder", "yes-no")
MAX_LENGTH = 512
REMEMBERED = 500_000  # vectors of a bi-encoder that are kept between calls: 1.5 GB of 768 values
MIN_TEXT = 4  # tokens of a query and a document for which a prompt must leave room

# The published prompt of Qwen3-Reranker.
YES_NO_PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
YES_NO_BODY = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
YES_NO_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Teacher:
    """A model that scores pairs; of several threads that call it, one at a time is served.

    Args:
        name: short name, for file names and cards.
        score: function of N queries and N documents that returns (N,) float32, unbounded, higher is better.
        fingerprint: digest of the weights and settings; resumed work must not mix two.
    """

    name: str
    score: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    fingerprint: str

    def __post_init__(self) -> None:
        lock, score = threading.Lock(), self.score

        def score_in_turn(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
            with lock:  # its tokenizer and the vectors that it remembers are shared
                return score(queries, documents)

        object.__setattr__(self, "score", score_in_turn)


def load_teacher(
    name_or_path: str,
    kind: str | None = None,
    label: str | None = None,
    similarity: str | None = None,
    instruction: str = INSTRUCTION,
    max_length: int = MAX_LENGTH,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Teacher:
    """Load a teacher.

    Args:
        name_or_path: a folder or a Hub name of one of our rankers, a sequence classifier or CrossEncoder, a
            sentence-transformers bi-encoder, or a causal language model that answers yes or no, as Qwen3-Reranker.
        kind: one of `KINDS`; None reads it from the checkpoint. Needed for a plain encoder, for example "bert_dot".
        label: name of the output that is the score, for a classifier with several outputs.
        similarity: "dot" or "cosine", for a bi-encoder; None uses the checkpoint's.
        instruction: instruction in the prompt of a yes-no model.
        max_length: tokens of a pair, for classifiers and yes-no models; longer pairs are cut, the longer text first.
        batch_size: pairs (or texts) per forward pass.
        dtype: type of the weights.
        device: device of the model; None uses a GPU if there is one.

    Raises:
        InputError: if the kind is unknown or cannot be recognized, or the label is missing or unknown.
        FileNotFoundError: if the model does not exist.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"Unknown kind of teacher {kind!r}; choose one of {', '.join(KINDS)}.")
    kind = kind or _recognize(name_or_path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = Path(name_or_path).name or str(name_or_path)
    if kind == "bi-encoder":
        return Teacher(name, *_bi_encoder(name_or_path, similarity, batch_size, dtype, device))
    if kind in ARCHITECTURES or kind == "ranker":
        model = load_ranker(name_or_path, None if kind == "ranker" else kind, dtype=dtype).to(device)
        processor = RankingProcessor.from_config(load_tokenizer(name_or_path), model.config)
    elif kind == "classifier":
        model, processor = _classifier(name_or_path, label, max_length, dtype, device)
    else:
        model, processor = _yes_no(name_or_path, instruction, max_length, dtype, device)
    model.eval()
    score = partial(score_pairs, model, processor, batch_size=batch_size, description=None)
    return Teacher(name, score, fingerprint(model, kind, label, instruction, max_length, batch_size, dtype))


class _LogitScores(nn.Module):
    """A model of transformers with the interface of a ranker: `compute(**inputs)` returns (N,) scores."""

    def __init__(self, model: PreTrainedModel, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute
        self.device, self.dtype = model.device, model.dtype

    def forward(self, **inputs: Tensor) -> RankingOutput:
        return RankingOutput(scores=self.compute(**inputs).float())


@dataclass(frozen=True)
class _PromptProcessor(RankingProcessor):
    """A processor that makes prompts of a yes-no model; it cuts the document and never the text around it."""

    instruction: str = INSTRUCTION

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> TokenLists:
        prefix = self.tokenizer(YES_NO_PREFIX, add_special_tokens=False)["input_ids"]
        suffix = self.tokenizer(YES_NO_SUFFIX, add_special_tokens=False)["input_ids"]
        room = self.max_query_length + self.max_document_length - len(prefix) - len(suffix)
        bodies = []
        for query, document in zip(queries, documents, strict=True):
            bodies.append(YES_NO_BODY.format(instruction=self.instruction, query=query, document=document))
        encoding = self.tokenizer(bodies, add_special_tokens=False, truncation=True, max_length=room)
        input_ids = [[*prefix, *body, *suffix] for body in encoding["input_ids"]]
        return {"input_ids": input_ids, "attention_mask": [[1] * len(ids) for ids in input_ids]}


def _recognize(name_or_path: str) -> str:
    """Return the kind of a checkpoint; "ranker" for one of ours."""
    if (Path(name_or_path) / TRAINING_CONFIG).is_file():
        return "ranker"
    try:
        settings = read_json(name_or_path, "config_sentence_transformers.json") or {}
        if settings.get("model_type") in ("SentenceTransformer", None) and read_json(name_or_path, "modules.json"):
            return "bi-encoder"
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"No teacher {name_or_path!r}: {str(error).splitlines()[0]}") from error
    names = config.architectures or []
    if find_architecture(config) is not None:
        return "ranker"
    for name in names:
        if name.endswith("ForSequenceClassification"):
            return "classifier"
        if name.endswith("ForCausalLM"):
            return "yes-no"
    raise InputError(
        f"{name_or_path} is a {config.model_type} of class {', '.join(names) or 'unknown'}, which gives no score by "
        f"itself; name its kind: kind={'|'.join(KINDS)}."
    )


def _classifier(
    name_or_path: str, label: str | None, max_length: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[_LogitScores, RankingProcessor]:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, dtype=dtype, output_loading_info=True
    )
    if info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"{name_or_path} lacks {lacking}: without a trained head its scores would be random.")
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if label is None and len(labels) > 1:
        raise InputError(f"{name_or_path} has {len(labels)} outputs; name the one to score by: {', '.join(labels)}.")
    if label is not None and label not in labels:
        raise InputError(f"{name_or_path} has no output {label!r}; it has {', '.join(labels)}.")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    limit = _limit(model.config, tokenizer.model_max_length, max_length)
    index = 0 if label is None else labels.index(label)

    def label_logit(**inputs: Tensor) -> Tensor:
        return model(**inputs).logits[:, index]

    return _LogitScores(model.to(device), label_logit), RankingProcessor(tokenizer, 0, limit, joins_texts=True)


def _yes_no(
    name_or_path: str, instruction: str, max_length: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[_LogitScores, _PromptProcessor]:
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    if {None, tokenizer.unk_token_id} & set(answers):
        raise InputError(f"{name_or_path} has no single tokens 'yes' and 'no', by which a yes-no teacher scores.")
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    limit = _limit(model.config, tokenizer.model_max_length, max_length)
    frame = YES_NO_PREFIX + YES_NO_BODY.format(instruction=instruction, query="", document="") + YES_NO_SUFFIX
    needed = len(tokenizer(frame)["input_ids"]) + MIN_TEXT
    if needed > limit:
        raise InputError(f"The prompt and a short text need {needed} tokens, max_length allows {limit}.")
    processor = _PromptProcessor(tokenizer, 0, limit, joins_texts=True, instruction=instruction)
    yes, no = answers

    def yes_minus_no(attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # padding is on the left
        inputs |= {"attention_mask": attention_mask, "position_ids": positions}
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return logits[:, yes] - logits[:, no]

    return _LogitScores(model.to(device), yes_minus_no), processor


def _limit(config: PreTrainedConfig, model_max_length: int, max_length: int) -> int:
    return min(max_positions(config) or max_length, model_max_length, max_length)


def _bi_encoder(
    name_or_path: str, similarity: str | None, batch_size: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[Callable[[Sequence[str], Sequence[str]], np.ndarray], str]:
    """Return the function that scores, and the fingerprint."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(f"{name_or_path} is a bi-encoder: pip install sentence-transformers.") from error
    model = SentenceTransformer(name_or_path, device=str(device), model_kwargs={"dtype": dtype})
    similarity = similarity or {"cos_sim": "cosine"}.get(model.similarity_fn_name, model.similarity_fn_name)
    if similarity not in ("dot", "cosine"):
        raise InputError(f"A bi-encoder scores by 'dot' or 'cosine', got {similarity!r}.")
    options = {"batch_size": batch_size, "normalize_embeddings": similarity == "cosine", "show_progress_bar": False}

    known: dict[str, np.ndarray] = {}  # documents of earlier calls: candidates of many queries are the same

    def encode(function: Callable, texts: Sequence[str]) -> list[np.ndarray]:
        return list(function(list(texts), **options, convert_to_numpy=True).astype(np.float32))

    def score(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        query_texts = list(dict.fromkeys(queries))
        query_vectors = dict(zip(query_texts, encode(model.encode_query, query_texts), strict=True))
        if len(known) > REMEMBERED:
            known.clear()
        new = [text for text in dict.fromkeys(documents) if text not in known]
        if new:
            known.update(zip(new, encode(model.encode_document, new), strict=True))
        pairs = zip(queries, documents, strict=True)
        return np.array([query_vectors[query] @ known[document] for query, document in pairs], dtype=np.float32)

    return score, fingerprint(model, "bi-encoder", similarity, batch_size, dtype)
