"""PreTTR: an encoder that reads query and document separately in its lower layers and jointly in its upper ones.

Source: MacAvaney et al. 2020, https://arxiv.org/abs/2004.14255; arXiv 2010.02666, equation 2.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from .base import RankingOutput, Side, check_positions
from .encoder import LAYERS, EncoderRanker, EncoderRankerConfig, first_position
from .errors import InputError
from .padding import row_lengths
from .scoring import Float32Linear


@strict
class PreTTRConfig(EncoderRankerConfig):
    """Configuration of PreTTR.

    Args:
        join_layer_idx: number of layers that read the sides separately.
        document_position_offset: position of a document's first token. With an int, stored document states serve every
            query; None takes the length of the longest query. "query_length" is the position after the query's last
            attended token: the scores of the published checkpoints, one pair at a time. "query_width" is the padded
            width of the query batch, so that a score depends on its batch: the scores of the authors' batched code.
        compression_dim: size to which document states are compressed for storage; None for no compression.

    Example:
        >>> kd.PreTTRConfig(join_layer_idx=4, document_position_offset="query_length").is_storable
        False
    """

    model_type = "PreTTR"
    summary = (
        "PreTTR ranker: an encoder that reads query and document separately in its lower layers and together in its "
        "upper ones; the score is linear in the [CLS] vector. The document's lower states are stored in advance."
    )
    vectors_per_text = "per_token"
    similarity = "layers"

    join_layer_idx: int = 3
    document_position_offset: int | Literal["query_length", "query_width"] | None = None
    query_augmentation: int = 8
    compression_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.document_position_offset is None:
            self.document_position_offset = self.max_query_length + self.query_augmentation
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """See `RankerConfig`; also compares the fields with the encoder."""
        encoder, depth = self.encoder_config.model_type, self.encoder_config.num_hidden_layers
        if encoder not in LAYERS:
            raise InputError(f"PreTTR cannot split {encoder} encoders; it can split {', '.join(LAYERS)}.")
        if not 0 <= self.join_layer_idx <= depth:
            raise InputError(f"join_layer_idx must be 0..{depth}, the encoder's layers; got {self.join_layer_idx}.")
        if self.is_storable and self.document_position_offset < 0:
            raise InputError(f"document_position_offset must not be negative, got {self.document_position_offset}.")
        super().check()

    def sequence_lengths(self) -> dict[str, int]:
        """See `RankerConfig`; adds the position where the document, without [CLS], ends."""
        start, name = self.max_query_length + self.query_augmentation, "max_query_length + query_augmentation"
        if self.is_storable:
            start, name = self.document_position_offset, "document_position_offset"
        return super().sequence_lengths() | {f"{name} + max_document_length - 1": start + self.max_document_length - 1}

    @property
    def is_storable(self) -> bool:
        """False if a document's positions depend on the query."""
        return isinstance(self.document_position_offset, int)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple[dict, dict]:
        """Read a config file; a published one is the encoder's, and has at most a layer index of PreTTR's own."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        encoder = config.get("encoder_config") or {}
        if "PreTTR" in (encoder.get("architectures") or []):
            encoder["architectures"] = None  # from here on it is our config, with our field values
            config["document_position_offset"] = "query_length"
            if "join_layer_idx" in encoder:
                config["join_layer_idx"] = encoder.pop("join_layer_idx")
        return config, kwargs


class PreTTR(EncoderRanker):
    """PreTTR ranker.

    Example:
        >>> model = kd.PreTTR.from_encoder("distilbert/distilbert-base-uncased", join_layer_idx=2, compression_dim=8)
        >>> model.config.is_storable, model.config.is_searchable  # states are stored for re-ranking
        (True, False)
    """

    config_class = PreTTRConfig

    def __init__(self, config: PreTTRConfig) -> None:
        super().__init__(config)
        hidden_size = config.encoder_config.hidden_size
        self._classification_layer = Float32Linear(hidden_size, 1, bias=False)
        if config.compression_dim is not None:
            self.compressor = nn.Linear(hidden_size, config.compression_dim)
            self.decompressor = nn.Linear(config.compression_dim, hidden_size)
            self.decompressor_norm = nn.LayerNorm(hidden_size)
        self.post_init()

    def forward(
        self, query: Mapping[str, Tensor] | None = None, document: Mapping[str, Tensor] | None = None
    ) -> RankingOutput:
        """Score documents for their queries, or encode one side; see `RankerModel.forward`.

        Raises:
            InputError: if a document is given without its query and its positions depend on the query.
        """
        if document is not None:
            document = {**document, "position_offset": self._document_offset(query, document)}
        return super().forward(query, document)

    def encode(self, inputs: Mapping[str, Tensor], side: Side) -> tuple[Tensor, Tensor]:
        """Return states below the join layer, (B, L, H) or (B, n, L, H), and their mask; documents lose [CLS]."""
        skip = int(side == "document")
        shape = (*inputs["input_ids"].shape[:-1], inputs["input_ids"].shape[-1] - skip)
        flat = {}
        for name, tensor in inputs.items():
            if name not in ("position_offset", "lengths"):
                flat[name] = tensor.flatten(0, -2)[:, skip:]
        mask, lengths = flat.pop("attention_mask"), row_lengths(inputs)
        if lengths is not None:
            lengths = [length - skip for length in lengths]
        positions = torch.arange(shape[-1], device=mask.device)[None] + first_position(self.config.encoder_config)
        if side == "document":
            positions = positions + inputs["position_offset"].reshape(-1, 1)  # (N, L)
        else:
            check_positions(shape[-1], self.config.max_positions, "A query")
        states = self.bert_model.embeddings(**flat, position_ids=positions)  # (N, L, H)
        states = self._run_layers(states, mask, slice(0, self.config.join_layer_idx), lengths)
        if side == "document" and self.config.compression_dim is not None:
            states = nn.functional.gelu(self.compressor(states))
        return states.view(*shape, states.shape[-1]), mask.view(shape).bool()

    def score_vectors(
        self, query: Tensor, document: Tensor, query_mask: Tensor | None = None, document_mask: Tensor | None = None
    ) -> Tensor:
        """Run the joint layers: (B, Lq, H) with (B, Ld, H) or (B, n, Ld, H) gives (B,) or (B, n)."""
        return self._run_joint_layers(query, document, query_mask, document_mask)

    def _score_sides(
        self, query: Mapping[str, Tensor], document: Mapping[str, Tensor], *vectors: Tensor | None
    ) -> Tensor:
        queries, documents = row_lengths(query), row_lengths(document)
        if queries is None or documents is None:
            return self.score_vectors(*vectors)
        width, n = query["input_ids"].shape[1], len(documents) // len(queries)
        lengths = []
        for place, length in enumerate(documents):
            # The document, without its first token, follows the padding of the query.
            lengths.append(width + length - 1 if length > 1 else queries[place // n])
        return self._run_joint_layers(*vectors, lengths)

    def _run_joint_layers(
        self,
        query: Tensor,
        document: Tensor,
        query_mask: Tensor | None,
        document_mask: Tensor | None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        shape = document.shape[:-2]
        documents = document.flatten(0, -3).to(self.dtype)  # (N, Ld, H)
        queries = _per_document(query.to(self.dtype), shape)  # (N, Lq, H)
        if self.config.compression_dim is not None:
            documents = self.decompressor_norm(self.decompressor(documents))
        states = torch.cat([queries, documents], 1)  # (N, Lq + Ld, H)
        if query_mask is None or document_mask is None:
            raise InputError("PreTTR scores need the masks of both sides; forward returns them with the vectors.")
        mask = torch.cat([_per_document(query_mask, shape), document_mask.flatten(0, -2)], 1)
        with self.first_state_only():
            states = self._run_layers(states, mask, slice(self.config.join_layer_idx, None), lengths)
        return self._classification_layer(states[:, 0]).float().view(shape)

    def _run_layers(self, states: Tensor, mask: Tensor, which: slice, lengths: list[int] | None) -> Tensor:
        layers = self.bert_model.get_submodule(LAYERS[self.config.encoder_config.model_type])[which]
        if len(layers) == 0 or states.shape[1] == 0:
            return states
        if self.packs_rows():
            return self.run_layers_packed(states, mask, which)

        def run(states: Tensor, mask: Tensor) -> Tensor:
            mask = create_bidirectional_mask(self.bert_model.config, states, mask.long())
            for layer in layers:
                states = layer(states, mask)
            return states

        return self.run_rows(run, {"states": states, "mask": mask}, mask, lengths)

    def _document_offset(self, query: Mapping[str, Tensor] | None, document: Mapping[str, Tensor]) -> Tensor:
        """Return the position of each document's first token, (B,) or (B, n), if the encoder has all positions."""
        ids, offset = document["input_ids"], self.config.document_position_offset
        if query is None and not self.config.is_storable:
            raise InputError(
                f"With document_position_offset={offset!r} documents cannot be encoded without their query; load with "
                "an int, for example document_position_offset="
                f"{self.config.max_query_length + self.config.query_augmentation}."
            )
        last = offset if self.config.is_storable else query["input_ids"].shape[1]
        offsets = ids.new_full((ids.shape[0],), last)
        if offset == "query_length":
            places = torch.arange(1, last + 1, device=ids.device)
            offsets = (query["attention_mask"].bool() * places).amax(1)  # (B,)
        check_positions(last + ids.shape[-1] - 1, self.config.max_positions, "A document after its query")
        return _per_document(offsets, ids.shape[:-1]).view(ids.shape[:-1])


def _per_document(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat the rows of queries, (B, ...), for their documents of shape (B,) or (B, n): (B * n, ...)."""
    return rows if len(shape) == 1 else rows.repeat_interleave(shape[1], 0)
