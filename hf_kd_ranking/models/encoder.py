"""Rankers on a pretrained encoder: the backbone's config, the encoder as `bert_model`, fresh rankers.

State-dict names are those of the published checkpoints: `bert_model.*` and the ranker's own layers.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from .base import RankerConfig, RankerModel, check_fields, check_positions, clear_errors, first_keys
from .errors import InputError
from .padding import FIRST_TOKENS, FLASH_ATTENTION, VARLEN, can_run_varlen, row_lengths, run_packed

# Published configs name their backbone and carry no sizes; the defaults of DistilBertConfig are exactly this one.
PUBLISHED_BACKBONE = "distilbert-base-uncased"
# Layers that rankers add to an encoder; an encoder checkpoint that holds one is a ranker's.
RANKER_HEADS = ("_classification_layer.", "compressor.", "_term_weight.", "_expansion_head.", "_query_weights.")
# By model_type, for encoders whose layers are called with (states, mask): the name of their list of layers, and of the
# part of a layer whose output is the input of its feed-forward network.
LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert")
LAYERS = {"distilbert": "transformer.layer"} | dict.fromkeys(LIKE_BERT, "encoder.layer")
BEFORE_FEED_FORWARD = {"distilbert": "sa_layer_norm"} | dict.fromkeys(LIKE_BERT, "attention")
# The field of their configs with the probability of dropout on attention.
ATTENTION_DROPOUT = {"distilbert": "attention_dropout"} | dict.fromkeys(LIKE_BERT, "attention_probs_dropout_prob")
# Encoders that read nothing from input ids but their embeddings, by model_type: others derive positions from them.
READ_EMBEDDINGS = ("bert", "distilbert")
# Encoder-decoders even if their config denies it, as that of their encoders does.
T5_LIKE = ("t5", "mt5", "umt5")
# Encoders whose first position follows the padding id, by model_type.
COUNT_FROM_PADDING = (
    "camembert data2vec-text ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod"
).split()


@strict
class EncoderRankerConfig(RankerConfig):
    """The configuration of a ranker on a pretrained encoder.

    Args:
        encoder_config: the whole config of the backbone, so that a checkpoint loads without a second repository.
        bert_model: the backbone's name in published configs; read only if `encoder_config` is None.
    """

    # True if the score reads the state of the first token only, which must then depend on the whole text.
    reads_first_state = False
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="distilbert")}

    encoder_config: dict | PreTrainedConfig | None = None
    bert_model: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.encoder_config is None and self.bert_model not in (None, PUBLISHED_BACKBONE):
            self.encoder_config = AutoConfig.from_pretrained(self.bert_model)
        if self.bert_model == PUBLISHED_BACKBONE:
            # Published folders may hold a bare vocab.txt, and AutoTokenizer knows no tokenizer of our model types.
            kwargs.setdefault("tokenizer_class", "DistilBertTokenizer")
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """See `RankerConfig`; also refuses encoder-decoders."""
        refuse_decoder(self.encoder_config)
        super().check()

    @property
    def max_positions(self) -> int | None:
        """See `RankerConfig`."""
        return max_positions(self.encoder_config)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the encoder's config, so that `resize_token_embeddings` changes the sizes that are saved."""
        return self.encoder_config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Read a config file; a plain encoder's (published dot and PreTTR models) becomes the backbone's."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type", cls.model_type) != cls.model_type:
            if Path(config.get("_name_or_path") or "").is_absolute():
                config["_name_or_path"] = Path(config["_name_or_path"]).name  # saved and published: no local paths
            config = {"model_type": cls.model_type, "encoder_config": config}
        return config, kwargs


