"""Prompts of language models that judge a pair, with the two answers that are compared, or that write queries."""

import re
from dataclasses import dataclass, replace

from ..errors import InputError

# The published prompt of Qwen3-Reranker.
QWEN_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
QWEN_TURN = "<|im_start|>"  # the chat template of a model that was trained with this prompt has it
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
# For models with a chat API, which put their own tokens around it.
CHAT_TEMPLATE = (
    "Judge whether the document answers the query. Answer with one word, {yes} or {no}.\n\n"
    "Query: {query}\n\nDocument: {document}\n\nAnswer:"
)
# For language models that write queries, one per line.
QUERIES_TEMPLATE = (
    "Write {count} different search queries that the following document answers, in the language of the document, as "
    "people type them into a search engine. Write one query per line and nothing else.\n\nDocument: {document}"
)
TEXTS = re.compile(r"(\{query\}|\{document\})")


@dataclass(frozen=True)
class Prompt:
    """A prompt with places for the texts.

    Args:
        template: contains {query} and {document} once each; {yes}, {no} and {instruction} are optional.
        yes, no: the answers, two different words.

    Raises:
        InputError: if a placeholder is missing or repeated, or the answers are not two words.
    """

    template: str = QWEN_TEMPLATE  # has {query} and {document} once each; {yes}, {no} and {instruction} are optional
    yes: str = "yes"
    no: str = "no"

    def __post_init__(self) -> None:
        for name in ("{query}", "{document}"):
            count = self.template.count(name)
            if count != 1:
                raise InputError(f"The template needs {name} once, where the text is put, and has it {count} times.")
        if not self.yes.strip() or not self.no.strip() or self.yes.strip().lower() == self.no.strip().lower():
            raise InputError(f"yes and no are two different words, got {self.yes!r} and {self.no!r}.")

    def with_instruction(self, instruction: str) -> "Prompt":
        """Return the prompt with everything filled in but the texts."""
        template = self.template.replace("{yes}", self.yes).replace("{no}", self.no)
        return replace(self, template=template.replace("{instruction}", instruction))

    def parts(self) -> tuple[str, str, str]:
        """Return the lines before both texts, the middle with both placeholders, and what comes after them.

        The three are tokenised by themselves; at the end of a line that changes nothing.
        """
        before, first, between, second, after = TEXTS.split(self.template)
        lines, newline, start = before.rpartition("\n")
        return lines + newline, start + first + between + second, after

    def fill(self, query: str, document: str) -> str:
        """Return the prompt of a pair; braces in the texts stay as they are."""
        return fill(self.with_instruction(INSTRUCTION).template, query, document)[0]


def fill(template: str, query: str, document: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """Put texts into a template, and return where they are: placeholder -> start and end in characters."""
    filled, spans = "", {}
    texts = {"{query}": query, "{document}": document}
    for part in TEXTS.split(template):
        text = texts.get(part, part)
        if part in texts:
            spans[part] = (len(filled), len(filled) + len(text))
        filled += text
    return filled, spans


@dataclass(frozen=True)
class QueryPrompt:
    """A prompt that asks for queries of a document.

    Args:
        template: contains {document} once; {count}, the number of queries, is optional.

    Raises:
        InputError: if {document} is missing or repeated, or {query} is there.
    """

    template: str  # has {document} once; {count}, the number of queries, is optional

    def __post_init__(self) -> None:
        count = self.template.count("{document}")
        if count != 1 or "{query}" in self.template:
            raise InputError(
                f"The template of generated queries needs {{document}} once and has it {count} times; it has no "
                "{query}, which is what the model writes."
            )

    def fill(self, document: str, count: int) -> str:
        """Return the prompt for a document; braces in its text stay as they are."""
        return fill(self.template.replace("{count}", str(count)), "", document)[0]
