"""Every command of README, guides and option files has options that its verb has."""

import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".agents").rglob("*.md")),
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
JOBS = sorted((ROOT / "examples").glob("reproduce_*.yaml"))
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def read_commands(text: str) -> list[list[str]]:
    """Return the commands of the ```bash blocks, split into words."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


def find_verb(words: list[str]) -> list[str] | None:
    """Return verb and options of a command of this package; None for another program."""
    if words[0] == "hf-kd-ranking":
        return words[1:]
    if "hf_kd_ranking" in words:  # accelerate launch -m hf_kd_ranking VERB
        return words[words.index("hf_kd_ranking") + 1 :]
    if "examples/train.py" in words:
        return ["train", *words[words.index("examples/train.py") + 1 :]]
    return None


def parse(words: list[str]) -> typer.Context:
    """Parse a verb's options without running it."""
    from hf_kd_ranking.cli import app  # imports every verb

    command, words = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return command.make_context(command.name, words)


def collect() -> list:
    cases = []
    for page in PAGES:
        for words in read_commands(page.read_text(encoding="utf-8")):
            if find_verb(words):
                cases.append(pytest.param(find_verb(words), id=f"{page.name}: {' '.join(words)[:60]}"))
    return cases


@pytest.mark.parametrize("words", collect())
def test_command_of_a_page_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # for --config
    parse(words)


def test_command_with_an_unknown_option_is_refused():
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["evaluate", "--run", "a.trec", "--no-such-option", "1"])


@pytest.mark.parametrize("path", [*RECIPES, *JOBS], ids=lambda path: path.name)
def test_option_file_parses(path):
    context = parse(["train" if path in RECIPES else "distill", "--config", str(path)])
    assert context.params["collection"].endswith("collection.tsv")
    assert context.params["model_name"] and context.params["teacher_scores" if path in RECIPES else "architectures"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_exist(page):
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert [link for link in missing if not link.endswith("demo.svg")] == []  # the picture is made from a report


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250
