"""What every verb promises: an example in its help that runs, JSON, one line for bad input, and a safe second run."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import uvicorn

from hf_kd_ranking.cli import app

TREE = typer.main.get_command(app)
VERBS = {name: command for name, command in TREE.commands.items() if name != "teacher"}
VERBS |= {f"teacher {name}": command for name, command in TREE.commands["teacher"].commands.items()}

RESUMES, REFUSES, REPEATS = "resumes", "refuses", "repeats"  # what a second run of the same command does
# Verb -> options that make its example small, and what a second run does.
TABLE = {
    "distill": (
        "--architectures bert_dot --conditions teacher --learning-rates 1e-3 --train-queries 16 --k 20 --depths 20 "
        "--force",
        RESUMES,
    ),
    "demo": ("", RESUMES),
    "passages": ("", RESUMES),
    "index": ("", RESUMES),
    "search": ("", REFUSES),
    "fuse": ("", REFUSES),
    "rerank": ("", REFUSES),
    "evaluate": ("", REPEATS),
    "compare": ("", REPEATS),
    "benchmark": ("--rounds 1 --warm-up 0", REFUSES),
    "report": ("", REFUSES),
    "serve": ("", REPEATS),
    "export": ("", REFUSES),
    "push": ("", REPEATS),
    "train": ("--max-steps 1 --dtype fp32 --use-cpu", REFUSES),
    "teacher score": ("", REFUSES),
    "teacher ensemble": ("", REFUSES),
    "teacher expand": ("", REFUSES),
    "teacher diagnose": ("", REPEATS),
    "teacher triples": ("", REFUSES),
    "teacher queries": ("", REFUSES),
    "teacher push": ("", REPEATS),
}
EARLIER = {"search": "index"}  # the verb whose output a verb reads
WITHOUT_INPUT = {"demo": "--output collection.tsv"}  # bad input of the verbs that read no file


@pytest.fixture
def run(workplace, monkeypatch, capsys) -> Callable[[list[str]], tuple[int, list[str], list[str]]]:
    """run(words): exit status, lines of standard output, lines of errors; without the Hub, minutes, or a server."""
    from hf_kd_ranking.cli import main, teacher

    monkeypatch.setattr(teacher, "upload", lambda *_: "https://hub/commit")
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: None)
    monkeypatch.setattr("hf_kd_ranking.demo.experiment.run_demo", small_demo)

    def call(words: list[str]) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *words])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return exit_.value.code or 0, printed.out.splitlines(), printed.err.splitlines()

    return call


def small_demo(output: Path, *_: object) -> dict[str, str]:
    """Make the folder, as the demo does before the minutes that tests/demo covers."""
    output.mkdir(exist_ok=True)
    return {"folder": str(output / "best")}


def example(run: Callable, verb: str) -> list[str]:
    """Return the words of the example in a verb's help."""
    status, lines, _ = run([*verb.split(), "--help"])
    assert status == 0
    found = re.search(r"Example: hf-kd-ranking (.*?) *(?:Arguments|Options):", " ".join(lines))
    assert found, f"the help of {verb} has no example"
    words = shlex.split(found.group(1))
    assert words[: len(verb.split())] == verb.split()
    return words


def test_table_has_every_verb():
    assert sorted(TABLE) == sorted(VERBS)


@pytest.mark.parametrize("verb", TABLE)
def test_verb_keeps_its_promises(run, workplace, verb):
    options, second = TABLE[verb]
    words = [*example(run, verb), *options.split(), "--json"]
    if verb in EARLIER:
        assert run(example(run, EARLIER[verb]))[0] == 0
    check_bad_input(run, verb, words)
    status, printed, errors = run(words)
    assert status == 0, errors
    assert isinstance(json.loads(printed[-1]), dict)
    before, times = read_output(words), read_times(words)
    status, again, errors = run(words)
    if second == REFUSES:
        assert (status, read_output(words) == before) == (2, True)
        assert re.match("error: .*( exists; | is not empty; )give another", errors[-1]), errors
        assert run([*words, "--overwrite"])[0] == 0
    else:
        assert status == 0, errors
        assert json.loads(again[-1]).keys() == json.loads(printed[-1]).keys()
    if second == RESUMES:
        assert read_times(words) == times, "a finished job makes nothing again"


def read_output(words: list[str]) -> dict[str, bytes]:
    """Return the content of the output that a command names, by path."""
    if "--output" not in words:
        return {}
    output = Path(words[words.index("--output") + 1])
    paths = [output, *output.rglob("*")]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def read_times(words: list[str]) -> dict[str, int]:
    """Return when each file of the output was written, by path, but for what `distill` delivers from its steps."""
    delivered = {"best", "report.html"}
    return {
        path: Path(path).stat().st_mtime_ns for path in read_output(words) if delivered.isdisjoint(Path(path).parts)
    }


def check_bad_input(run: Callable, verb: str, words: list[str]) -> None:
    """Name a file that does not exist in place of the first one that does."""
    wrong = [*words, *WITHOUT_INPUT.get(verb, "").split()]
    if verb not in WITHOUT_INPUT:
        place = next(place for place, word in enumerate(words) if Path(word).exists() and place >= len(verb.split()))
        wrong[place] = "./folder/none.tsv"
    status, _, errors = run(wrong)
    assert (status, [line.startswith("error: ") for line in errors].count(True)) == (2, 1), errors
    assert errors[-1].startswith("error: ") and "Traceback" not in " ".join(errors)
