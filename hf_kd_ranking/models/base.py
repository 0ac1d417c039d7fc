"""What all rankers share: lengths in the config, the forward contract, the output, strict loading, shipping the code.

The forward contract. Dimension 0 of every input is the query. Documents are (B, Ld), or (B, n, Ld) for n documents a
query; scores come back as (B,) or (B, n). `forward` is the only entry to a model: with both sides it returns scores,
with one side that side's vectors.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import ModelOutput

from .padding import run_by_length

Side = Literal["query", "document"]


@dataclass
class RankingOutput(ModelOutput):
    """What a ranker returns.

    Args:
        loss: scalar; only where the caller passes labels to a ranker that takes them.
        logits: (N, 1), one per pair, for code that expects a sequence classifier (BERT_CAT only).
        scores: (B,) or (B, n) relevance scores, unbounded, higher is better.
        query_vectors: the query side's representation, (B, D), or (B, Lq, D) where every term has a vector.
        document_vectors: the document side's, (B, D) or (B, Ld, D), with n documents a query (B, n, D) and so on.
        query_mask: (B, Lq), True where a vector belongs to a term; None where a text has one vector.
        document_mask: the same for documents.
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
    """The part of the configuration that every architecture has.

    Args:
        max_query_length: longest query in tokens, special tokens included.
        max_document_length: longest document in tokens, special tokens included.
        query_prefix: text put before every query, for encoders trained with one.
        document_prefix: the same for documents.
        initializer_range: standard deviation of fresh linear layers.

    Raises:
        ValueError: if the lengths do not fit the model's positions.
    """

    # What an architecture can do, declared once. Where the user may choose, the config has a field or a property.
    summary: ClassVar[str] = ""  # two sentences for the model card
    joins_texts: ClassVar[bool] = False  # query and document are read as one sequence
    adds_special_tokens: ClassVar[bool] = True  # [CLS] and [SEP]
    query_augmentation: ClassVar[int] = 0  # [MASK] tokens after a query
    vectors_per_text: ClassVar[Literal["none", "one", "per_token", "sparse"]] = "per_token"
    # How vectors are compared; "layers" are layers of the model, which no index can search by.
    similarity: ClassVar[Literal["dot", "max_sim", "layers"] | None] = "layers"
    # How a query token matches a document token, where the match can be shown to a user.
    token_similarity: ClassVar[Literal["dot", "cosine"] | None] = None
    # False where a document has no vectors, or they depend on the query: they cannot be stored in advance.
    is_storable: ClassVar[bool] = True

    max_query_length: int = 30
    max_document_length: int = 200
    query_prefix: str = ""
    document_prefix: str = ""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        # A saved pipeline names its shipped code here, which transformers would run only with trust_remote_code; where
        # the task is registered, this package's pipeline reads the checkpoint.
        if set(kwargs.get("custom_pipelines") or ()) <= PIPELINE_REGISTRY.supported_tasks.keys():
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "RankerConfig":
        """Build from a saved config; overrides count when the fields are compared, not only afterwards."""
        known = {field.name for field in fields(cls)}
        return super().from_dict(config_dict | {k: v for k, v in kwargs.items() if k in known}, **kwargs)

    def check(self) -> None:
        """Compare the fields with one another.

        Raises:
            ValueError: if a sequence of the configured length does not fit.
        """
        for name in ("max_query_length", "max_document_length"):
            if getattr(self, name) < 3:
                raise ValueError(f"{name} must be at least 3 ([CLS], one token, [SEP]), got {getattr(self, name)}.")
        for name, length in self.sequence_lengths().items():
            if self.max_positions is not None and length > self.max_positions:
                raise ValueError(
                    f"{name} is {length} tokens, but the encoder ({self.get_text_config().model_type}) has positions "
                    f"for {self.max_positions}; lower the lengths or take an encoder that reads longer texts."
                )

    @property
    def is_searchable(self) -> bool:
        """True if an index of the stored vectors can search a whole collection."""
        return self.is_storable and self.similarity in ("dot", "max_sim")

    def sequence_lengths(self) -> dict[str, int]:
        """What the longest sequences are made of -> their length in tokens."""
        query = "max_query_length + query_augmentation" if self.query_augmentation else "max_query_length"
        return {
            query: self.max_query_length + self.query_augmentation,
            "max_document_length": self.max_document_length,
        }

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens that the model can read; None where it has no limit."""
        raise NotImplementedError

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Read a checkpoint's config file.

        Raises:
            ValueError: if it is another architecture's: loaded as this one, it would rank at random.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type")
        if model_type != cls.model_type and model_type in CONFIG_MAPPING:
            other = CONFIG_MAPPING[model_type]
            if issubclass(other, RankerConfig):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {model_type} checkpoint, not {cls.model_type}: load_ranker("
                    f"{str(pretrained_model_name_or_path)!r}) reads the architecture from the config."
                )
        return config, kwargs


class RankerModel(PreTrainedModel):
    """Base class of the rankers: scores from the two sides' vectors; loads strictly; saves its code with its weights.

    An architecture that encodes the sides apart defines `encode` and `score_vectors`.
    """

    config_class = RankerConfig
    supports_gradient_checkpointing = True
    # The Auto classes that return the architecture; written into saved configs, so that checkpoints work with
    # trust_remote_code=True on machines without this package.
    auto_classes: ClassVar[tuple[str, ...]] = ("AutoModel",)
    _auto_class = "AutoModel"  # makes save_pretrained copy the code
    # Set to False where processes share the weights of a layer (FSDP, ZeRO): they wait for one another in each of its
    # forwards, so that all must make as many.
    groups_rows: bool = True

    def forward(
        self, query: Mapping[str, Tensor] | None = None, document: Mapping[str, Tensor] | None = None
    ) -> RankingOutput:
        """Score documents for their queries, or encode one side.

        Args:
            query: tokenizer output, tensors (B, Lq).
            document: tokenizer output, tensors (B, Ld) or (B, n, Ld).

        Returns:
            The vectors of each side given; with both sides `scores` (B,) or (B, n).

        Raises:
            ValueError: if the sides do not belong together, or a text is longer than the model's positions.
        """
        check_same_queries(query, document)
        query_vectors, query_mask = (None, None) if query is None else self.encode(query, "query")
        document_vectors, document_mask = (None, None) if document is None else self.encode(document, "document")
        scores = None
        if query is not None and document is not None:
            scores = self.score_vectors(query_vectors, document_vectors, query_mask, document_mask)
        return RankingOutput(
            scores=scores,
            query_vectors=query_vectors,
            document_vectors=document_vectors,
            query_mask=query_mask,
            document_mask=document_mask,
        )

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, Tensor | None]:
        """Vectors of one side, (..., D) or (..., L, D), and the mask of their terms, (..., L), or None."""
        raise NotImplementedError

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Score vectors as `forward` returned them, stored or fresh; (B,) or (B, n) float32."""
        raise NotImplementedError

    def run_rows(self, run: Callable[..., Tensor], inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Run layers over (N, L, ...) inputs; rows of similar length together where that may be, see `run_by_length`.

        A compiled graph wants one shape, and without a mask there is no length.
        """
        if mask is None or not self.groups_rows or torch.compiler.is_compiling():
            return run(**inputs)
        return run_by_length(run, inputs, mask)

    def head_parameters(self) -> list[nn.Parameter]:
        """What the ranker adds to the pretrained part; trained at `head_learning_rate` where that is set."""
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
        """Load a checkpoint of this architecture; every weight must be there, be used and be finite.

        Raises:
            ValueError: naming the keys, if weights are missing, of another shape, or left over (`pooler.*` excepted),
                or hold NaN or infinity. A warning would not do: the model would rank at random.
            FileNotFoundError: if there are no weights.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        source = str(name_or_path or kwargs["config"].name_or_path)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # collected here, raised below
        with clear_errors(source):
            try:
                model, info = super().from_pretrained(name_or_path, *args, **kwargs)
            except TypeError as error:
                if "unexpected keyword argument" in str(error):  # what is no config field goes to the constructor
                    check_fields(cls.config_class, {str(error).split("'")[1]: None})
                raise
        problems = {kind: info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") if info[kind]}
        if problems:
            found = "; ".join(f"{kind.replace('_', ' ')}: {first(keys)}" for kind, keys in problems.items())
            raise ValueError(
                f"{source} is not a complete {cls.__name__} checkpoint ({found}). {cls._fresh_instead()}; for "
                f"another architecture call load_ranker(name_or_path), which reads it from the config."
            )
        check_finite(model, source)
        return (model, info) if wants_info else model

    @classmethod
    def _fresh_instead(cls) -> str:
        return f"For a fresh ranker on a plain encoder call {cls.__name__}.from_encoder(name_or_path)"

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and the code that the checkpoint needs on a machine without this package."""
        # FSDP makes a class at run time, of a module of torch's, whose code would be saved in place of ours.
        own = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))
        type(self).__module__, type(self).__name__ = own.__module__, own.__name__
        module = own.__module__.rpartition(".")[2]
        self.config.auto_map = {"AutoConfig": f"{module}.{type(self.config).__name__}"}
        self.config.auto_map |= dict.fromkeys(self.auto_classes, f"{module}.{own.__name__}")
        super().save_pretrained(save_directory, *args, **kwargs)


def check_same_queries(query: Mapping[str, Tensor] | None, document: Mapping[str, Tensor] | None) -> None:
    """Refuse a document batch that is not aligned with its query batch.

    Raises:
        ValueError: if dimension 0 differs, or neither side is given.
    """
    if query is None and document is None:
        raise ValueError("Needed query=, document= or both (tokenizer outputs), got neither.")
    if query is None or document is None:
        return
    queries, documents = query["input_ids"].shape, document["input_ids"].shape
    if queries[0] != documents[0]:
        raise ValueError(
            f"Dimension 0 of query and document is the query: got {queries[0]} queries, shape {tuple(queries)}, and "
            f"documents of shape {tuple(documents)}; give documents as (B, Ld) or (B, n, Ld)."
        )


def check_positions(length: int, limit: int | None, what: str = "A sequence") -> None:
    """Refuse a sequence that the model has no positions for.

    Raises:
        ValueError: naming both lengths.
    """
    if limit is not None and length > limit:
        raise ValueError(
            f"{what} needs positions for {length} tokens, the model has {limit}: cut the texts when tokenising "
            "(truncation=True, max_length=...)."
        )


@contextmanager
def clear_errors(source: str) -> Iterator[None]:
    """Say in one line what transformers and torch say in many.

    Raises:
        FileNotFoundError: if there is no such model, or it has no weights.
        ValueError: if its weights are pickled code, which is not run.
    """
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(f"No model {source}: {str(error).strip().splitlines()[0]}") from error
    except UnpicklingError as error:
        raise ValueError(
            f"The weights of {source} are pickled together with code, which is not run; convert them to safetensors "
            "where you trust them."
        ) from error


def check_fields(config_class: type[RankerConfig], config: Mapping[str, Any]) -> None:
    """Refuse config fields that the architecture does not have; transformers would keep them and do nothing.

    Raises:
        ValueError: listing the fields there are.
    """
    known = {field.name for field in fields(config_class)}
    own = sorted(known - {field.name for field in fields(PreTrainedConfig)})
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"{config_class.model_type} has no config field {', '.join(unknown)}; it has {', '.join(own)}."
        )


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: naming the first of them.
    """
    for name, parameter in model.named_parameters():
        # A sum is finite only if all its terms are; elementwise checks only where it is not (sums may overflow).
        if parameter.device.type != "meta" and not (parameter.sum().isfinite() or parameter.isfinite().all()):
            raise ValueError(f"{source}: the weights of {name} are not finite; the checkpoint is damaged.")


def first(keys: Sequence) -> str:
    """The first three of some keys, for messages."""
    keys = sorted(map(str, keys))
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "") or "none"
