"""BM25 by bm25s: the first stage whose candidates the rankers re-rank.

Words are runs of letters, digits and the marks that combine with them, in lower case and composed Unicode (NFC). What
is written without blanks is indexed by all pairs of neighbouring characters, and Han and Hangul also by single ones.
"""

import importlib.util
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import regex
import Stemmer
import xxhash
from bm25s.tokenization import Tokenized

from ..artifacts import open_version
from ..data.ids import IdIndex, open_ids
from ..data.languages import SNOWBALL, detect_languages
from ..data.rankings import Ranking
from ..data.texts import TextStore
from ..errors import InputError
from .base import Index, best_of

logger = logging.getLogger(__name__)
LANGUAGES = tuple(Stemmer.algorithms())  # of Snowball
# Languages of Snowball whose stop words bm25s has.
STOP_WORDS = "danish dutch english french german italian norwegian portuguese russian spanish swedish turkish".split()
# Scripts without blanks between words; Hangul has blanks, but its words have endings. ー belongs to no script.
SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}ー"
WORD = regex.compile(rf"(?V1)(?P<characters>(?:[{SCRIPTS}]\p{{M}}*)+)|[[\p{{L}}\p{{N}}\p{{M}}_]--[{SCRIPTS}]]+")
CHARACTER = regex.compile(r"\P{M}\p{M}*")
HAN_OR_HANGUL = regex.compile(r"\p{Han}|\p{Hangul}")
ASCII_WORD = re.compile(r"\w+")  # three times as fast
TEXTS_AT_ONCE = 4_096  # whose lengths are counted together
NUMBA_FROM = 500_000  # documents; compiling takes as long as some 800 queries of so many by numpy
# Soft hyphen, zero-width space, non-joiner and joiner: they change how a word looks, and not which word it is.
IGNORED = dict.fromkeys((0xAD, 0x200B, 0x200C, 0x200D))


class BM25Index(Index):
    """An index of the words of a collection; make one with `build` or `open`.

    Documents without a word of the query are not part of a ranking. Which of the documents tied at rank k are returned
    is up to bm25s.

    Example:
        >>> index = kd.BM25Index.build(kd.TextStore.from_tsv("collection.tsv"), "bm25", language="english")
        >>> run = index.search({"q1": "what is bread"}, k=10)
    """

    def __init__(self, retriever: bm25s.BM25, ids: IdIndex, description: dict[str, Any]) -> None:
        self._retriever = retriever
        if len(ids) >= NUMBA_FROM and importlib.util.find_spec("numba") is not None:
            retriever.backend = "numba"  # equal scores in a quarter of the time
        self.ids = ids
        self.description = description

    @classmethod
    def build(
        cls,
        documents: TextStore,
        folder: str | Path | None = None,
        *,
        k1: float = 0.9,
        b: float = 0.4,
        language: str | None = None,
    ) -> "BM25Index":
        """Index the texts of a store, see `Index`.

        Args:
            k1: saturation of term frequencies; the default is common for the passages of MS MARCO, as is that of `b`.
            b: normalisation by document length, 0 to 1.
            language: language of `LANGUAGES`, by whose rules words are stemmed (Snowball); its stop words are dropped
                where bm25s has a list of them, see `STOP_WORDS`. "auto" is the language that a sample of the texts is
                in, if that is one of these and all are in it. None keeps all words as they are.

        Raises:
            FileExistsError: if the folder contains something.
            InputError: if the language is another one, or k1 or b is out of range.
        """
        settings = _settings(documents, k1, b, language)
        tokens = _tokenize(documents.take(np.arange(len(documents))), settings["language"])
        if not tokens.vocab:  # bm25s needs a word; no query has this one
            tokens = Tokenized(ids=[[0]] * len(documents), vocab={"": 0})
        retriever = bm25s.BM25(k1=k1, b=b)
        retriever.index(tokens, show_progress=len(documents) > 100_000)
        description = {"kind": "bm25", "documents": len(documents), **documents.collection.describe(), **settings}
        index = cls(retriever, IdIndex.build(documents.columns()), description)
        if folder is not None:
            index.save(folder)
        return index

    def _write(self, data: Path) -> None:
        self._retriever.save(str(data), show_progress=False)
        self.ids.save_ids(data)

    @classmethod
    def open(cls, folder: str | Path, ranker: None = None, is_verified: bool = True) -> "BM25Index":
        """Open a saved index, see `Index`."""
        if ranker is not None:
            raise InputError("BM25 searches without a ranker; open it with the folder only.")
        description, data = open_version(Path(folder), "bm25", is_verified)
        if "language" not in description:
            raise InputError(f"{folder} is a BM25 index of an earlier release; remove it and build it again.")
        retriever = bm25s.BM25.load(str(data), mmap=True, show_progress=False)
        return cls(retriever, IdIndex(description["documents"], *open_ids(data)), description)

    def __len__(self) -> int:
        return len(self.ids)

    def _rank(self, texts: Sequence[str], k: int) -> list[Ranking]:
        tokens = _tokenize(texts, self.description["language"])
        rows_and_scores = self._retriever.retrieve(tokens, k=min(k, len(self)), show_progress=False)
        results = []
        for rows, scores in zip(*rows_and_scores, strict=True):
            has_match = scores > 0
            results.append(best_of(scores[has_match], rows[has_match], k))
        return self._with_ids(results)


