"""Generators of queries for documents: language models, in process or behind an endpoint, and weak fallbacks."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import InputError
from ..inference import fingerprint
from ..models.base import clear_errors
from ..models.foreign import load_complete
from ..ranker import default_dtype
from .classifiers import max_tokens, set_padding
from .endpoint import CHARACTERS_PER_TOKEN, Endpoint, EndpointSettings, is_endpoint
from .prompts import QUERIES_TEMPLATE, QueryPrompt

TITLE, FIRST_SENTENCE = FALLBACKS = ("title", "first_sentence")
TOKENS_PER_QUERY = 64  # the most that is generated
CHARACTERS = 8_000  # of a document, the most that an endpoint reads
LEAST_SENTENCE = 20  # characters; a shorter one, as "1." or "Abstract.", is joined with the next
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n")
NUMBERED = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*")
THOUGHTS = re.compile(r"<think>.*?(</think>|$)", re.DOTALL)


@dataclass(frozen=True)
class QueryGenerator:
    """A source of queries for documents.

    Args:
        name: short name.
        generate: function of texts, their titles ("" for none) and a seed that returns the queries of each text.
        fingerprint: digest of everything that determines the queries.
        is_weak: True for a fallback, which copies a part of the document.
        plan: function of a text that returns the tokens that its request may cost; None if it is not an endpoint.
        usage: what an endpoint has cost up to now.
    """

    name: str
    # A function of texts, their titles ("" for none) and a seed that returns the queries of each text.
    generate: Callable[[Sequence[str], Sequence[str], int], list[list[str]]]
    fingerprint: str  # digest of everything that determines the queries
    is_weak: bool = False  # True for a fallback, which copies a part of the document
    plan: Callable[[str], int] | None = None  # of an endpoint: a text -> the tokens that its request may cost
    usage: Mapping[str, int] = field(default_factory=dict)  # what an endpoint has cost up to now


def load_generator(
    name_or_path: str,
    per_document: int = 3,
    prompt: QueryPrompt | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    endpoint: EndpointSettings | None = None,
) -> QueryGenerator:
    """Load a generator of queries.

    Args:
        name_or_path: a folder or a Hub name of a sequence-to-sequence model such as doc2query, which is sampled from
            as by GPL, or of a causal language model; the address of a chat endpoint, see `Endpoint`; or one of
            `FALLBACKS`, which need no model.
        per_document: queries per document, at most; a fallback has one.
        prompt: what the model reads; None is the document for a sequence-to-sequence model, else `QUERIES_TEMPLATE`.
        batch_size: documents per forward pass.
        dtype, device, endpoint: as of `load_teacher`.

    Raises:
        InputError, FileNotFoundError: if the model generates no text, or a fallback is given a prompt.
    """
    if name_or_path in FALLBACKS:
        if prompt is not None:
            raise InputError(f"The fallback {name_or_path} reads no prompt; leave the template out.")
        return QueryGenerator(name_or_path, _FALLBACKS[name_or_path], name_or_path, is_weak=True)
    if is_endpoint(name_or_path):
        asked = Endpoint(name_or_path, "chat", settings=endpoint or EndpointSettings())
        return _ask_endpoint(asked, prompt or QueryPrompt(QUERIES_TEMPLATE), per_document)
    with clear_errors(name_or_path):
        config = AutoConfig.from_pretrained(name_or_path)
    if config.is_encoder_decoder:
        model_class, prompt = AutoModelForSeq2SeqLM, prompt or QueryPrompt("{document}")
    elif any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or []):
        model_class, prompt = AutoModelForCausalLM, prompt or QueryPrompt(QUERIES_TEMPLATE)
    else:
        names = ", ".join(config.architectures or ["unknown"])
        raise InputError(
            f"{name_or_path} is a {config.model_type} of class {names}, which generates no text; give a "
            "sequence-to-sequence or a causal language model."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = load_complete(model_class, name_or_path, dtype=dtype or default_dtype(device)).to(device).eval()
    set_padding(tokenizer, model.config)
    writer = _Writer(model, tokenizer, prompt, per_document, batch_size)
    name = Path(name_or_path).name or name_or_path
    return QueryGenerator(name, writer.generate, fingerprint(model, prompt, per_document, batch_size))


def _ask_endpoint(asked: Endpoint, prompt: QueryPrompt, per_document: int) -> QueryGenerator:
    most_tokens = per_document * TOKENS_PER_QUERY

    def fill(text: str) -> str:
        return prompt.fill(text[:CHARACTERS], per_document)

    def generate(texts: Sequence[str], titles: Sequence[str], seed: int) -> list[list[str]]:
        answers = asked.complete([fill(text) for text in texts], most_tokens)
        return [read_lines(answer, per_document) for answer in answers]

    def plan(text: str) -> int:
        return math.ceil(len(fill(text)) / CHARACTERS_PER_TOKEN) + most_tokens

    digest = xxhash.xxh3_128_hexdigest(repr((asked.fingerprint, prompt, per_document)).encode())
    return QueryGenerator(asked.name, generate, digest, plan=plan, usage=asked.usage)


@dataclass(frozen=True)
class _Writer:
    """A language model that writes queries: samples of a sequence-to-sequence model, else the likeliest lines."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    prompt: QueryPrompt
    per_document: int
    batch_size: int

    def generate(self, texts: Sequence[str], titles: Sequence[str], seed: int) -> list[list[str]]:
        """Return the queries of each text; a seed gives the same ones again."""
        queries = []
        with torch.inference_mode(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(texts), self.batch_size):
                queries += self._generate_batch(texts[start : start + self.batch_size])
        return queries

    def _generate_batch(self, texts: Sequence[str]) -> list[list[str]]:
        is_seq2seq, count = self.model.config.is_encoder_decoder, self.per_document
        side = "right" if is_seq2seq else "left"
        prompts = [self._fill(text) for text in texts]
        options = {
            "padding": True,
            "padding_side": side,
            "return_tensors": "pt",
            "add_special_tokens": not self._is_chat,
        }
        inputs = self.tokenizer(prompts, **options).to(self.model.device)
        known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if not is_seq2seq:
            options = {"do_sample": False, "max_new_tokens": count * TOKENS_PER_QUERY}
            answers = self.model.generate(**known, **options)[:, known["input_ids"].shape[1] :]
            return [read_lines(answer, count) for answer in self._decode(answers)]
        options = {"do_sample": True, "top_k": 25, "top_p": 0.95, "max_new_tokens": TOKENS_PER_QUERY}  # as GPL
        answers = self._decode(self.model.generate(**known, **options, num_return_sequences=count))
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _decode(self, token_ids: torch.Tensor) -> list[str]:
        return self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)

    def _fill(self, text: str) -> str:
        """Return the prompt of a document, which is cut so that the model can read and answer it."""
        new_tokens = 0 if self.model.config.is_encoder_decoder else self.per_document * TOKENS_PER_QUERY
        limit = max_tokens(self.model.config, self.tokenizer.model_max_length, None)
        empty = self.tokenizer(self._chat(""), add_special_tokens=not self._is_chat)
        room = limit - new_tokens - len(empty["input_ids"])
        if room < 1:
            raise InputError(
                f"The prompt and {new_tokens} new tokens leave no room for a document: the model reads {limit} tokens."
            )
        cut = self.tokenizer(
            text, add_special_tokens=False, truncation=True, max_length=room, return_offsets_mapping=True
        )
        offsets = cut["offset_mapping"]
        return self._chat(text[: offsets[-1][1]] if offsets else "")

    @property
    def _is_chat(self) -> bool:
        """Whether prompts are filled into the tokenizer's chat template, which has the special tokens."""
        return not self.model.config.is_encoder_decoder and self.tokenizer.chat_template is not None

    def _chat(self, text: str) -> str:
        prompt = self.prompt.fill(text, self.per_document)
        if not self._is_chat:
            return prompt
        messages = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return self.tokenizer.apply_chat_template(messages, **options)


def read_lines(answer: str, count: int) -> list[str]:
    """Return the queries in the answer of a chat model, one per line; other lines beside a numbered list are not."""
    lines = [line.strip() for line in THOUGHTS.sub("", answer).splitlines() if line.strip()]
    numbered = [line for line in lines if NUMBERED.match(line)]
    queries = []
    for line in (numbered or lines)[:count]:
        queries.append(NUMBERED.sub("", line).strip("\"'“”« »"))
    return queries


def _first_sentences(texts: Sequence[str], titles: Sequence[str], seed: int) -> list[list[str]]:
    queries = []
    for text, title in zip(texts, titles, strict=True):
        sentence = ""
        for part in SENTENCE_END.split(text.removeprefix(title).strip()):
            sentence = f"{sentence} {part}".strip()
            if len(sentence) >= LEAST_SENTENCE:
                break
        queries.append([sentence])
    return queries


def _titles(texts: Sequence[str], titles: Sequence[str], seed: int) -> list[list[str]]:
    return [[title] for title in titles]


_FALLBACKS = {TITLE: _titles, FIRST_SENTENCE: _first_sentences}
