"""Read lines, JSON lines and TSV columns; write TSV lines and Arrow files.

What cannot be read is an InputError with file and line.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ..errors import InputError

PLAIN_INTEGER = "0|-?[1-9][0-9]{0,17}"  # the output of str() for integers of 64 bits
BYTE_ORDER_MARK = "\ufeff"  # may begin any line of a file that was joined from several


def open_binary(path: Path) -> io.BufferedIOBase:
    """Open a file for reading; .gz, .zst, .bz2 and .lz4 are decompressed."""
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"), buffer_size=1 << 16)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their numbers, from 1, each without a byte order mark."""
    line = 0
    with open_binary(path) as file:
        for raw in file:
            # LF, CRLF and a bare CR end lines, as for the fast reader
            for text in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                line += 1
                yield line, _decode(path, line, text)


def first_line(path: Path) -> str:
    """Return the first line that is not blank; "" if there is none."""
    return next((text for _, text in read_lines(path) if text.strip()), "")


def _decode(path: Path, line: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        place = f"byte {raw[error.start]:#04x} at column {error.start + 1}"
        raise InputError(f"{path} line {line}: {place} is not UTF-8; convert the file, as with iconv.") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a JSON-lines file with their line numbers; blank lines are skipped.

    Raises:
        InputError: with file and line, for a line that is not a JSON object, or has a string that is not Unicode text.
    """
    for line, text in read_lines(path):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {line}: invalid JSON ({error.msg} at column {error.colno}).") from None
        except (ValueError, RecursionError) as error:  # an integer of too many digits, too many brackets
            raise InputError(f"{path} line {line}: JSON that cannot be read ({error}).") from None
        if not isinstance(value, dict):
            raise InputError(f"{path} line {line}: needed a JSON object, got {type(value).__name__}.")
        if "\\u" in text:
            _check_surrogates(path, line, value)
        yield line, value


def _check_surrogates(path: Path, line: int, row: dict) -> None:
    """Refuse escapes such as \\ud83d without their second half, which no file of text can hold."""
    for name, value in row.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(error.object[error.start]):04x}"
            problem = f"{name!a} has half of a surrogate pair, {escape}"
            raise InputError(f"{path} line {line}: {problem}; write the whole character.") from None


def json_id(path: Path, line: int, name: str, value: Any) -> str:
    """Return an id of a JSON line as a string; an InputError, with file, line and field, if it is not an id."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{path} line {line}: {name} must be a string or an integer, got {json.dumps(value)}.")
    return str(value)


def read_tsv(path: Path, types: Mapping[str, pa.DataType], block_size: int = 1 << 23) -> Iterator[pa.RecordBatch]:
    """Stream the columns of a TSV file without header or quoting, in batches of `block_size` bytes.

    Raises:
        InputError: with file and line, for a wrong number of columns, a number that is not finite, bad UTF-8.
    """
    first, first_type = next(iter(types.items()))
    read_types = {**types, first: pa.string()}  # a byte order mark can only be removed from a string
    try:
        reader = pa.csv.open_csv(
            pa.input_stream(str(path), compression="detect"),
            read_options=pa.csv.ReadOptions(column_names=list(types), block_size=block_size),
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=True),
            convert_options=pa.csv.ConvertOptions(column_types=read_types, null_values=[], strings_can_be_null=False),
        )
        for batch in reader:
            batch = batch.set_column(0, first, _without_marks(batch[first], first_type))
            if not all(_is_finite(column) for column in batch.columns):
                raise pa.ArrowInvalid("a number is not finite")
            yield batch
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        _raise_with_line(path, types)
        raise InputError(f"{path} is not readable as {len(types)} tab-separated columns: {error}") from None