class BM25Vectors:
    """BM25 as sparse vectors of texts, for engines that multiply by a word's IDF themselves, as Qdrant does.

    A word's dimension is its 32-bit hash, so that there is no vocabulary to keep, and documents can be added; its
    weight is the saturated frequency, f / (f + k1 (1 - b + b length / mean length)). Arguments are those of
    `BM25Index.build`; all texts are read once for their mean length.
    """

    def __init__(self, documents: TextStore, *, k1: float = 0.9, b: float = 0.4, language: str | None = None) -> None:
        settings = _settings(documents, k1, b, language)
        self.documents = documents
        length = 0
        for start in range(0, len(documents), TEXTS_AT_ONCE):
            texts = documents.take(np.arange(start, min(start + TEXTS_AT_ONCE, len(documents))))
            for counts in count_words(texts, settings["language"]):
                length += counts.total()
        self.identity = {**settings, "mean_length": length / max(len(documents), 1)}

    def take(self, rows: np.ndarray) -> list[dict[int, float]]:
        """Return the weights of the words of some rows, by dimension."""
        k1, b, mean_length = self.identity["k1"], self.identity["b"], self.identity["mean_length"]
        vectors = []
        for counts in count_words(self.documents.take(rows), self.identity["language"]):
            norm = k1 * (1 - b + b * counts.total() / (mean_length or 1))
            vectors.append({word: count / (count + norm) for word, count in counts.items()})
        return vectors


def count_words(texts: Sequence[str], language: str | None) -> list[Counter[int]]:
    """Return how often each text has its words, by the hash of the word; a query's vector of `BM25Vectors`."""
    tokens = _tokenize(texts, language)
    hashes = {number: xxhash.xxh32_intdigest(word.encode(errors="replace")) for word, number in tokens.vocab.items()}
    return [Counter(hashes[number] for number in numbers) for numbers in tokens.ids]


def check_language(language: str | None) -> None:
    """Refuse, by an InputError, a language that Snowball has no stemmer for, unless it is "auto"."""
    if language not in (None, "auto", *LANGUAGES):
        raise InputError(f"The language is one of {', '.join(LANGUAGES)}, or auto, got {language!r}.")


def _settings(documents: TextStore, k1: float, b: float, language: str | None) -> dict[str, Any]:
    """Return the parameters of BM25; an InputError refuses those that are out of range.

    "auto" becomes the language of Snowball that all texts are in, as a sample of them says, or None.
    """
    if not (0 <= k1 < math.inf and 0 <= b <= 1):
        raise InputError(f"k1 is a number of 0 or more and b one from 0 to 1, got {k1} and {b}.")
    check_language(language)
    if language == "auto":
        found = detect_languages(documents)
        language = None
        if len(found) == 1:
            language = SNOWBALL.get(found[0])
        logger.info("Language of BM25's stems: %s (the texts are in: %s)", language, ", ".join(found) or "none")
    return {"k1": k1, "b": b, "language": language}


def words(text: str) -> list[str]:
    """Split a text into the words that are indexed, see the module."""
    text = unicodedata.normalize("NFC", text.lower())
    if text.isascii():
        return ASCII_WORD.findall(text)
    found = []
    for match in WORD.finditer(text.translate(IGNORED)):
        if match["characters"] is None:
            found.append(match[0])
            continue
        characters = CHARACTER.findall(match[0])
        for character in characters:
            if len(characters) == 1 or HAN_OR_HANGUL.match(character):
                found.append(character)
        for first, second in pairwise(characters):
            found.append(first + second)
    return found


def _tokenize(texts: Sequence[str], language: str | None) -> Tokenized:
    options = {"lower": False, "token_pattern": r"\S+", "show_progress": len(texts) > 100_000, "stopwords": None}
    if language is not None:
        options["stemmer"] = Stemmer.Stemmer(language)
    if language in STOP_WORDS:
        options["stopwords"] = language
    return bm25s.tokenize((" ".join(words(text)) for text in texts), **options)
