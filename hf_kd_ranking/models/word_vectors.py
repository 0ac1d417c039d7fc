"""Files of word vectors in GloVe's text format."""

import os
from array import array

import torch
from torch import Tensor

from .errors import InputError


def read_word_vectors(path: str | os.PathLike) -> tuple[list[str], Tensor]:
    """Read words and their vectors.

    Args:
        path: a UTF-8 text file with lines `word value value ...`; a first line of two numbers (word2vec's) is skipped.
            Words may contain spaces, as some of GloVe's do.

    Returns:
        The words in the order of the file, and their vectors, (N, H) float32.

    Raises:
        InputError: naming file and line, if a line has another size, a value is not a number, or a word comes twice.
    """
    words: dict[str, int] = {}
    values, size = array("f"), 0
    # Bytes that are not UTF-8 become characters that no text holds, so that they are refused with their line.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.isascii() and any("\ud800" <= character <= "\udfff" for character in line):
                raise InputError(f"{path} line {number}: not UTF-8; convert the file, as with iconv.")
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():
                continue
            size = size or len(fields) - 1
            word, place = " ".join(fields[: max(len(fields) - size, 0)]), f"{path} line {number}"
            if word in words:
                raise InputError(f"{place}: a word that came before ({line[:40]!r}...).")
            if not word or not size:
                raise InputError(f"{place}: {len(fields) - 1} values where others have {size} ({line[:40]!r}...).")
            try:
                values.extend(map(float, fields[-size:]))
            except ValueError as error:
                raise InputError(f"{place}: {error}; needed a word and {size} numbers.") from error
            words[word] = number
    if not words:
        raise InputError(f"{path} is empty, needed lines of a word and its vector.")
    vectors = torch.frombuffer(values, dtype=torch.float32).view(len(words), size).clone()
    if not vectors.isfinite().all():
        raise InputError(f"{path} has a value that is not finite.")
    return list(words), vectors
