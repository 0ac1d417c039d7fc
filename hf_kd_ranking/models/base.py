"""What all rankers share: the config fields, the output, building on a pretrained encoder, strict loading.

The forward contract. Dimension 0 of every input is the query. Documents are (B, Ld), or (B, n, Ld) for n documents a
query; scores come back as (B,) or (B, n). `forward` is the only entry to a model: with both sides it returns scores,
with one side that side's vectors. State-dict names are those of the published checkpoints (`bert_model.*`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

# Published configs name their backbone and carry no sizes; the defaults of DistilBertConfig are exactly this one.
PUBLISHED_BACKBONE = "distilbert-base-uncased"


@dataclass
class RankingOutput(ModelOutput):
    """What a ranker returns.

    Args:
        loss: scalar; only where the caller passes labels to a ranker that takes them.
        logits: (N, 1), one per pair, for code that expects a sequence classifier (BERT_CAT only).
        scores: (B,) or (B, n) relevance scores, unbounded, higher is better.
        query_vectors: the query side's representation, (B, H) or (B, Lq, D) by architecture.
        document_vectors: the document side's, (B, H) or (B, n, H) and so on.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    scores: Tensor | None = None
    query_vectors: Tensor | None = None
    document_vectors: Tensor | None = None


@strict
class RankerConfig(PreTrainedConfig):
    """The part of the configuration that every architecture has.

    Args:
        encoder_config: the whole config of the backbone, so that a checkpoint loads without a second repository.
        bert_model: the backbone's name in published configs; read only where `encoder_config` is None.
        max_query_length: longest query in tokens, special tokens included.
        max_document_length: longest document in tokens, special tokens included.
        query_prefix: text put before every query, for encoders trained with one.
        document_prefix: the same for documents.
        initializer_range: standard deviation of fresh linear layers.

    Raises:
        ValueError: if the lengths do not fit the encoder's positions.
    """

    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="distilbert")}
    # True where query and document are read as one sequence; the collator and the scoring loop build inputs by it.
    joins_texts: ClassVar[bool] = False

    encoder_config: dict | PreTrainedConfig | None = None
    bert_model: str | None = None
    max_query_length: int = 30
    max_document_length: int = 200
    query_prefix: str = ""
    document_prefix: str = ""
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None and self.bert_model not in (None, PUBLISHED_BACKBONE):
            self.encoder_config = AutoConfig.from_pretrained(self.bert_model)
        super().__post_init__(**kwargs)
        self.check_lengths()

    def check_lengths(self) -> None:
        """Compare the lengths with the encoder's positions.

        Raises:
            ValueError: if a sequence of the configured length does not fit.
        """
        for name in ("max_query_length", "max_document_length"):
            if getattr(self, name) < 3:
                raise ValueError(f"{name} must be at least 3 ([CLS], one token, [SEP]), got {getattr(self, name)}.")
        limit = self.max_positions
        if limit is None:
            return
        lengths = {"max_query_length": self.max_query_length, "max_document_length": self.max_document_length}
        if self.joins_texts:
            lengths = {"max_query_length + max_document_length": sum(lengths.values())}
        for name, length in lengths.items():
            if length > limit:
                raise ValueError(
                    f"{name} is {length} tokens, but the encoder ({self.encoder_config.model_type}) has positions for "
                    f"{limit}; lower the lengths or take an encoder that reads longer texts."
                )

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens that the encoder can read; None where it has no limit."""
        # Not every config has the field (relative positions), and RoBERTa's count starts behind its padding id.
        positions = getattr(self.encoder_config, "max_position_embeddings", None)
        if positions is not None and self.encoder_config.model_type in ("roberta", "xlm-roberta", "camembert"):
            positions -= self.encoder_config.pad_token_id + 1
        return positions

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The encoder's config, so that `resize_token_embeddings` keeps the saved sizes true."""
        return self.encoder_config


