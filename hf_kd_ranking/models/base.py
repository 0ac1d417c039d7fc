"""Everything that rankers share: capabilities, lengths, the contract of `forward`, strict loading, shipped code.

Dimension 0 of every input is the query. Documents are (B, Ld), or (B, n, Ld) for n documents per query; scores come
back as (B,) or (B, n). `forward` is the only entry to a model: with both sides it returns scores, with one side the
vectors of that side.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import ModelOutput

from .errors import InputError
from .padding import run_by_length
from .parts import run_in_parts, score_in_blocks
from .scoring import ALL_PAIRS

Side = Literal["query", "document"]


@dataclass
class RankingOutput(ModelOutput):
    """Output of a ranker.

    Args:
        loss: scalar; only if the caller passes labels (BERT_CAT only).
        logits: (N, 1), one per pair, for code that expects a sequence classifier (BERT_CAT only).
        scores: (B,) or (B, n) relevance scores, unbounded, higher is better.
        query_vectors: (B, D), or (B, Lq, D) with one vector per token.
        document_vectors: (B, [n,] D) or (B, [n,] Ld, D) with n documents per query.
        query_mask: (B, Lq), True where a vector belongs to a token; None if a text has one vector.
        document_mask: (B, [n,] Ld), the same for documents.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    query_vectors: Tensor | None = None
    document_vectors: Tensor | None = None
    query_mask: Tensor | None = None
    document_mask: Tensor | None = None