class EncoderRanker(RankerModel):
    """Base class of the rankers on a pretrained encoder."""

    config_class = EncoderRankerConfig
    base_model_prefix = "bert_model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Encoders are built without their pooler: no ranker uses it, and unused parameters break DDP.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)pooler\."]

    def __init__(self, config: EncoderRankerConfig) -> None:
        super().__init__(config)
        self.bert_model = without_pooler(AutoModel.from_config(config.encoder_config))

    @classmethod
    def from_encoder(
        cls, name_or_path: str, layers: Sequence[int] | None = None, dtype: torch.dtype | None = None, **config: Any
    ) -> "EncoderRanker":
        """Build a fresh ranker on a pretrained encoder; only the ranker's own head is new.

        Args:
            name_or_path: any checkpoint that `AutoModel` can load as an encoder.
            layers: indices of the encoder's layers to keep, in order (a cheap way to a small student); None keeps all.
            dtype: of the parameters; None is float32.
            **config: fields of the architecture's config; `encoder_config` replaces fields of the checkpoint's own.

        Raises:
            InputError: if the checkpoint lacks weights or is a ranker's, or a config field or a layer does not exist.
        """
        check_fields(cls.config_class, config)
        with clear_errors(str(name_or_path)):
            encoder_config = read_encoder_config(name_or_path, config.pop("encoder_config", None))
            refuse_decoder(encoder_config)
            encoder, info = AutoModel.from_pretrained(
                name_or_path,
                config=encoder_config,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        heads = [key for key in info["unexpected_keys"] if key.startswith(RANKER_HEADS)]
        if isinstance(encoder, RankerModel):
            heads = [type(encoder).__name__]
        if heads:
            problem = f"is a ranker and not a plain encoder ({first_keys(heads)})"
            raise InputError(f"{name_or_path} {problem}: load_ranker(name_or_path) loads it.")
        missing = [key for key in info["missing_keys"] if "pooler." not in key]
        if missing or info["mismatched_keys"]:
            raise InputError(
                f"{name_or_path} does not hold the weights of the {encoder.config.model_type} encoder of its config: "
                f"missing {first_keys(missing)}, mismatched {first_keys(info['mismatched_keys'])}."
            )
        encoder = without_pooler(encoder)
        if layers is not None:
            _keep_layers(encoder, layers)
        model = cls.around(encoder, **config)
        model.check_weights(str(name_or_path))
        return model

    @classmethod
    def around(cls, encoder: PreTrainedModel, **config: Any) -> "EncoderRanker":
        """Build a fresh ranker around an encoder in memory, in evaluation mode."""
        name = encoder.config.name_or_path
        if Path(name).exists():
            encoder.config._name_or_path = Path(name).name  # saved and published: no local paths
        model = cls(cls.config_class(encoder_config=encoder.config, **config)).to(encoder.dtype)
        model.bert_model = encoder
        model.is_fresh = len(model.head_parameters()) > 0
        return model.eval()

    def check_weights(self, source: str) -> None:
        """See `RankerModel`; also refuses causal encoders if only the first state is read."""
        super().check_weights(source)
        weight = next(self.bert_model.parameters())
        is_elsewhere = weight.is_meta or weight.numel() == 0  # as under ZeRO
        # Other implementations of attention may not run before the model is on its device.
        can_run = self.config.encoder_config._attn_implementation in (None, "eager", "sdpa") and not is_elsewhere
        if not self.config.reads_first_state or not can_run:
            return
        ids = torch.tensor([[1, 2], [1, 3]], device=weight.device)
        with torch.no_grad():
            states = self.bert_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        if torch.allclose(states[0, 0], states[1, 0], rtol=1e-4, atol=1e-6):
            raise InputError(
                f"{source}: {self.config.encoder_config.model_type} is a causal encoder, whose first state does not "
                f"depend on the text that follows, so {self.config.model_type} would give every document one score; "
                "take an encoder that reads in both directions, or bert_dot with pooling='mean'."
            )

    def encode_tokens(
        self, inputs: Mapping[str, Tensor], pool: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the last layer's states, (N, L, H), of (N, L) or (B, n, L) inputs; padding's may be zero.

        `pool` makes one vector per text, (n, D), of the states and the mask, (n, l, H) and (n, l), of some rows; the
        result is then (N, D).
        """
        flat = {name: tensor.flatten(0, -2) for name, tensor in inputs.items() if name != "lengths"}
        check_positions(flat["input_ids"].shape[1], self.config.max_positions)
        if "attention_mask" in flat and self.packs_rows():
            mask = flat.pop("attention_mask")
            states = self.run_layers_packed(self.bert_model.embeddings(**flat), mask)
            return states if pool is None else pool(states, mask.bool())
        if self.groups_rows and torch.is_grad_enabled() and self.config.encoder_config.model_type in READ_EMBEDDINGS:
            # Once for all groups of rows: the gradient of each lookup is a table of the whole vocabulary.
            flat["inputs_embeds"] = self.bert_model.get_input_embeddings()(flat.pop("input_ids"))

        def run(**rows: Tensor) -> Tensor:
            states = self.bert_model(**rows).last_hidden_state
            return states if pool is None else pool(states, rows["attention_mask"].bool())

        return self.run_rows(run, flat, flat.get("attention_mask"), row_lengths(inputs))

    def packs_rows(self) -> bool:
        """Return whether attention reads the tokens of all rows as one sequence; chooses torch's own where it can.

        That is for half precision on GPUs, and has no dropout; flash-attn is chosen by `attn_implementation`.
        """
        if (
            self.config.encoder_config.model_type not in LAYERS
            or not self.groups_rows
            or torch.compiler.is_compiling()
        ):
            return False
        config = self.bert_model.config
        if config._attn_implementation in FLASH_ATTENTION:
            return True
        dtype, device = self.dtype, self.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        has_dropout = self.training and vars(config)[ATTENTION_DROPOUT[config.model_type]] > 0
        if (
            has_dropout
            or config._attn_implementation not in ("sdpa", VARLEN)
            or not can_run_varlen(self.device, dtype)
        ):
            return False
        if config._attn_implementation != VARLEN:
            self.bert_model.set_attn_implementation(VARLEN)  # the same as "sdpa" for rows that are not packed
        return True

    def run_layers_packed(self, states: Tensor, mask: Tensor, which: slice = slice(None)) -> Tensor:
        """Run some of the encoder's layers over the tokens of all rows as one sequence, see `run_packed`."""
        layers = self.bert_model.get_submodule(LAYERS[self.config.encoder_config.model_type])[which]

        def run(states: Tensor, **attention: Tensor | int) -> Tensor:
            for layer in layers:
                states = layer(states, None, **attention)
            return states

        return run_packed(run, states, mask)

    def encode_first(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the state of each sequence's first token, (N, H)."""
        with self.first_state_only():
            return self.encode_tokens(inputs)[:, 0]

    @contextmanager
    def first_state_only(self) -> Iterator[None]:
        """Let the last layer return the first state of a row only, (N, 1, H), if the encoder is one of `LAYERS`.

        Its feed-forward network, two thirds of its work, skips the other states. Scores and gradients are the same.
        """
        encoder_type = self.config.encoder_config.model_type
        # The hook breaks a compiled graph, and is missing when activations are computed again by checkpointing, which
        # FSDP and ZeRO (without groups_rows) may do on their own.
        recomputes = torch.is_grad_enabled() and (self.is_activation_checkpointing or not self.groups_rows)
        if encoder_type not in LAYERS or recomputes or torch.compiler.is_compiling():
            yield
            return
        last_layer = self.bert_model.get_submodule(LAYERS[encoder_type])[-1]
        hook = last_layer.get_submodule(BEFORE_FEED_FORWARD[encoder_type]).register_forward_hook(_first_state)
        try:
            yield
        finally:
            hook.remove()


def _first_state(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
    states = output if isinstance(output, Tensor) else output[0]
    packed = FIRST_TOKENS.get()
    if packed is None:
        first = states[:, :1].contiguous()  # the last bits of products over a view depend on its place in memory
    elif states.shape[1] == len(packed):  # the hook of another thread was here
        first = states
    else:
        first = states[:, packed]
    return first if isinstance(output, Tensor) else (first, *output[1:])


def first_position(config: PreTrainedConfig) -> int:
    """Return the position id of a sequence's first token in an encoder."""
    return config.pad_token_id + 1 if config.model_type in COUNT_FROM_PADDING else 0


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence in tokens that an encoder can read; None without a limit (relative positions)."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # XLNet says -1
        return None
    return positions - first_position(config)


def refuse_decoder(config: PreTrainedConfig) -> None:
    """Raise an InputError for the config of an encoder-decoder, whose states are those of the decoder."""
    if config.is_encoder_decoder or config.model_type in T5_LIKE:
        raise InputError(f"{config.model_type} models are encoder-decoders; rankers are built on encoders only.")


def read_encoder_config(
    name_or_path: str | os.PathLike, overrides: dict | PreTrainedConfig | None
) -> PreTrainedConfig:
    """Return the config of an encoder's checkpoint, with other values of some of its fields."""
    config = AutoConfig.from_pretrained(name_or_path)
    if overrides is None:
        return config
    if isinstance(overrides, PreTrainedConfig):
        return overrides
    return AutoConfig.for_model(**(config.to_dict() | overrides))


def without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    """Drop the pooler of encoders that have one; their forward checks for None."""
    if getattr(encoder, "pooler", None) is not None:  # not all encoders declare the attribute
        encoder.pooler = None
    return encoder


def _keep_layers(encoder: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep some of an encoder's layers, in the order given, and change its config accordingly."""
    config, depth = encoder.config, encoder.config.num_hidden_layers
    stacks = [module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(stacks) != 1:
        raise InputError(f"{config.model_type} has {len(stacks)} stacks of {depth} layers, needed exactly one.")
    if not layers or min(layers) < 0 or max(layers) >= depth:
        raise InputError(f"layers must be one or more of 0..{depth - 1}, got {list(layers)}.")
    stack = stacks[0]
    for place, index in enumerate(layers):
        if dict(stack[place].named_parameters()).keys() != dict(stack[index].named_parameters()).keys():
            problem = f"Layer {index} of {config.model_type} has other weights than layer {place}"
            raise InputError(f"{problem}: keep layer {place} in its place, got {list(layers)}.")
    kept = [stack[index] for index in layers]
    del stack[:]
    stack.extend(kept)
    for field in ("layer_types", "mlp_layer_types"):  # one entry per layer, in the configs that have them
        types = getattr(config, field, None)
        if types is not None:
            setattr(config, field, [types[index] for index in layers])
    config.num_hidden_layers = len(layers)
