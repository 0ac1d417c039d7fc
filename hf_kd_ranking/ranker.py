"""The ranker: a model with its tokenizer and lengths, which takes texts and returns scores or vectors."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import InputError
from .inference import encode_texts, score_pairs
from .models import RankerConfig, RankerModel, RankingProcessor, load_ranker, read_word_vectors
from .models.sparse_encoder import encoder_folder

logger = logging.getLogger(__name__)


class Ranker:
    """A model with the tokenizer of its encoder, ready to use; lengths and prefixes come from the model's config.

    Args:
        batch_size: texts (or pairs) per forward pass.
        is_distributed: True shares long work among the processes of an `accelerate` job; all must make the same calls.
        truncation: True cuts texts beyond the lengths; False makes them an error.
        tokens_per_batch: tokens per forward pass, padding included, in place of `batch_size`; None reads that.

    Example:
        >>> ranker = kd.Ranker.from_pretrained("bert_dot")
        >>> ranker.score(["what is bread", "where is the king"], ["Bread is baked.", "By the river."]).shape
        (2,)
        >>> (index, score), *others = ranker.rerank("what is bread", ["Bread is baked.", "By the river."])
    """

    def __init__(
        self,
        model: RankerModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        is_distributed: bool = False,
        truncation: bool = True,
        tokens_per_batch: int | None = None,
    ) -> None:
        is_ranker = isinstance(getattr(model, "config", None), RankerConfig)  # perhaps with adapters around it
        if not is_ranker or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"A ranker is a model and its tokenizer, got {type(model)} and {type(tokenizer)}.")
        _check_batch_size("batch_size", batch_size)
        if tokens_per_batch is not None:
            _check_batch_size("tokens_per_batch", tokens_per_batch)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.tokens_per_batch = tokens_per_batch
        self.is_distributed = is_distributed
        self.processor = RankingProcessor.from_config(tokenizer, model.config, truncation)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        architecture: str | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        is_distributed: bool = False,
        truncation: bool = True,
        tokens_per_batch: int | None = None,
        dtype: torch.dtype | str | None = None,
        **overrides: Any,
    ) -> "Ranker":
        """Load a checkpoint.

        Args:
            name_or_path, architecture, **overrides: see `load_ranker`.
            device: device of the model; None uses a GPU if there is one.
            batch_size, is_distributed, truncation, tokens_per_batch: see `Ranker`.
            dtype: precision of the weights; None is that of `default_dtype`. For training take `load_ranker`.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        _check_device(device)
        try:
            model = load_ranker(name_or_path, architecture, dtype=dtype or default_dtype(device), **overrides)
            if model.is_fresh:
                logger.warning(f"The {architecture} on the encoder of {name_or_path} is new: it ranks at random yet.")
            tokenizer = load_tokenizer(name_or_path)
            return cls(model.to(device), tokenizer, batch_size, is_distributed, truncation, tokens_per_batch)
        except InputError as error:
            if str(name_or_path) in str(error):
                raise
            raise InputError(f"{name_or_path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write weights, config and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def score(self, queries: str | Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Score pairs, (N,) float32, as `score_pairs`; a single query is scored with every document."""
        is_list = isinstance(documents, Sequence | np.ndarray) and not isinstance(documents, str)
        if isinstance(queries, str) and is_list:
            queries = [queries] * len(documents)
        return score_pairs(self.model, self.processor, queries, documents, **self._settings())

    def rerank(self, query: str, documents: Sequence[str], top_k: int | None = None) -> list[tuple[int, float]]:
        """Return indices into `documents` with their scores, best first; ties keep the order given."""
        if top_k is not None and (not isinstance(top_k, int | np.integer) or top_k < 1):
            raise InputError(f"top_k is an integer from 1, or None for all, got {top_k!r}.")
        if isinstance(documents, Sequence) and len(documents) == 0 and not isinstance(documents, str):
            return []
        scores = self.score(query, documents)
        return [(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top_k]]

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray | csr_array | list[np.ndarray]:
        """Encode queries, see `encode_texts`."""
        return encode_texts(self.model, self.processor, "query", texts, **self._settings())

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray | csr_array | list[np.ndarray]:
        """Encode documents, see `encode_texts`."""
        return encode_texts(self.model, self.processor, "document", texts, **self._settings())

    def _settings(self) -> dict[str, Any]:
        settings = {"batch_size": self.batch_size, "is_distributed": self.is_distributed}
        return settings | {"tokens_per_batch": self.tokens_per_batch}


def default_dtype(device: str | torch.device) -> torch.dtype:
    """Return the precision of scoring and encoding: bfloat16 on a GPU that computes in it, float32 elsewhere."""
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def check_model_paths(names: Iterable[str]) -> None:
    """Refuse, by a FileNotFoundError, a path of a model that does not exist; a name on the Hub is owner/name."""
    for name in names:
        is_path = name.startswith((".", "/")) or name.count("/") > 1
        if is_path and "://" not in name and not Path(name).exists():
            raise FileNotFoundError(f"The model {name} does not exist; give a folder, or a name on the Hub.")


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, an encoder, or a file of word vectors.

    That of a file lower-cases texts, splits them at spaces and punctuation, and has the ids that `TK.from_encoder`
    gives the file's words. Raises FileNotFoundError if the tokenizer does not exist.
    """
    if Path(name_or_path).is_file():
        words, _ = read_word_vectors(name_or_path)
        vocabulary = {word: index for index, word in enumerate(words, start=2)}
        # Ids 0 and 1 are TK's; they replace words of the same spelling.
        backend = Tokenizer(models.WordLevel(vocabulary | {"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder_folder(str(name_or_path)))
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there is no vocabulary
            raise InputError("it has no vocabulary")
        return tokenizer
    except (OSError, ValueError) as error:
        problem = f"No tokenizer in {name_or_path} ({str(error).splitlines()[0]})"
        raise FileNotFoundError(f"{problem}; save the one that the model was trained with into the folder.") from error
    except Exception as error:  # tokenizers raises Exception itself for files that it cannot read
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"The tokenizer in {name_or_path} is damaged: {reason}; copy its files again.") from error


def _check_batch_size(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} is an integer from 1, got {value!r}.")


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a name that torch does not know, or a device that is not there
        raise InputError(f"There is no device {str(device)!r}: {str(error).splitlines()[0]}.") from None