@strict
class RankerConfig(PreTrainedConfig):
    """The capabilities and the configuration fields that every architecture has.

    Capabilities are class attributes, or properties if they depend on a field:

    * `summary`: two sentences for the model card.
    * `joins_texts`: True if query and document are read as one sequence.
    * `vectors_per_text`: "none"; "one", (D,); "per_token", (L, D); "sparse", one weight per word of the vocabulary.
    * `similarity`: how the vectors of a query and a document are compared: "dot", the dot product; "max_sim", the sum
      over query tokens of the largest dot product; "layers", by layers of the model; None without vectors.
    * `is_storable`: False if documents have no vectors, or vectors that depend on the query.
    * `adds_special_tokens`: True for texts between [CLS] and [SEP].
    * `reads_separators`: True if the model finds the end of the query by its [SEP], which no text may contain then.
    * `query_augmentation`: number of [MASK] tokens after a query; a field of the architectures that have them.

    Args:
        max_query_length: longest query in tokens, special tokens included.
        max_document_length: longest document in tokens, special tokens included.
        query_prefix: text put before every query, for encoders trained with one.
        document_prefix: text put before every document.
        initializer_range: standard deviation of fresh linear layers.

    Raises:
        InputError: if the lengths do not fit the model's positions.
    """

    summary: ClassVar[str] = ""
    joins_texts: ClassVar[bool] = False
    vectors_per_text: ClassVar[Literal["none", "one", "per_token", "sparse"]] = "per_token"
    similarity: ClassVar[Literal["dot", "max_sim", "layers"] | None] = "layers"
    is_storable: ClassVar[bool] = True
    adds_special_tokens: ClassVar[bool] = True
    reads_separators: ClassVar[bool] = False
    query_augmentation: ClassVar[int] = 0

    max_query_length: int = 30
    max_document_length: int = 200
    query_prefix: str = ""
    document_prefix: str = ""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # A saved pipeline names its shipped code here, which transformers would run only with trust_remote_code; if
        # the task is registered, this package's pipeline reads the checkpoint.
        if set(kwargs.get("custom_pipelines") or ()) <= PIPELINE_REGISTRY.supported_tasks.keys():
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.check()

    @property
    def is_searchable(self) -> bool:
        """True if an index of the stored vectors can search a whole collection."""
        return self.is_storable and self.similarity in ("dot", "max_sim")

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens that the model can read; None if it has no limit."""
        return None

    def sequence_lengths(self) -> dict[str, int]:
        """Return the longest sequences: the fields that they consist of -> their length in tokens."""
        query = "max_query_length + query_augmentation" if self.query_augmentation else "max_query_length"
        lengths = {query: self.max_query_length + self.query_augmentation}
        return lengths | {"max_document_length": self.max_document_length}

    def check(self) -> None:
        """Compare the fields with one another; an InputError says which of them do not fit."""
        for name in ("max_query_length", "max_document_length"):
            if getattr(self, name) < 3:
                raise InputError(f"{name} must be at least 3 ([CLS], one token, [SEP]), got {getattr(self, name)}.")
        for name, least in (("query_augmentation", 0), ("compression_dim", 1)):
            size = getattr(self, name, None)
            if size is not None and size < least:
                raise InputError(f"{name} must be at least {least}, got {size}.")
        for name, length in self.sequence_lengths().items():
            if self.max_positions is not None and length > self.max_positions:
                raise InputError(
                    f"{name} is {length} tokens, but the encoder ({self.get_text_config().model_type}) has positions "
                    f"for {self.max_positions}; lower the lengths or take another encoder."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "RankerConfig":
        """Build from a saved config; overrides are applied before the fields are compared."""
        overrides = {field.name: kwargs[field.name] for field in fields(cls) if field.name in kwargs}
        return super().from_dict(config_dict | overrides, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Read a checkpoint's config file.

        Raises:
            InputError: if the checkpoint has another architecture: loaded as this one, it would rank at random.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type")
        is_ranker = model_type in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[model_type], RankerConfig)
        if is_ranker and model_type != cls.model_type:
            name = str(pretrained_model_name_or_path)
            raise InputError(
                f"{name} is a {model_type} checkpoint, not {cls.model_type}: load_ranker({name!r}) loads it."
            )
        return config, kwargs


class RankerModel(PreTrainedModel):
    """Base class of the rankers: scores from the vectors of both sides; loads strictly; saves its code.

    An architecture is one file with its config and model, and a call of `register_ranker`. It defines `from_encoder`,
    and `encode` and `score_vectors` if it encodes the sides separately.
    """

    config_class = RankerConfig
    supports_gradient_checkpointing = True
    # Auto classes, written into saved configs: checkpoints work with trust_remote_code=True without this package.
    auto_classes: ClassVar[tuple[str, ...]] = ("AutoModel",)
    _auto_class = "AutoModel"  # makes save_pretrained copy the code
    # True if a ranker was built on an encoder and must be trained: its scores are random, or nobody's.
    is_fresh: bool = False
    # False if processes share the weights of a layer (FSDP, ZeRO): all must run it the same number of times.
    groups_rows: bool = True
    # Queries, with their documents, that training runs at once and computes again in the backward pass; None runs all.
    rows_at_once: int | None = None

    @classmethod
    def from_encoder(cls, name_or_path: str | os.PathLike, **config: Any) -> "RankerModel":
        """Build a fresh ranker on a pretrained encoder; `config` are fields of the architecture's config."""
        raise NotImplementedError

    def forward(
        self, query: Mapping[str, Tensor] | None = None, document: Mapping[str, Tensor] | None = None
    ) -> RankingOutput:
        """Score documents for their queries, or encode one side.

        Args:
            query: tokenizer output, tensors (B, Lq). It may contain `lengths` (B,), the place of each text's last
                token counted from 1, as an array of numpy or a tensor on the CPU; else the CPU waits for a GPU's mask.
            document: tokenizer output, tensors (B, Ld) or (B, n, Ld), and `lengths` (B,) or (B, n).

        Returns:
            The vectors of each side given; with both sides `scores` (B,) or (B, n).

        Raises:
            InputError: if the sides do not belong together, or a text is longer than the model's positions.
            TypeError: if a side is not a tokenizer's output.
        """
        if query is None and document is None:
            raise InputError("Needed query=, document= or both (tokenizer outputs), got neither.")
        for side in (query, document):
            if side is not None and not isinstance(side, Mapping):
                raise TypeError(
                    f"Needed a tokenizer's output with input_ids, got {type(side).__name__}; kd.Ranker takes texts."
                )
        if query is not None and document is not None:
            _check_same_queries(query["input_ids"].shape, document["input_ids"].shape)
        if self.training and self.rows_at_once is not None and torch.is_grad_enabled():
            outputs = run_in_parts(self._forward_rows, self.rows_at_once, query, document)
        else:
            outputs = self._forward_rows(query, document)
        return RankingOutput(None, None, *outputs)  # without loss and logits

    def _forward_rows(
        self, query: Mapping[str, Tensor] | None, document: Mapping[str, Tensor] | None
    ) -> tuple[Tensor | None, ...]:
        """Return scores, vectors of both sides and their masks, in the order of `RankingOutput`."""
        query_vectors = query_mask = document_vectors = document_mask = scores = None
        if query is not None:
            query_vectors, query_mask = self.encode(query, "query")
        if document is not None:
            document_vectors, document_mask = self.encode(document, "document")
        vectors = (query_vectors, document_vectors, query_mask, document_mask)
        if query is not None and document is not None:
            scores = self._score_sides(query, document, *vectors)
        return (scores, *vectors)

    def _score_sides(
        self, query: Mapping[str, Tensor], document: Mapping[str, Tensor], *vectors: Tensor | None
    ) -> Tensor:
        """Score the vectors of both sides, in the order of `score_vectors`, made from these inputs just now."""
        return self.score_vectors(*vectors)

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of one side, (..., D) or (..., L, D), and the mask of their tokens, (..., L), or None."""
        raise NotImplementedError

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Score vectors as `forward` returned them, stored or fresh; (B,) or (B, n) float32."""
        raise NotImplementedError

    def score_all_pairs(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Score every query with every document.

        Args:
            query, query_mask: vectors and mask of B queries, as `forward` returned them.
            document, document_mask: of N documents, (N, D) or (N, Ld, D), and (N, Ld).

        Returns:
            (B, N) float32.
        """
        if self.config.similarity in ALL_PAIRS:
            return ALL_PAIRS[self.config.similarity](query, document, query_mask, document_mask)
        return score_in_blocks(self.score_vectors, query, document, query_mask, document_mask)

    def run_rows(
        self,
        run: Callable[..., Tensor],
        inputs: Mapping[str, Tensor],
        mask: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Run layers over (N, L, ...) inputs, rows of similar length in one group if possible, see `run_by_length`."""
        # A compiled graph needs one shape, and without a mask the lengths are unknown.
        if mask is None or not self.groups_rows or torch.compiler.is_compiling():
            return run(**inputs)
        return run_by_length(run, inputs, mask, lengths)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the ranker adds to the pretrained part, for `head_learning_rate`."""
        pretrained = {id(parameter) for parameter in self.base_model.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in pretrained]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> "RankerModel":
        """Load a checkpoint of this architecture; every weight must exist, be used and be finite.

        Raises:
            InputError: naming the keys, if weights are missing, of another shape, left over (`pooler.*` excepted) or
                not finite. A warning would not do: the model would rank at random.
            FileNotFoundError: if the weights do not exist.
        """
        returns_info = kwargs.pop("output_loading_info", False)
        if name_or_path is None and "config" not in kwargs:
            raise TypeError("A model is a folder or a name on the Hub, got None.")
        source = str(name_or_path or kwargs["config"].name_or_path)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # collected here, raised below
        with clear_errors(source):
            try:
                model, info = super().from_pretrained(name_or_path, *args, **kwargs)
            except TypeError as error:
                if "unexpected keyword argument" in str(error):  # unknown fields reach the constructor
                    check_fields(cls.config_class, [str(error).split("'")[1]])
                raise
        problems = []
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[kind]:
                problems.append(f"{kind.replace('_', ' ')}: {first_keys(info[kind])}")
        if problems:
            raise InputError(
                f"{source} is not a complete {cls.__name__} checkpoint ({'; '.join(problems)}). A plain encoder is "
                f"loaded by {cls.__name__}.from_encoder(name_or_path), another ranker by load_ranker(name_or_path)."
            )
        model.check_weights(source)
        return (model, info) if returns_info else model

    def check_weights(self, source: str) -> None:
        """Raise an InputError if the weights cannot score: here, if some are not finite."""
        check_finite(self, source)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and the code that the checkpoint needs on a machine without this package."""
        # FSDP replaces the class by one that it makes in a module of torch, whose code would be saved instead of ours.
        own = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))
        type(self).__module__, type(self).__name__ = own.__module__, own.__name__
        module = own.__module__.rpartition(".")[2]
        self.config.auto_map = {"AutoConfig": f"{module}.{type(self.config).__name__}"}
        self.config.auto_map |= dict.fromkeys(self.auto_classes, f"{module}.{own.__name__}")
        super().save_pretrained(save_directory, *args, **kwargs)


