"""Ids to texts: byte for byte the authors' script (golden/teacher_files) where it was right, else an error."""

import bz2
import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

import hf_kd_ranking as kd
from hf_kd_ranking.data.tables import read_tsv
from hf_kd_ranking.teachers import expand

GOLDEN = Path(__file__).parents[1] / "golden" / "teacher_files" / "cases.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["id_to_text"]
INPUTS = ("collection", "query", "scores")
# These are "plain" with other line ends, and so not stored.
LINE_ENDS = {"crlf": lambda text: text.replace("\n", "\r\n"), "no_final_newline": lambda text: text[:-1]}

AS_THE_SCRIPT = [
    "plain",
    "missing_ids",
    "all_missing",
    "crlf",
    "bare_cr",
    "no_final_newline",
    "empty_text",
    "spaces",
    "line_separators",
    "same_pos_neg",
    "four_columns_stripped_id",
]
# Ids that each column lacks, of the cases whose rows are not all written.
LACKING = {
    "missing_ids": {"query_id": 2, "pos_id": 2, "neg_id": 1},
    "all_missing": {"query_id": 1, "pos_id": 1},
    "spaces": {"query_id": 1, "pos_id": 1},
    "four_columns_stripped_id": {"neg_id": 1},
}
# The script made a mark part of an id and stopped at blank lines.
READ_OVER = {
    "bom": b"1\t2\tq\tone\ttwo\n1\t2\tq\ttwo\ttwo\n",
    "blank_query_line": b"1\t2\tq\tone\tone\n",
    "blank_score_line": (
        "0.11263201629895114\t6.785808478060888\ta\\tb x gamma alpha 1,000 🤗\talpha a\\tb gamma gamma\t🤗 beta"
        ' "quoted"\n-7.866957377979203\t-1.40642985458567\talpha alpha &amp; &amp; naïve beta\t🤗 beta "quoted"\t'
        "&amp; naïve naïve naïve alpha x naïve a\\tb\n"
    ).encode(),
}
LAYOUT = "tab-separated columns (pos_score, neg_score, query_id, pos_id, neg_id)"
# The script skipped, cut or stopped, and left half a file.
REFUSED = {
    "extra_tabs": "collection.tsv line 1: needed 2 tab-separated columns (id, text), got 4",
    "duplicate_ids": "collection.tsv: id '5000' appears twice with different texts, in rows 1 and 3",
    "score_formats": "scores.tsv line 2: pos_score must be a finite number, got 'nan'",
    "empty_scores": "scores.tsv is empty",
    "empty_collection": "collection.tsv is empty",
    "four_columns_inside": f"scores.tsv line 2: needed 5 {LAYOUT}, got 4",
    "four_columns_last": f"scores.tsv line 2: needed 5 {LAYOUT}, got 4",
    "three_columns": f"scores.tsv line 2: needed 5 {LAYOUT}, got 3",
    "two_columns": f"scores.tsv line 2: needed 5 {LAYOUT}, got 2",
    "unknown_query_short_line": f"scores.tsv line 2: needed 5 {LAYOUT}, got 4",
    "collection_line_without_tab": "collection.tsv line 2: needed 2 tab-separated columns (id, text), got 1",
    "bad_utf8": "scores.tsv line 2: byte 0xff at column 1 is not UTF-8",
}


