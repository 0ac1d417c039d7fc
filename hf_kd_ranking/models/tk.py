"""TK: word embeddings, two small transformer layers, and kernel pooling over the cosines of all token pairs.

Source: Hofstätter et al. 2020, https://arxiv.org/abs/2002.01854; arXiv 2010.02666, equation 5.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .base import RankerConfig, RankerModel, Side, check_fields, check_finite, check_positions, clear_errors
from .errors import InputError
from .padding import row_lengths
from .scoring import kernel_pooling, kernel_poolings
from .word_vectors import read_word_vectors

# Documents with separate positions start here in the table of sines, far from any query.
DOCUMENT_POSITION = 500
TRAINING_CONFIG = "config.yaml"  # of the authors' training runs
# By our name, for the fields that are read from it.
TRAINING_NAMES = {
    "hidden_size": "pre_trained_embedding_dim",
    "num_hidden_layers": "tk_att_layer",
    "num_attention_heads": "tk_att_heads",
    "intermediate_size": "tk_att_ff_dim",
    "mixes_embeddings": "tk_mix_hybrid_context",
    "has_document_positions": "tk_use_diff_posencoding",
    "kernel_mu": "tk_kernels_mu",
    "kernel_sigma": "tk_kernels_sigma",
    "max_position_embeddings": "max_doc_length",
    "max_document_length": "max_doc_length",
    "max_query_length": "max_query_length",
}


@strict
class TKConfig(RankerConfig):
    """Configuration of TK.

    Args:
        vocab_size: rows of the embedding table; row 0 is padding, row 1 unknown words.
        hidden_size: size of the embeddings and of the layers, a multiple of `num_attention_heads`.
        max_position_embeddings: longest text in tokens, queries included.
        has_document_positions: True gives documents other positions than queries.
        mixes_embeddings: True adds the plain embedding to its contextualised form, with a learned weight.
        kernel_mu: centres of the kernels, cosines.
        kernel_sigma: their widths.

    Example:
        >>> config = kd.TKConfig(vocab_size=10_000, hidden_size=300, num_attention_heads=10)
        >>> len(config.kernel_mu) == len(config.kernel_sigma)
        True
    """

    model_type = "TK"
    summary = (
        "TK ranker: word embeddings, two small transformer layers, and kernel pooling over the cosines of all pairs "
        "of query and document tokens. It needs no pretrained encoder; token vectors are stored in advance."
    )
    vectors_per_text = "per_token"
    similarity = "layers"
    adds_special_tokens = False

    vocab_size: int = 30_522
    hidden_size: int = 300
    num_hidden_layers: int = 2
    num_attention_heads: int = 10
    intermediate_size: int = 300
    max_position_embeddings: int = 200
    has_document_positions: bool = True
    mixes_embeddings: bool = True
    kernel_mu: list[float] = field(
        default_factory=lambda: [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9]
    )
    kernel_sigma: list[float] = field(default_factory=lambda: [0.1] * 11)

    def check(self) -> None:
        """Compare the fields with one another."""
        if self.hidden_size % self.num_attention_heads:
            sizes = f"{self.num_attention_heads} and {self.hidden_size}"
            raise InputError(f"num_attention_heads must divide hidden_size, got {sizes}.")
        centres, widths = len(self.kernel_mu), len(self.kernel_sigma)
        if centres != widths:
            raise InputError(f"A kernel has a centre and a width, got {centres} kernel_mu and {widths} kernel_sigma.")
        super().check()

    @property
    def max_positions(self) -> int:
        """See `RankerConfig`."""
        return self.max_position_embeddings

    @property
    def document_positions(self) -> int:
        """Number of positions that documents have."""
        return self.max_position_embeddings


class ContextLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):
    """torch's post-norm ReLU layer, sequence first, with transformers' activation checkpointing."""


class TK(RankerModel):
    """TK ranker.

    Example:
        >>> model = kd.TK.from_encoder("distilbert/distilbert-base-uncased", num_hidden_layers=1)
        >>> len(model.config.kernel_mu)
        11
    """

    config_class = TKConfig
    _input_embed_layer = "word_embeddings"  # for `get_input_embeddings` and resizing
    _supports_sdpa = True

    def __init__(self, config: TKConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=0)
        # Sequence first and no dropout as published: batch-first layers take a path that zeroes padded positions.
        layer = ContextLayer(size, config.num_attention_heads, config.intermediate_size, dropout=0.0)
        self.contextualizer = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        mixer = torch.full((1,), 0.5)
        if config.mixes_embeddings:
            self.mixer = nn.Parameter(mixer)
        else:  # unread, but in the authors' checkpoints; a parameter without a gradient would break DDP
            self.register_buffer("mixer", mixer)
        self.kernel_bin_weights = nn.Linear(len(config.kernel_mu), 1, bias=False)
        self.register_buffer("mu", torch.tensor(config.kernel_mu).view(1, 1, 1, -1))
        self.register_buffer("sigma", torch.tensor(config.kernel_sigma).view(1, 1, 1, -1))
        longest = max(config.max_position_embeddings, config.document_positions)
        table = _sine_positions(longest + DOCUMENT_POSITION, size)  # (1, L + 500, H)
        start = DOCUMENT_POSITION if config.has_document_positions else 0
        end = start + config.document_positions
        self.register_buffer("positional_features_q", table[:, : config.max_position_embeddings].clone())
        self.register_buffer("positional_features_d", table[:, start:end].clone())
        self.add_score_layers(config)
        self.post_init()

    def add_score_layers(self, config: TKConfig) -> None:
        """Build what the score needs besides the kernels and their weights."""
        self.kernel_alpha_scaler = nn.Parameter(torch.ones(1, 1, len(config.kernel_mu)))

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, Tensor]:
        """Return one vector per token, (B, L, H) or (B, n, L, H), and the mask of the tokens."""
        ids = inputs["input_ids"].flatten(0, -2)  # (N, L)
        check_positions(ids.shape[1], self.config.max_positions, f"A {side}")
        mask = ids > 0  # as published; unknown words count
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"].flatten(0, -2).bool()
        embeddings = self.word_embeddings(ids)  # (N, L, H)
        states = self.contextualize(embeddings, mask, side, row_lengths(inputs))
        if self.config.mixes_embeddings:
            states = self.mixer * embeddings + (1 - self.mixer) * states
        return states.reshape(*inputs["input_ids"].shape, -1), mask.view(inputs["input_ids"].shape)

    def contextualize(self, embeddings: Tensor, mask: Tensor, side: Side, lengths: list[int] | None = None) -> Tensor:
        """Run the layers over (N, L, H) embeddings; `lengths` as in `length_groups`."""
        positions = self.positional_features_q if side == "query" else self.positional_features_d
        states = embeddings + positions[:, : embeddings.shape[1]].to(embeddings.dtype)
        return self.run_rows(self._run_layers, {"states": states, "mask": mask}, mask, lengths)

    def _run_layers(self, states: Tensor, mask: Tensor) -> Tensor:
        # A text without words attends to its padding, which no score counts: a softmax over nothing is NaN in ONNX.
        mask = mask | ~mask.any(1, keepdim=True)
        return self.contextualizer(states.transpose(0, 1), src_key_padding_mask=~mask).transpose(0, 1)

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Weigh the pooled kernels: (B, Lq, H) with (B, Ld, H) or (B, n, Ld, H) gives (B,) or (B, n)."""
        return self._weigh(kernel_pooling, query, document, query_mask, document_mask)

    def score_all_pairs(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Weigh the pooled kernels of every query with every document, see `RankerModel`."""
        return self._weigh(kernel_poolings, query, document, query_mask, document_mask)

    def _weigh(self, pool: Callable[..., Tensor], *vectors_and_masks: Tensor | None) -> Tensor:
        if vectors_and_masks[2] is None or vectors_and_masks[3] is None:
            raise InputError("TK scores need the masks of both sides; forward returns them with the vectors.")
        kernels = [tensor.flatten() for tensor in (self.mu, self.sigma, self.kernel_alpha_scaler)]
        pooled = pool(*vectors_and_masks, *kernels)  # (..., K)
        return (pooled * self.kernel_bin_weights.weight.float().flatten()).sum(-1)

    def head_parameters(self) -> list[nn.Parameter]:
        """See `RankerModel`; the paper trains them ten times as fast as the rest."""
        return [self.kernel_alpha_scaler, self.kernel_bin_weights.weight]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.kernel_bin_weights:  # all other layers keep torch's own initialisation
            init.uniform_(module.weight, -0.014, 0.014)  # the authors'; logarithms of counts are large

    @classmethod
    def from_encoder(cls, name_or_path: str | os.PathLike, dtype: torch.dtype | None = None, **config: Any) -> "TK":
        """Build a fresh TK on an encoder's word embeddings or a file of word vectors.

        Args:
            name_or_path: an encoder, whose word embeddings are scaled by one factor to the length of the positions
                added to them, or a text file of word vectors in GloVe's format, which are not changed. For a file id 0
                is padding, 1 unknown words, and the file's words follow, see `ranker.load_tokenizer`.
            dtype: of the parameters; None is float32.
            **config: fields of the config. The default of `num_attention_heads` is the largest number up to 10 that
                divides the embeddings' size, that of `max_position_embeddings` the length of the longest text.

        Raises:
            InputError: if the file is malformed or a config field unknown.
        """
        check_fields(cls.config_class, config)
        if Path(name_or_path).is_file():
            _, vectors = read_word_vectors(name_or_path)
            # The mean for unknown words: a vector of the usual length that resembles no word.
            vectors = torch.cat([torch.zeros(1, vectors.shape[1]), vectors.mean(0, keepdim=True), vectors])
        else:
            vectors = _read_encoder_embeddings(name_or_path)
            # An encoder normalises its embeddings, whose length is about 1; next to sines ten times as long TK would
            # read positions only.
            vectors = vectors * ((vectors.shape[1] / 2) ** 0.5 / vectors.norm(dim=1).mean())
        size = vectors.shape[1]
        config.setdefault("num_attention_heads", max(count for count in range(1, 11) if size % count == 0))
        query_length = config.get("max_query_length", cls.config_class.max_query_length)
        document_length = config.get("max_document_length", cls.config_class.max_document_length)
        config.setdefault("max_position_embeddings", max(query_length, document_length))
        model = cls(cls.config_class(**(config | {"vocab_size": vectors.shape[0], "hidden_size": size})))
        with torch.no_grad():
            model.word_embeddings.weight.copy_(vectors)
        model.is_fresh = True
        return model.to(dtype or torch.float32).eval()  # as from_pretrained does

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> "TK":
        """Load a checkpoint, or the folder of one of the authors' training runs; see `RankerModel.from_pretrained`."""
        folder = Path(name_or_path)
        if not (folder / TRAINING_CONFIG).is_file() or (folder / "config.json").is_file():
            return super().from_pretrained(name_or_path, *args, **kwargs)
        with clear_errors(str(folder)):
            saved = torch.load(folder / "best-model.pytorch-state-dict", map_location="cpu", weights_only=True)
        weights = {}
        for name, tensor in saved.items():
            name = name.removeprefix("neural_ir_model.")
            weights[name.replace("word_embeddings.token_embedder_tokens.", "word_embeddings.")] = tensor
        settings = _read_training_config(folder / TRAINING_CONFIG)
        settings["vocab_size"] = weights["word_embeddings.weight"].shape[0]
        for name in cls.config_class.__dataclass_fields__.keys() & kwargs.keys():
            settings[name] = kwargs.pop(name)
        config = cls.config_class(**settings)
        config._name_or_path = str(folder)
        return super().from_pretrained(None, *args, config=config, state_dict=weights, **kwargs)


def _sine_positions(length: int, size: int) -> Tensor:
    """Return sines of each position in the first half of the features, cosines in the second; (1, length, size)."""
    scales = size // 2
    step = math.log(10_000.0) / max(scales - 1, 1)
    inverse = torch.exp(torch.arange(scales, dtype=torch.float32) * -step)
    angles = torch.arange(length, dtype=torch.float32).unsqueeze(1) * inverse  # (L, H / 2)
    features = torch.cat([angles.sin(), angles.cos()], 1)
    return nn.functional.pad(features, (0, size % 2)).unsqueeze(0)  # an odd size ends in a zero column


def _read_encoder_embeddings(name_or_path: str | os.PathLike) -> Tensor:
    with clear_errors(str(name_or_path)):
        encoder, info = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
    weight = encoder.get_input_embeddings().weight
    name = next(name for name, parameter in encoder.named_parameters() if parameter is weight)
    if name in info["missing_keys"]:
        raise InputError(f"{name_or_path} does not hold the weights of {name}.")
    check_finite(encoder, str(name_or_path))
    return weight.detach()


def _read_training_config(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if str(values.get("model")).upper() != "TK":
        raise InputError(f"{path} describes the model {values.get('model')!r}, needed a TK.")
    missing = set(TRAINING_NAMES.values()) - values.keys()
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}.")
    return {name: values[theirs] for name, theirs in TRAINING_NAMES.items()}