def _without_marks(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return strings without byte order marks at their beginnings, converted to a type."""
    if pc.any(pc.starts_with(column, BYTE_ORDER_MARK)).as_py():
        column = pc.replace_substring_regex(column, f"^{BYTE_ORDER_MARK}", "")
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        column = pc.ascii_trim_whitespace(column)  # as the reader does for numbers
    return column.cast(kind)


def _is_finite(column: pa.Array) -> bool:
    return not pa.types.is_floating(column.type) or bool(pc.all(pc.is_finite(column)).as_py())


def _raise_with_line(path: Path, types: Mapping[str, pa.DataType]) -> None:
    """Find the line that the fast reader refused, and raise an error that names it."""
    for line, text in read_lines(path):
        if not text:
            continue
        fields = text.split("\t")
        if len(fields) != len(types):
            needed = f"{len(types)} tab-separated columns ({', '.join(types)})"
            raise InputError(f"{path} line {line}: needed {needed}, got {len(fields)}: {text[:80]!r}.")
        for (name, kind), field in zip(types.items(), fields, strict=True):
            if pa.types.is_floating(kind):
                number(path, line, name, field, _float32 if kind == pa.float32() else float)


def number(path: Path, line: int, name: str, text: str, kind: Callable) -> float:
    """Return the number in a field of a line, finite and in plain ASCII digits.

    `kind` is int (of 32 bits), float, or a function of the text.
    """
    value = parse_number(text, kind)
    if np.isnan(value):
        wanted = "integer" if kind is int else "number"
        raise InputError(f"{path} line {line}: {name} must be a finite {wanted}, got {text!r}.")
    return value


def parse_number(text: str, kind: Callable = float) -> float:
    """Return the finite number that a text is, see `number`; NaN if it is not one."""
    try:
        value = kind(text)
    except ValueError:
        return float("nan")
    is_plain = text.isascii() and "_" not in text  # Python also reads 1_0 as 10
    is_too_large = kind is int and not -(2**31) <= value < 2**31
    if not is_plain or is_too_large or not np.isfinite(value):
        return float("nan")
    return value


def _float32(text: str) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(float(text)))


def nth_line(path: Path, row: int) -> int:
    """Return the line of a file that holds a row; rows are counted from 0, without blank lines."""
    rows = -1
    for line, text in read_lines(path):
        if text.strip(" "):  # a row of tabs is a row
            rows += 1
        if rows == row:
            return line
    raise IndexError(f"{path} has {rows + 1:,} rows, asked for row {row}.")


def is_plain_integer(text: str) -> bool:
    """Return whether a text is an integer of 64 bits in its plain spelling, so that an int id loses nothing."""
    return re.fullmatch(PLAIN_INTEGER, text, re.ASCII) is not None


def plain_integers(ids: pa.Array) -> np.ndarray | None:
    """Return a string array as int64 if every string is a plain integer, see `is_plain_integer`; else None."""
    if len(ids) == 0:
        return np.empty(0, dtype=np.int64)
    ids = ids.cast(pa.large_string())
    _, offsets, data = ids.buffers()
    starts = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    lengths = np.diff(starts)
    if lengths.min() == 0:
        return None
    first = np.frombuffer(data, np.uint8)[starts[:-1]]
    # Ten times as fast as the pattern, which decides on the other spellings (negative numbers are plain).
    looks_plain = (first >= ord("1")) & (first <= ord("9")) | ((first == ord("0")) & (lengths == 1))
    is_usual = looks_plain.all() and lengths.max() <= 18
    if not is_usual and not pc.all(pc.match_substring_regex(ids, f"^({PLAIN_INTEGER})$")).as_py():
        return None
    try:
        return ids.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None


def tsv_lines(columns: Sequence[pa.Array]) -> tuple[memoryview, bytes]:
    """Return tab-separated lines, one per row of the columns, in two parts, for `file.writelines`."""
    columns = [column.cast(pa.large_string()) for column in columns]
    line_break, nothing, tab = pa.array(["\n", "", "\t"], pa.large_string())
    # Each row begins with the line break that ends the one before: appending it to the last column would copy that.
    columns[0] = pc.binary_join_element_wise(line_break, columns[0], nothing)
    _, _, data = pc.binary_join_element_wise(*columns, tab).buffers()
    return memoryview(data)[1:], b"\n"


def write_arrow(path: Path, batches: Iterator[pa.RecordBatch], source: str) -> None:
    """Stream record batches into an Arrow file that `datasets.Dataset.from_file` maps; no row is an InputError."""
    batches = (batch for batch in batches if len(batch))
    first = next(batches, None)
    if first is None:
        raise InputError(f"{source} holds no rows.")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