def write_case(name: str, folder: Path) -> Path:
    """Write the three inputs; what a case lacks is that of "plain"."""
    for file in INPUTS:
        text = LINE_ENDS.get(name, str)((CASES["plain"] | CASES[name])[file])
        (folder / f"{file}.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder


def expected(name: str) -> bytes:
    return (CASES["plain"] | CASES[name])["expected_out"].encode()


def run(folder: Path, output: str = "out.tsv", **options) -> dict[str, int]:
    stores = kd.TextStore.from_file(folder / "collection.tsv"), kd.TextStore.from_file(folder / "query.tsv")
    return kd.expand_ids(folder / "scores.tsv", *stores, folder / output, **options)


def small(folder: Path, scores: str | bytes, texts: dict[str, str] | None = None) -> Path:
    """Documents `one` (1) and `two` (2), or others, and query `q` (7)."""
    texts = texts or {"1": "one", "2": "two"}
    lines = [json.dumps({"_id": i, "text": text}) + "\n" for i, text in texts.items()]
    (folder / "collection.jsonl").write_text("".join(lines))
    (folder / "query.tsv").write_text("7\tq\n")
    (folder / "scores.tsv").write_bytes(scores if isinstance(scores, bytes) else scores.encode())
    return folder


def run_small(folder: Path, output: str = "out.tsv", **options) -> bytes:
    stores = kd.TextStore.from_file(folder / "collection.jsonl"), kd.TextStore.from_file(folder / "query.tsv")
    kd.expand_ids(folder / "scores.tsv", *stores, folder / output, **options)
    return (folder / output).read_bytes()


# ---- The authors' cases ---------------------------------------------------------------------------------------------


def test_every_golden_case_is_tested():
    assert sorted(CASES) == sorted([*AS_THE_SCRIPT, *READ_OVER, *REFUSED])


@pytest.mark.parametrize("name", AS_THE_SCRIPT)
def test_output_and_counts_equal_the_script(tmp_path, name):
    counts = run(write_case(name, tmp_path), on_missing="skip")
    assert (tmp_path / "out.tsv").read_bytes() == expected(name)
    printed = dict(line.split("\t") for line in (CASES["plain"] | CASES[name])["stdout"].splitlines())
    assert counts.pop("rows") == int(printed.get("success", 0))
    assert counts.pop("skipped") == int(printed.get("key_error", 0))
    assert counts == LACKING.get(name, {})


@pytest.mark.parametrize("name", AS_THE_SCRIPT)
def test_ids_without_a_text_are_an_error_or_skipped(tmp_path, name):
    folder = write_case(name, tmp_path)
    if name not in LACKING:
        assert run(folder)["skipped"] == 0
        return
    with pytest.raises(KeyError, match=r"scores\.tsv line \d+: (query|pos|neg)_id '.*' is not among the"):
        run(folder)
    assert not (folder / "out.tsv").exists()


@pytest.mark.parametrize("name", READ_OVER)
def test_byte_order_mark_and_blank_lines_are_ignored(tmp_path, name):
    counts = run(write_case(name, tmp_path))
    assert (tmp_path / "out.tsv").read_bytes() == READ_OVER[name]
    assert counts == {"rows": READ_OVER[name].count(b"\n"), "skipped": 0}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_script_mishandled_is_refused(tmp_path, name):
    folder = write_case(name, tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/{REFUSED[name]}")):
        run(folder, on_missing="skip")
    assert {path.name for path in folder.iterdir()} - {"cache"} == {f"{file}.tsv" for file in INPUTS}


# ---- Other forms of the inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zst", "lz4"])
def test_compressed_scores_give_the_same_bytes(tmp_path, suffix):
    folder = write_case("missing_ids", tmp_path)
    data, path = (folder / "scores.tsv").read_bytes(), folder / f"scores.tsv.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(data))
    elif suffix == "bz2":
        path.write_bytes(bz2.compress(data))
    else:
        with pa.output_stream(str(path), compression={"zst": "zstd", "lz4": "lz4"}[suffix]) as file:
            file.write(data)
    stores = kd.TextStore.from_file(folder / "collection.tsv"), kd.TextStore.from_file(folder / "query.tsv")
    counts = kd.expand_ids(path, *stores, folder / "out.tsv", on_missing="skip")
    assert (folder / "out.tsv").read_bytes() == expected("missing_ids")
    assert counts["skipped"] == 4
    with pytest.raises(KeyError, match=re.escape(f"{path} line 2: query_id '")):  # the line is found in there too
        kd.expand_ids(path, *stores, folder / "other.tsv")


def test_texts_from_json_lines_give_the_same_bytes(tmp_path):
    folder = write_case("plain", tmp_path)
    stores = []
    for name in ("collection", "query"):
        lines = [line.split("\t") for line in (folder / f"{name}.tsv").read_text().splitlines()]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in lines))
        stores.append(kd.TextStore.from_file(path))
    kd.expand_ids(folder / "scores.tsv", *stores, folder / "out.tsv")
    assert (folder / "out.tsv").read_bytes() == expected("plain")


def test_small_blocks_give_the_same_bytes_and_lines(tmp_path, monkeypatch):
    folder = write_case("plain", tmp_path)
    lines = (folder / "scores.tsv").read_text().splitlines()
    (folder / "scores.tsv").write_text("".join(f"{line}\n" for line in lines * 5) + "1\t2\t1000\t5000\t404\n")
    run(folder, "one.tsv", on_missing="skip")
    monkeypatch.setattr(expand, "BLOCK_BYTES", 300)
    read = []
    monkeypatch.setattr(expand, "read_tsv", lambda *args: read.append(args) or read_tsv(*args))
    counts = run(folder, "many.tsv", on_missing="skip")
    assert read[0][2] == 300
    assert (folder / "many.tsv").read_bytes() == (folder / "one.tsv").read_bytes() == expected("plain") * 5
    assert counts == {"rows": 200, "skipped": 1, "neg_id": 1}
    with pytest.raises(KeyError, match=r"scores\.tsv line 201: neg_id '404' is not among the 30 texts of"):
        run(folder, "other.tsv")


@pytest.mark.parametrize("ids", [("d/ü", "文書-1"), ("007", "7"), ("a b", " a"), ("-5", "123456789012345678")])
def test_ids_are_compared_as_they_are_written(tmp_path, ids):
    first, second = ids
    small(tmp_path, f"1\t2\t7\t{first}\t{second}\n3\t4\t7\t{second}\t{first} \n", {first: "one", second: "two"})
    assert run_small(tmp_path) == b"1\t2\tq\tone\ttwo\n3\t4\tq\ttwo\tone\n"