def _check_same_queries(queries: torch.Size, documents: torch.Size) -> None:
    if queries[0] != documents[0]:
        raise InputError(
            f"Dimension 0 of query and document is the query: got {queries[0]} queries, shape {tuple(queries)}, and "
            f"documents of shape {tuple(documents)}; give documents as (B, Ld) or (B, n, Ld)."
        )


def check_positions(length: int, limit: int | None, what: str = "A sequence") -> None:
    """Raise an InputError if the model has no positions for a sequence; it names both lengths."""
    if limit is not None and length > limit:
        raise InputError(
            f"{what} needs positions for {length} tokens, the model has {limit}: tokenise with max_length=..."
        )


# What transformers raises for checkpoints whose files it does not know, or has not expected.
FILE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, StrictDataclassError)


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """Raise errors about a checkpoint in one line: FileNotFoundError, or InputError for what cannot be a model."""
    try:
        yield
    except (InputError, FileNotFoundError):
        raise
    except OSError as error:
        raise FileNotFoundError(f"No model {source}: {str(error).strip().splitlines()[0]}") from error
    except UnpicklingError as error:
        raise InputError(
            f"The weights of {source} are pickled together with code, which is not run; convert them to safetensors."
        ) from error
    except FILE_ERRORS as error:
        raise InputError(f"{source}: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
    except SafetensorError as error:
        raise InputError(f"The weights of {source} are damaged: {str(error).strip()}.") from error


def check_fields(config_class: type[RankerConfig], names: Iterable[str]) -> None:
    """Raise an InputError for fields that the architecture does not have; transformers would keep and ignore them."""
    known = {field.name for field in fields(config_class)}
    unknown = sorted(set(names) - known)
    if unknown:
        own = sorted(known - {field.name for field in fields(PreTrainedConfig)})
        raise InputError(
            f"{config_class.model_type} has no config field {', '.join(unknown)}; it has {', '.join(own)}."
        )


def check_finite(model: nn.Module, source: str) -> None:
    """Raise an InputError that names the first weights with NaN or infinity."""
    for name, parameter in model.named_parameters():
        # The sum of finite numbers may overflow, so that only the elements prove it; the sum is faster.
        if parameter.device.type != "meta" and not (parameter.sum().isfinite() or parameter.isfinite().all()):
            raise InputError(f"{source}: the weights of {name} are not finite; the checkpoint is damaged.")


def first_keys(keys: Iterable[Any]) -> str:
    """Return the first three of some keys, for messages."""
    names = sorted(map(str, keys))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more or "none"