class RankerModel(PreTrainedModel):
    """Base class of the rankers: holds the encoder as `bert_model`, loads strictly."""

    config_class = RankerConfig
    base_model_prefix = "bert_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Encoders are built without their pooler: no ranker uses it, and unused parameters break DDP.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)pooler\."]

    def __init__(self, config: RankerConfig) -> None:
        super().__init__(config)
        config.check_lengths()  # again: from_pretrained sets overridden fields after the config was made
        self.bert_model = without_pooler(AutoModel.from_config(config.encoder_config))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_encoder(
        cls, name_or_path: str, layers: Sequence[int] | None = None, dtype: torch.dtype | None = None, **config: Any
    ) -> "RankerModel":
        """Build a fresh ranker on a pretrained encoder; only the ranker's own head is new.

        Args:
            name_or_path: any checkpoint that `AutoModel` can load as an encoder.
            layers: indices of the encoder's layers to keep, in order (a cheap way to a small student); None keeps all.
            dtype: of the parameters; None keeps float32.
            **config: fields of the architecture's config.

        Raises:
            ValueError: if the checkpoint leaves encoder weights at random values, or layers are out of range.
        """
        encoder, info = AutoModel.from_pretrained(
            name_or_path, dtype=dtype or torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        missing = [key for key in info["missing_keys"] if "pooler." not in key]
        if missing or info["mismatched_keys"]:
            raise ValueError(
                f"{name_or_path} does not hold the weights of the {encoder.config.model_type} encoder that its config "
                f"describes: missing {_first(missing)}, mismatched {_first(info['mismatched_keys'])}."
            )
        encoder = keep_layers(without_pooler(encoder), layers)
        if Path(name_or_path).exists():
            encoder.config._name_or_path = Path(name_or_path).name  # saved and published: no local paths
        model = cls(cls.config_class(encoder_config=encoder.config, **config)).to(encoder.dtype)
        model.bert_model = encoder
        return model.eval()  # as from_pretrained does

    @classmethod
    def from_pretrained(cls, name_or_path: str, *args: Any, **kwargs: Any) -> "RankerModel":
        """Load a checkpoint of this architecture; every weight must be there and be used.

        Raises:
            ValueError: naming the keys, if weights are missing, of another shape, or left over (`pooler.*` excepted).
                A warning would not do: a checkpoint of another architecture would rank at random.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # collected here, raised below
        model, info = super().from_pretrained(name_or_path, *args, **kwargs)
        problems = {kind: info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") if info[kind]}
        if problems:
            found = "; ".join(f"{kind.replace('_', ' ')}: {_first(keys)}" for kind, keys in problems.items())
            raise ValueError(
                f"{name_or_path} is not a complete {cls.__name__} checkpoint ({found}). For a fresh ranker on a plain "
                f"encoder call {cls.__name__}.from_encoder({str(name_or_path)!r}); for another architecture call "
                f"load_ranker({str(name_or_path)!r}), which reads it from the config."
            )
        return (model, info) if wants_info else model

    def encode_tokens(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the encoder over (N, L) or (B, n, L) inputs; returns the last layer's states, (N, L, H)."""
        flat = {name: tensor.flatten(0, -2) for name, tensor in inputs.items()}
        return self.bert_model(**flat).last_hidden_state


def check_same_queries(query: Mapping[str, Tensor], document: Mapping[str, Tensor]) -> None:
    """Refuse a document batch that is not aligned with its query batch.

    Raises:
        ValueError: if dimension 0 differs.
    """
    queries, documents = query["input_ids"].shape, document["input_ids"].shape
    if queries[0] != documents[0]:
        raise ValueError(
            f"Dimension 0 of query and document is the query: got {queries[0]} queries, shape {tuple(queries)}, and "
            f"documents of shape {tuple(documents)}; give documents as (B, Ld) or (B, n, Ld)."
        )


def without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Drop the pooler of encoders that have one; their forward checks for None."""
    if getattr(encoder, "pooler", None) is not None:  # not all encoders declare the attribute
        encoder.pooler = None
    return encoder


def keep_layers(encoder: PreTrainedModel, layers: Sequence[int] | None) -> PreTrainedModel:
    """Keep some of an encoder's layers, in the order given; the config follows.

    Args:
        layers: indices from 0; None keeps all.

    Raises:
        ValueError: if an index is out of range, or the encoder has no single stack of layers.
    """
    if layers is None:
        return encoder
    depth = encoder.config.num_hidden_layers
    stacks = [
        (parent, name)
        for parent in encoder.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"{encoder.config.model_type} has {len(stacks)} stacks of {depth} layers, needed exactly one."
        )
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise ValueError(f"layers must be one or more of 0..{depth - 1}, got {list(layers)}.")
    parent, name = stacks[0]
    stack = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(stack[index] for index in layers))
    encoder.config.num_hidden_layers = len(layers)
    return encoder


def _first(keys: Sequence, count: int = 3) -> str:
    keys = [str(key) for key in keys]
    return ", ".join(sorted(keys)[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "") or "none"
