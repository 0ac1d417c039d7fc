"""SPLADE: a text is a sparse vector of weights over the vocabulary; the score is the dot product.

A weight is log(1 + ReLU(logit)), the logit of a word the largest over the text's tokens. Logits come from a head on
the encoder's states whose decoder is the table of input embeddings, as in masked language models.

Sources: Formal et al. 2021, SPLADE v2, https://arxiv.org/abs/2109.10086; weights of a text's own tokens only: Lin and
Ma 2021, uniCOIL, https://arxiv.org/abs/2106.14807; queries without an encoder: Geng et al. 2024,
https://arxiv.org/abs/2411.04403.
"""

import os
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .base import Side, check_finite, clear_errors, first_keys
from .encoder import EncoderRanker, EncoderRankerConfig
from .errors import InputError
from .scoring import Float32Linear, dot_product

# Names of the parts of a masked language model's head, and the config fields of its activation and of the epsilon of
# its LayerNorm; None for GELU and 1e-12.
MaskedHead = namedtuple("MaskedHead", "dense norm bias activation epsilon")
# By model_type. Other heads have other layers, or decoders of another width than the embeddings.
MASKED_HEADS = {
    "bert": MaskedHead(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        "hidden_act",
        "layer_norm_eps",
    ),
    "distilbert": MaskedHead("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "activation", None),
    "modernbert": MaskedHead("head.dense", "head.norm", "decoder.bias", "classifier_activation", "norm_eps"),
} | dict.fromkeys(
    ("roberta", "xlm-roberta", "camembert", "mpnet"),
    MaskedHead("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", None, "layer_norm_eps"),
)
# Logits computed at once, 256 MiB in float32: those of all tokens of a batch would need gigabytes.
LOGITS_AT_ONCE = 2**26
# Initial bias of the decoder of a fresh head. The states of pretrained encoders are close to the embeddings of their
# tokens: logits of a text's own tokens are about 6, those of other words have a standard deviation of about 1.
FRESH_BIAS = -5.0


@strict
class SpladeConfig(EncoderRankerConfig):
    """Configuration of SPLADE.

    Pruning (the last three fields) applies in evaluation mode only, so that in training every weight has a gradient.

    Args:
        expansion: "head" for the masked-language-model head of the encoder's checkpoint, "tied" for a fresh head of
            the same form, "none" for weights of the text's own tokens only, by a linear layer (uniCOIL).
        query_encoding: "model" encodes queries as documents; "lexical" weighs only their own tokens; "static" takes
            one learned weight per word of the vocabulary, without running the encoder.
        special_token_ids: tokens that are not weighed in texts without expansion, such as [CLS] and [SEP].
        query_top_k: largest number of words in a query's vector; None for no limit.
        document_top_k: the same for a document.
        threshold: weights up to this one become zero.

    Example:
        >>> kd.SpladeConfig(query_encoding="static", document_top_k=200).vectors_per_text
        'sparse'
    """

    model_type = "Splade"
    summary = (
        "SPLADE ranker: one encoder weighs the words of the vocabulary that a text is about, and the score is the dot "
        "product of two such sparse vectors. Document vectors are stored in advance in an inverted index."
    )
    vectors_per_text = "sparse"
    similarity = "dot"

    expansion: Literal["head", "tied", "none"] = "head"
    query_encoding: Literal["model", "lexical", "static"] = "model"
    special_token_ids: list[int] | None = None
    query_top_k: int | None = None
    document_top_k: int | None = None
    threshold: float = 0.0

    def check(self) -> None:
        """See `RankerConfig`; also compares the limits of pruning."""
        super().check()
        for name in ("query_top_k", "document_top_k"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InputError(f"{name} must be at least 1, or None for no limit, got {limit}.")
        if not 0 <= self.threshold < float("inf"):
            raise InputError(f"threshold must be a number of 0 or more, got {self.threshold}.")


class Splade(EncoderRanker):
    """SPLADE ranker.

    Example:
        >>> ranker = kd.Ranker.from_pretrained("splade")
        >>> ranker.encode_documents(["Bread is baked."]).shape[1] == ranker.model.config.encoder_config.vocab_size
        True
    """

    config_class = SpladeConfig

    def __init__(self, config: SpladeConfig) -> None:
        super().__init__(config)
        if config.expansion == "none":
            self._term_weight = Float32Linear(config.encoder_config.hidden_size, 1)
        else:
            width = self.get_input_embeddings().weight.shape[1]
            self._expansion_head = ExpansionHead(config.encoder_config, width)
        if config.query_encoding == "static":
            self._query_weights = nn.Embedding(config.encoder_config.vocab_size, 1)
        self.post_init()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str | os.PathLike,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **config: Any,
    ) -> "Splade":
        """Build a ranker on a pretrained encoder, see `EncoderRanker`.

        Without the field `expansion` the head of a masked language model is used if the checkpoint has one, and a
        fresh head otherwise.

        Raises:
            InputError: as of `EncoderRanker`; if the checkpoint has no head, or one that is not like `ExpansionHead`.
        """
        with clear_errors(str(name_or_path)):
            architectures = AutoConfig.from_pretrained(name_or_path).architectures or []
            is_masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in architectures)
            config.setdefault("expansion", "head" if is_masked else "tied")
            if config["expansion"] == "none" or config.get("query_encoding", "model") != "model":
                config.setdefault("special_token_ids", _special_token_ids(name_or_path))
        model = super().from_encoder(name_or_path, layers, dtype, **config)
        if model.config.expansion == "head":
            model._expansion_head.read(_load_masked(str(name_or_path)), str(name_or_path))
            model.is_fresh = model.config.query_encoding == "static"
        return model

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, None]:
        """Return one vector over the vocabulary per text, float32: (B, V), or (B, n, V) for (B, n, L) inputs."""
        ids = inputs["input_ids"].flatten(0, -2)  # (N, L)
        mask = inputs["attention_mask"].flatten(0, -2).bool()
        query_encoding = self.config.query_encoding if side == "query" else "model"
        if query_encoding == "static":
            present = self._over_vocabulary(ids, self._is_weighed(ids, mask).float())
            weights = present * self._query_weights.weight.float().squeeze(1)
        elif query_encoding == "lexical" or self.config.expansion == "none":
            states = self.encode_tokens(inputs)  # (N, L, H)
            if self.config.expansion == "none":
                logits = self._term_weight(states).squeeze(-1)
            else:
                logits = self._expansion_head.own_logits(states, ids, self.get_input_embeddings().weight)
            weights = self._over_vocabulary(ids, _saturated(logits) * self._is_weighed(ids, mask))
        else:
            weights = self.encode_tokens(inputs, self._expand)
        if not self.training:
            weights = self._prune(weights, side)
        return weights.view(*inputs["input_ids"].shape[:-1], -1), None

    @torch.no_grad()
    def start_from_idf(self, document_frequencies: Tensor, documents: int) -> None:
        """Set the weights of static queries to the words' inverse document frequencies, as Geng et al. 2024 do.

        They are log(1 + (N - df + 0.5) / (df + 0.5)), BM25's, divided by their mean over the words that occur.

        Args:
            document_frequencies: the number of documents with each word, (V,).
            documents: N, the number of documents that were counted.

        Raises:
            InputError: if queries are not static, or no document has a word: the weights would not be numbers.
        """
        if self.config.query_encoding != "static":
            raise InputError(
                f"Only static queries have weights to start, got query_encoding={self.config.query_encoding!r}."
            )
        if not (document_frequencies > 0).any():
            raise InputError(f"None of {documents} documents has a word, from which static queries get their weights.")
        frequencies = document_frequencies.float()
        weights = torch.log1p((documents - frequencies + 0.5) / (frequencies + 0.5))
        weights = weights / weights[frequencies > 0].mean()
        self._query_weights.weight.copy_(weights.unsqueeze(1))

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Return dot products: (B, V) with (B, V) or (B, n, V) gives (B,) or (B, n)."""
        return dot_product(query, document)

    def _expand(self, states: Tensor, mask: Tensor) -> Tensor:
        logits = self._expansion_head(states, mask, self.get_input_embeddings().weight)
        return _saturated(logits) * mask.any(1, keepdim=True)  # zero for a text with nothing attended

    def _is_weighed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return where a token is neither padding nor special, (N, L)."""
        for special in self.config.special_token_ids or []:
            mask = mask & (ids != special)
        return mask

    def _over_vocabulary(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Return the largest weight of each word of the vocabulary, (N, V), of weights (N, L) from 0."""
        vectors = weights.new_zeros(len(ids), self.config.encoder_config.vocab_size)
        return vectors.scatter_reduce(1, ids, weights, "amax")

    def _prune(self, weights: Tensor, side: Side) -> Tensor:
        """Set weights up to the threshold to zero, and all but the largest ones."""
        limit = self.config.query_top_k if side == "query" else self.config.document_top_k
        if self.config.threshold > 0:
            weights = weights.masked_fill(weights.abs() <= self.config.threshold, 0)
        if limit is None or limit >= weights.shape[1]:
            return weights
        places = weights.abs().topk(limit, dim=1).indices  # static weights may be negative
        return torch.zeros_like(weights).scatter(1, places, weights.gather(1, places))

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Change the vocabulary as `PreTrainedModel` does, and the weights per word; new words get the mean."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        size = embeddings.weight.shape[0]
        if self.config.expansion != "none":
            self._expansion_head.bias = _resized(self._expansion_head.bias, size)
        if self.config.query_encoding == "static":
            self._query_weights.weight = _resized(self._query_weights.weight, size)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ExpansionHead):
            module.initialize()
        elif isinstance(module, nn.Embedding):
            init.ones_(module.weight)
        elif isinstance(module, Float32Linear):
            init.ones_(module.bias)  # a weight of zero has no gradient, and half of the tokens would have it


class ExpansionHead(nn.Module):
    """The head of a masked language model: dense layer, activation, LayerNorm, and the input embeddings as decoder.

    Args:
        config: the encoder's.
        width: size of an input embedding.
    """

    def __init__(self, config: PreTrainedConfig, width: int) -> None:
        super().__init__()
        settings, names = config.to_dict(), MASKED_HEADS.get(config.model_type)
        activation = settings[names.activation] if names is not None and names.activation else "gelu"
        epsilon = settings[names.epsilon] if names is not None and names.epsilon else 1e-12
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[activation]
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def initialize(self) -> None:
        """Start from the states themselves, see `FRESH_BIAS`."""
        if self.dense.in_features == self.dense.out_features:
            init.eye_(self.dense.weight)
        init.ones_(self.norm.weight)
        init.zeros_(self.norm.bias)
        init.constant_(self.bias, FRESH_BIAS)

    def forward(self, states: Tensor, mask: Tensor, embeddings: Tensor) -> Tensor:
        """Return the largest logit of every word over a text's tokens, (n, V).

        Args:
            states: (n, l, H).
            mask: (n, l), True at tokens.
            embeddings: (V, E).
        """
        states = self.norm(self.activation(self.dense(states)))  # (n, l, E)
        # Padding repeats a token, which changes no maximum: to mask the logits would copy them.
        rows, first = torch.arange(len(states), device=states.device), mask.byte().argmax(1)
        states = torch.where(mask.unsqueeze(-1), states, states[rows, first].unsqueeze(1))
        size = max(1, LOGITS_AT_ONCE // (states.shape[1] * len(embeddings)))
        largest = []
        for part in states.split(size):
            logits = nn.functional.linear(part, embeddings)  # (size, l, V)
            # For the backward pass max keeps the places, (size, V), amax the logits.
            largest.append(logits.max(1).values if torch.is_grad_enabled() else logits.amax(1))
        return torch.cat(largest).float() + self.bias

    def own_logits(self, states: Tensor, ids: Tensor, embeddings: Tensor) -> Tensor:
        """Return the logit of each token itself, (n, l), for ids (n, l)."""
        states = self.norm(self.activation(self.dense(states))).float()
        return (states * nn.functional.embedding(ids, embeddings).float()).sum(-1) + self.bias[ids]

    @torch.no_grad()
    def read(self, masked: PreTrainedModel, source: str) -> None:
        """Copy the head of a masked language model; biases that it does not have are zero.

        Raises:
            InputError: if its form is another one, or its decoder is not the table of input embeddings.
        """
        names = MASKED_HEADS.get(masked.config.model_type)
        if names is None:
            known = ", ".join(MASKED_HEADS)
            raise _head_error(source, f"the head of {masked.config.model_type} is not like that of {known}")
        decoder, embeddings = masked.get_output_embeddings().weight, masked.get_input_embeddings().weight
        if not torch.equal(decoder, embeddings):
            raise _head_error(source, "its decoder differs from its input embeddings (tie_word_embeddings)")
        weights = masked.state_dict()
        for name, parameter in self.named_parameters():
            part, _, kind = name.rpartition(".")
            found = weights.get(f"{getattr(names, part)}.{kind}" if part else names.bias)
            parameter.copy_(torch.zeros(()) if found is None else found)
        check_finite(self, source)


def _saturated(logits: Tensor) -> Tensor:
    return torch.log1p(torch.relu(logits.float()))


def _special_token_ids(name_or_path: str | os.PathLike) -> list[int]:
    """Return the ids of the tokens that a tokenizer adds to texts; the token of unknown words is not one of them."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    return sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def _load_masked(name: str) -> PreTrainedModel:
    """Load the masked language model of a checkpoint with all weights, or raise an InputError."""
    try:
        with clear_errors(name):
            settings = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            masked, info = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32, **settings)
    except InputError as error:
        raise _head_error(name, str(error)) from error
    lacking = [*info["missing_keys"], *info["mismatched_keys"]]
    if lacking:
        raise _head_error(name, f"missing or mismatched {first_keys(lacking)}")
    return masked


def _head_error(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} has no masked-language-model head that a Splade can use: {reason}; take expansion='tied' for a fresh "
        "head, or expansion='none' for the weights of a text's own tokens."
    )


def _resized(weights: nn.Parameter, size: int) -> nn.Parameter:
    kept, mean = weights.data[:size], weights.data.mean()
    return nn.Parameter(torch.cat([kept, mean.expand(size - len(kept), *kept.shape[1:])]))
