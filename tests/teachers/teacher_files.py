"""Two files of teacher rows that share some rows and pairs."""

from pathlib import Path

# Margins 5, -1, 0, 6 and 5 again; pairs (1,10) (1,11) (1,12) (2,20) (2,21) (2,22).
FIRST = [(9, 4, 1, 10, 11), (2, 3, 1, 10, 12), (5, 5, 2, 20, 21), (7, 1, 2, 20, 22), (9, 4, 1, 10, 11)]
# Another order; the row (1, 10, 99) is new; margins -2, 1, -4, 3.
SECOND = [(1, 3, 1, 10, 12), (4, 3, 2, 20, 21), (0, 4, 1, 10, 99), (8, 5, 2, 20, 22)]


def write_rows(path: Path, rows: list[tuple]) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path
