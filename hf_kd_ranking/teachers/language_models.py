"""Causal language models as teachers: the logit of the answer yes minus that of no, after a prompt with the pair.

All prompts begin with the same tokens, whose keys and values are computed once.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError
from ..models import RankingProcessor, TokenLists
from ..models.foreign import load_complete
from .classifiers import keep_words, max_tokens, set_padding
from .prompts import QWEN_TEMPLATE, QWEN_TURN, Prompt, fill

MIN_TEXT = 4  # tokens of a query and a document for which a prompt must leave room
MIN_PREFIX = 8  # tokens that are worth being kept
TOLERANCE = 0.02  # of scores with a kept prefix, relative and absolute; half precision rounds more than that rarely


def load_language_model(
    name_or_path: str,
    prompt: Prompt,
    instruction: str,
    max_length: int | None,
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[PreTrainedModel, Callable[..., Tensor], RankingProcessor]:
    """Load a causal language model that answers yes or no.

    Args:
        prompt: the prompt; its answers must be single tokens of the model.
        instruction: replaces {instruction} in the prompt.
        max_length: tokens of a prompt; None takes the model's limit.

    Returns:
        The model; a function from its inputs to scores, (N,) float32; and the processor that makes the inputs.

    Raises:
        InputError: if an answer is not a single token, the model was made for another prompt, or `max_length` leaves
            no room for texts.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    answers = [_token_id(tokenizer, word, name_or_path) for word in (prompt.yes, prompt.no)]
    is_qwen = prompt.template == QWEN_TEMPLATE
    if is_qwen and tokenizer.chat_template is not None and QWEN_TURN not in str(tokenizer.chat_template):
        raise InputError(
            f"{name_or_path} has a chat template of its own, without {QWEN_TURN}, and the default prompt is that of "
            "Qwen3-Reranker; give its prompt (--template), or save it as a CrossEncoder of sentence-transformers."
        )
    model = load_complete(AutoModelForCausalLM, name_or_path, dtype=dtype)
    set_padding(tokenizer, model.config)
    limit = max_tokens(model.config, tokenizer.model_max_length, max_length)
    prompt = prompt.with_instruction(instruction)
    needed = len(tokenizer(fill(prompt.template, "", "")[0])["input_ids"]) + MIN_TEXT
    if needed > limit:
        raise InputError(f"The prompt and a short text need {needed} tokens, max_length allows {limit}.")
    keep_words(model, answers)
    model = model.to(device).eval()
    processor = _PromptProcessor(tokenizer, 0, limit, joins_texts=True, padding_side="left", prompt=prompt)
    cached = _with_kept_prefix(model, processor)
    if cached is not None:
        return model, *cached

    def compute(**inputs: Tensor) -> Tensor:
        return yes_minus_no(model, **inputs)

    return model, compute, processor


def yes_minus_no(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **options: object) -> Tensor:
    """Return the difference of the logits of the two answers after each prompt; (N, L) padded on the left to (N,)."""
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    yes, no = model(**inputs, **options, logits_to_keep=1).logits[:, -1].float().unbind(1)
    return yes - no


def _with_kept_prefix(
    model: PreTrainedModel, processor: "_PromptProcessor"
) -> tuple[Callable[..., Tensor], "_PromptProcessor"] | None:
    """Return how scores are computed from the keys and values of the common prefix, and the processor for that.

    None if the prefix is short, or scores would differ: not every model reads a kept prefix as the prompt's own.
    """
    prefix = torch.tensor([processor.prefix], device=model.device)
    if prefix.shape[1] < MIN_PREFIX:
        return None
    with torch.inference_mode():
        kept = model(input_ids=prefix, use_cache=True, logits_to_keep=1).get("past_key_values")
    if not isinstance(kept, DynamicCache):
        return None

    def compute(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        cache = copy.deepcopy(kept)
        cache.batch_repeat_interleave(len(input_ids))
        mask = torch.cat([attention_mask.new_ones(len(input_ids), prefix.shape[1]), attention_mask], 1)
        return yes_minus_no(model, input_ids, mask, past_key_values=cache, use_cache=True)

    without_prefix = _PromptProcessor(**vars(processor) | {"keeps_prefix": True})
    texts = ["moon", "moon and sun"], ["light", "a long night of light and rain"]
    inputs = {}
    for name, made in (("whole", processor), ("rest", without_prefix)):
        padded = made.pad(made.pairs(*texts))
        inputs[name] = {key: tensor.to(model.device) for key, tensor in padded.items()}
    with torch.inference_mode():
        whole, rest = yes_minus_no(model, **inputs["whole"]), compute(**inputs["rest"])
    if not torch.allclose(whole, rest, rtol=TOLERANCE, atol=TOLERANCE):
        return None
    return compute, without_prefix


def _token_id(tokenizer: PreTrainedTokenizerBase, word: str, name: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(word)
    if token_id in (None, tokenizer.unk_token_id):
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise InputError(f"{name} has no single token {word!r}, by which a yes-no teacher scores.")
        return ids[0]
    return token_id


@dataclass(frozen=True)
class _PromptProcessor(RankingProcessor):
    """A processor that makes prompts; it cuts the texts, the longer one first, and never what is around them."""

    prompt: Prompt = field(default_factory=Prompt)  # with its instruction
    keeps_prefix: bool = False  # True leaves out the tokens before both texts, which the model has read

    @property
    def prefix(self) -> list[int]:
        """Return the tokens with which all prompts begin."""
        return self._tokens(self.prompt.parts()[0])

    def pairs(self, queries: Sequence[str], documents: Sequence[str]) -> TokenLists:
        prefix, suffix = self.prefix, self._tokens(self.prompt.parts()[2])
        room = self.max_query_length + self.max_document_length - len(prefix) - len(suffix)
        middle = self.prompt.parts()[1]
        bodies = []
        for query, document in zip(queries, documents, strict=True):
            bodies.append(fill(middle, query, document)[0])
        input_ids = []
        for row, body in enumerate(self.encode(bodies, add_special_tokens=False)["input_ids"]):
            if len(body) > room:
                body = self._cut(*fill(middle, queries[row], documents[row]), room)
            input_ids.append([*([] if self.keeps_prefix else prefix), *body, *suffix])
        return {"input_ids": input_ids, "attention_mask": [[1] * len(ids) for ids in input_ids]}

    def _tokens(self, text: str) -> list[int]:
        return self.encode([text], add_special_tokens=False)["input_ids"][0] if text else []

    def _cut(self, text: str, spans: dict[str, tuple[int, int]], room: int) -> list[int]:
        """Return the tokens of a prompt's middle without the last ones of the query and the document, longer first."""
        encoding = self.encode(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens: dict[str, list[int]] = {name: [] for name in spans}
        for token, (start, end) in enumerate(encoding["offset_mapping"]):
            for name, (first, last) in spans.items():
                if first <= start and end <= last:
                    tokens[name].append(token)
        dropped = set()
        for _ in range(len(encoding["input_ids"]) - room):
            is_query = len(tokens["{query}"]) > len(tokens["{document}"])
            longer = tokens["{query}"] if is_query else tokens["{document}"]
            dropped.add(longer.pop())
        return [token_id for token, token_id in enumerate(encoding["input_ids"]) if token not in dropped]
