"""Load any model that scores a text for a query as a teacher: raw scores, without a sigmoid or a softmax."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ..errors import InputError
from ..inference import fingerprint, score_pairs
from ..models import ARCHITECTURES, RankingOutput, RankingProcessor, find_architecture, load_ranker
from ..models.foreign import load_complete, read_activation, read_json
from ..models.tk import TRAINING_CONFIG
from ..ranker import default_dtype, load_tokenizer
from .classifiers import choose_output, max_tokens, prepare_classifier
from .endpoint import Endpoint, EndpointSettings, is_endpoint
from .language_models import load_language_model
from .prompts import INSTRUCTION, Prompt
from .sentence_transformers import CLASSES, MODEL_TYPES, load_cross_encoder, load_encoder

KINDS = (*ARCHITECTURES, "classifier", "yes-no", *CLASSES)
# Kinds that may be named for a checkpoint that says what it is; as any other it would score at random.
ALSO_NAMED = {
    "ranker": tuple(ARCHITECTURES),
    "classifier": ("bert_cat",),
    "cross-encoder": ("bert_cat", "classifier", "yes-no"),
    "bi-encoder": ("bert_dot",),
    "multi-vector": ("colbert",),
    "yes-no": ("bi-encoder",),
}


@dataclass(frozen=True)
class Teacher:
    """A model that scores pairs; if threads call it at the same time, they are served one after the other.

    Args:
        name: short name, for file names and cards.
        score: function of N queries and N documents that returns (N,) float32, unbounded, higher is better.
        fingerprint: digest of the weights and settings; resumed work must not mix two.
        usage: what an endpoint has cost up to now: requests, retries and, if it tells, tokens.
        reads_by_query: True for an endpoint, which takes the documents of one query in a request; others may encode
            each document once for all of its queries.
        processor: counts what is cut of the documents; None if the library of the checkpoint cuts by itself.
    """

    name: str  # short, for file names and cards
    score: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    fingerprint: str  # digest of the weights and settings; resumed work must not mix two
    usage: Mapping[str, int] = field(default_factory=dict)  # what an endpoint has cost up to now
    # An endpoint takes the documents of one query in a request; others may encode each document once for all queries.
    reads_by_query: bool = False
    processor: RankingProcessor | None = None  # counts what is cut; None if the checkpoint's library cuts by itself

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
    max_length: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prompt: Prompt | None = None,
    tokens_per_batch: int | None = None,
    endpoint: EndpointSettings | None = None,
) -> Teacher:
    """Load a teacher.

    Args:
        name_or_path: a folder or a Hub name of one of our rankers, a sequence classifier, a checkpoint of
            sentence-transformers (CrossEncoder, bi-encoder or multi-vector encoder), or a causal language model that
            answers yes or no, as Qwen3-Reranker. The scores are those of the library whose checkpoint it is. Or the
            address of an endpoint, see `Endpoint`, for which kind, batch size, `prompt` and `endpoint` are read.
        kind: one of `KINDS`; None reads it from the checkpoint. Needed for a plain encoder, for example "bert_dot".
        label: name of the output that is the score, for a classifier with several outputs; of classes the score is the
            logit of the class' probability.
        similarity: "dot" or "cosine", for a bi-encoder; None uses the checkpoint's.
        instruction: instruction in the prompt of a yes-no model.
        max_length: tokens of a pair, for classifiers, cross-encoders and yes-no models; longer pairs are cut, the
            longer text first. None takes the checkpoint's own limit.
        batch_size: pairs (or texts) per forward pass.
        dtype: type of the weights; None is bfloat16 on a GPU that computes in it, float32 elsewhere.
        device: device of the model; None uses a GPU if there is one.
        prompt: prompt and answers of a yes-no model, or of a chat model behind an endpoint; None takes
            Qwen3-Reranker's for the one, and a plain question for the other.
        tokens_per_batch: tokens per forward pass, padding included, in place of `batch_size`; not for checkpoints of
            sentence-transformers.
        endpoint: how an endpoint is asked.

    Raises:
        InputError: if the kind is unknown, cannot be recognized or is not the checkpoint's, if weights are missing, if
            the label is missing or unknown, or if the kind does not read a setting.
        FileNotFoundError: if the model does not exist.

    Example:
        >>> teacher = kd.load_teacher("cross-encoder/ms-marco-MiniLM-L6-v2")
        >>> teacher.score(["what is bread"], ["Bread is baked."]).shape  # the raw logit
        (1,)
    """
    if is_endpoint(name_or_path):
        asked = Endpoint(name_or_path, kind, batch_size, prompt, endpoint or EndpointSettings())
        return Teacher(asked.name, asked.score, asked.fingerprint, asked.usage, reads_by_query=True)
    if kind is not None and kind not in KINDS:
        raise InputError(f"Unknown kind of teacher {kind!r}; choose one of {', '.join(KINDS)}.")
    found = _recognize(name_or_path)
    if found is not None and kind not in (None, found, *ALSO_NAMED[found]):
        raise InputError(f"{name_or_path} is a {found}, not a {kind}; leave the kind out.")
    architecture = kind if kind in ARCHITECTURES else None
    if found != "yes-no" or kind is None:
        kind = found or kind
    if kind is None:
        raise _unrecognized(name_or_path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or default_dtype(device)
    name = Path(name_or_path).name or str(name_or_path)
    if prompt is not None and kind != "yes-no":
        raise InputError(f"{name_or_path} is a {kind} and reads no prompt; leave template, yes and no out.")
    if kind == "cross-encoder" and instruction != INSTRUCTION:
        raise InputError(
            f"{name_or_path} has a prompt of its own, so that an instruction has no effect; leave it out."
        )
    if kind in CLASSES and tokens_per_batch is not None:
        raise InputError(
            f"{name_or_path} is run by sentence-transformers, which needs batch_size: leave tokens_per_batch out."
        )
    if kind == "cross-encoder":
        return Teacher(name, *load_cross_encoder(name_or_path, label, max_length, batch_size, dtype, device))
    if kind in CLASSES:
        return Teacher(name, *load_encoder(name_or_path, kind, similarity, batch_size, dtype, device))
    if kind == "classifier":
        model, processor = _classifier(name_or_path, label, max_length, dtype, device)
    elif kind == "yes-no":
        settings = (prompt or Prompt(), instruction, max_length, dtype, device)
        model, compute, processor = load_language_model(name_or_path, *settings)
        model = _LogitScores(model, compute)
    else:
        model = load_ranker(name_or_path, architecture, dtype=dtype).to(device)
        if model.is_fresh:
            raise InputError(f"{name_or_path} is an encoder: a {kind} built on it would score at random; train it.")
        processor = RankingProcessor.from_config(load_tokenizer(name_or_path), model.config)
    model.eval()
    batches = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch}
    score = partial(score_pairs, model, processor, description=None, **batches)
    settings = (kind, label, instruction, max_length, batch_size, tokens_per_batch, dtype, prompt)
    return Teacher(name, score, fingerprint(model, *settings), processor=processor)


class _LogitScores(nn.Module):
    """A model of transformers with the interface of a ranker: `compute(**inputs)` returns (N,) scores."""

    def __init__(self, model: PreTrainedModel, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.compute = compute
        self.device, self.dtype = model.device, model.dtype

    def forward(self, **inputs: Tensor) -> RankingOutput:
        return RankingOutput(scores=self.compute(**inputs).float())


def _recognize(name_or_path: str) -> str | None:
    """Return the kind of a checkpoint; "ranker" for one of ours, None for an encoder."""
    if (Path(name_or_path) / TRAINING_CONFIG).is_file():
        return "ranker"
    try:
        settings = read_json(name_or_path, "config_sentence_transformers.json") or {}
        if read_json(name_or_path, "modules.json"):
            model_type = settings.get("model_type") or "SentenceTransformer"
            if model_type not in MODEL_TYPES:
                raise InputError(f"{name_or_path} is a {model_type}; known are {', '.join(MODEL_TYPES)}.")
            return MODEL_TYPES[model_type]
        config = AutoConfig.from_pretrained(name_or_path)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"No teacher {name_or_path!r}: {str(error).splitlines()[0]}") from error
    if find_architecture(config) is not None:
        return "ranker"
    for name in config.architectures or []:
        if name.endswith("ForSequenceClassification"):
            return "classifier"
        if name.endswith("ForCausalLM"):
            return "yes-no"
    return None


def _unrecognized(name_or_path: str) -> InputError:
    config = AutoConfig.from_pretrained(name_or_path)
    names = ", ".join(config.architectures or []) or "unknown"
    return InputError(
        f"{name_or_path} is a {config.model_type} of class {names}, which gives no score by itself; name its kind: "
        f"kind={'|'.join(KINDS)}."
    )


def _classifier(
    name_or_path: str, label: str | None, max_length: int | None, dtype: torch.dtype, device: str | torch.device
) -> tuple[_LogitScores, RankingProcessor]:
    model = load_complete(AutoModelForSequenceClassification, name_or_path, dtype=dtype)
    output = choose_output(name_or_path, model.config, read_activation(model.config, {}), label)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    side = prepare_classifier(model, tokenizer)
    limit = max_tokens(model.config, tokenizer.model_max_length, max_length)

    def scores(**inputs: Tensor) -> Tensor:
        return output.scores(model(**inputs).logits)

    processor = RankingProcessor(tokenizer, 0, limit, joins_texts=True, padding_side=side)
    return _LogitScores(model.to(device), scores), processor