def test_a_score_that_only_python_reads_is_refused(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n1\t1_0\t7\t1\t2\n")
    with pytest.raises(ValueError, match="line 2: neg_score must be a finite number, got '1_0'"):
        run_small(tmp_path)


def test_scores_keep_their_spelling(tmp_path):
    spelled = ["-0", "+1.50", "1e-3", "1E5", ".5", "5.", " 3 ", "0.1000000000000000055511151231257827"]
    small(tmp_path, "".join(f"{score}\t{score}\t7\t1\t2\n" for score in spelled))
    assert [line.split("\t")[:2] for line in run_small(tmp_path).decode().splitlines()] == [[s, s] for s in spelled]


# ---- Texts that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\tb", "a\nb", "a\r\nb", "\ta"])
def test_text_with_a_tab_or_a_line_break_is_refused(tmp_path, text):
    small(tmp_path, "1\t2\t7\t1\t1\n1\t2\t7\t1\t2\n", {"1": "one", "2": text})
    with pytest.raises(ValueError, match=r"collection\.jsonl: the text of id '2' holds a tab or a line break"):
        run_small(tmp_path)
    assert not (tmp_path / "out.tsv").exists()


def test_tab_or_line_break_at_the_end_is_removed(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n", {"1": "one\t\n", "2": "t\u00a0wo\u3000\x1c\n"})
    assert run_small(tmp_path) == b"1\t2\tq\tone\tt\xc2\xa0wo\n"


@pytest.mark.parametrize("blank", [" ", "\x1f", "\u00a0", "\u3000", "\u2028", "\x85"])
def test_blanks_are_removed_only_at_the_end(tmp_path, blank):
    small(tmp_path, "1\t2\t7\t1\t2\n", {"1": f"one{blank}", "2": f"{blank}t{blank}wo"})
    assert run_small(tmp_path) == f"1\t2\tq\tone\t{blank}t{blank}wo\n".encode()


def test_empty_texts_are_empty_fields(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n", {"1": "", "2": ""})
    assert run_small(tmp_path) == b"1\t2\tq\t\t\n"


def test_trailing_blanks_are_those_of_python(tmp_path):
    assert "".join(chr(i) for i in range(0x110000) if not chr(i).strip()) == expand.BLANKS


# ---- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["", "abc", "1,5", "nan", "-inf", "1e400", "0x10", "1 2"])
@pytest.mark.parametrize("column", [0, 1])
def test_score_that_is_not_finite_is_named_by_line(tmp_path, score, column):
    fields = ["1", "2", "7", "1", "2"]
    fields[column] = score
    small(tmp_path, "\n1\t2\t7\t1\t2\n\n" + "\t".join(fields) + "\n")
    name = ("pos_score", "neg_score")[column]
    with pytest.raises(
        ValueError, match=re.escape(f"scores.tsv line 4: {name} must be a finite number, got {score!r}")
    ):
        run_small(tmp_path)
    assert not (tmp_path / "out.tsv").exists()


def test_first_row_with_a_missing_id_is_named(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n1\t2\t7\t1\t9\n1\t2\t8\t1\t2\n")
    with pytest.raises(KeyError) as error:
        run_small(tmp_path)
    assert error.value.args[0].startswith(
        f"{tmp_path}/scores.tsv line 2: neg_id '9' is not among the 2 texts of {tmp_path}/collection.jsonl; "
    )


def test_existing_output_needs_overwrite(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n")
    (tmp_path / "out.tsv").write_text("old")
    with pytest.raises(FileExistsError, match=re.escape(f"{tmp_path / 'out.tsv'} exists; give another output, or")):
        run_small(tmp_path)
    assert (tmp_path / "out.tsv").read_text() == "old"
    assert run_small(tmp_path, overwrite=True) == b"1\t2\tq\tone\ttwo\n"


def test_failed_overwrite_keeps_the_old_output(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n1\t2\t7\t1\t9\n")
    (tmp_path / "out.tsv").write_text("old")
    with pytest.raises(KeyError, match="line 2"):
        run_small(tmp_path, overwrite=True)
    assert (tmp_path / "out.tsv").read_text() == "old"
    assert not list(tmp_path.glob("out.tsv.*"))


def test_missing_output_folder_and_scores_are_refused(tmp_path):
    small(tmp_path, "1\t2\t7\t1\t2\n")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'no'}, the folder of the output out.tsv")):
        run_small(tmp_path, "no/out.tsv")
    (tmp_path / "scores.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'scores.tsv'} does not exist")):
        run_small(tmp_path)


def test_an_interruption_between_blocks_leaves_nothing(tmp_path, monkeypatch):
    small(tmp_path, "1\t2\t7\t1\t2\n" * 50)
    monkeypatch.setattr(expand, "BLOCK_BYTES", 64)

    def read(*args):
        for number, batch in enumerate(read_tsv(*args)):
            if number == expand.THREADS + 2:  # one block is written by then
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(expand, "read_tsv", read)
        run_small(tmp_path)
    assert not list(tmp_path.glob("out.tsv*"))
    assert run_small(tmp_path) == b"1\t2\tq\tone\ttwo\n" * 50
