"""Commands and Python of README, guides and skills run on toy data; options of all pages and option files exist."""

import re
import shlex
import shutil
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import typer
import uvicorn
from endpoint_server import Server, good_answer

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".agents").rglob("*.md")),
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
JOBS = sorted((ROOT / "examples").glob("reproduce_*.yaml"))
EXECUTED = [page for page in PAGES if page.parent.name not in (".github", "recipes", "examples")]
STEP = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)
# Options that make a verb small, and take the place of those that a page gives.
SMALL = {
    "distill": "--architectures bert_dot --conditions teacher --learning-rates 1e-3 --train-queries 16 --k 20 "
    "--depths 20 --budget-ms 100000 --force --seeds 1 --epochs 1 --overrides {} --no-bf16",
    "train": "--max-steps 2 --eval-steps 1 --save-steps 1 --batch-size 8 --dtype fp32 --use-cpu",
    "benchmark": "--rounds 1 --warm-up 1",
    "serve": "--port 0",
    "push": "--dry-run",
    "teacher queries": "--round-trip 0",
}
# What a page addresses on a network -> what is there in the tests.
LOCAL = {
    "http://localhost:8080": "{teacher}",
    "http://localhost:8000": "{teacher}",
    "http://127.0.0.1:8000": "{served}",
    'url="http://qdrant:6333", parallel=8': 'path="qdrant"',
    'snapshot_download("me/best")': '"best"',
}
# The beginning of a command -> why it is not run.
SKIPPED = {
    "make": "it runs the tests",
    "pip": "network",
    "docker": "docker",
    "hf upload": "network",
    "hf-kd-ranking teacher push": "network; tests/teachers",
    "hf-kd-ranking demo": "minutes; tests/demo runs it on a small package",
    "python examples/prepare_small.py": "minutes; test_preparation.py",
    "accelerate launch --num_processes 4 -m hf_kd_ranking distill": "several machines",
}
# A part of a block of Python -> why the block is not run.
SKIPPED_PYTHON = {"mteb.get_tasks": "network; tests/integrations/test_mteb.py"}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def read_steps(text: str) -> Iterator[list[str] | str]:
    """Yield commands, split into words, and blocks of Python, in their order."""
    for language, block in STEP.findall(text):
        if language == "python":
            yield textwrap.dedent(block)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


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
        for words in read_steps(page.read_text(encoding="utf-8")):
            if isinstance(words, list) and find_verb(words):
                cases.append(pytest.param(find_verb(words), id=f"{page.name}: {' '.join(words)[:60]}"))
    return cases


@pytest.mark.parametrize("words", collect())
def test_command_of_a_page_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)  # for --config
    parse(words)


def test_command_with_an_unknown_option_is_refused():
    with pytest.raises(Exception, match="--no-such-option"):
        parse(["evaluate", "--run", "a.trec", "--no-such-option", "1"])


@pytest.fixture
def teacher() -> Iterator[str]:
    """Address of an endpoint that scores texts, and writes queries for them."""

    def answer(path: str, body: dict) -> object:
        prompt = body.get("messages", [{"content": ""}])[0]["content"]
        if path != "/v1/chat/completions" or "Query: " in prompt:
            return good_answer(path, body)
        words = prompt.split("Document: ")[-1].split()[:3]
        return {"choices": [{"message": {"content": " ".join(words)}}], "usage": {"total_tokens": 5}}

    server = Server()
    server.answer = answer
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://{server.address}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def served(monkeypatch) -> Iterator[Callable[[], str]]:
    """served(): address of the last `serve`, which answers until the next one begins."""
    running, serve = [], uvicorn.Server.run

    def stop() -> None:
        while running:
            server, thread, _ = running.pop()
            server.should_exit = True
            thread.join(60)

    def start(server: uvicorn.Server, sockets: list) -> None:
        stop()
        thread = threading.Thread(target=serve, args=(server, sockets))
        thread.start()
        address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        running.append((server, thread, address))
        with suppress(httpx.TransportError):  # a model that cannot be loaded ends the server, and then the verb
            while httpx.get(f"{address}/health", timeout=60).status_code == 503:
                pass

    monkeypatch.setattr(uvicorn.Server, "run", start)
    yield lambda: running[-1][-1]
    stop()


class Page:
    """The steps of a page, in the folder of workplace.py; Python has one namespace."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, teacher: str, served: Callable[[], str]) -> None:
        self.monkeypatch = monkeypatch
        self.teacher = teacher
        self.served = served
        self.names = {}

    def run(self, step: list[str] | str) -> None:
        """Run a command or a block of Python."""
        if isinstance(step, str):
            if not any(part in step for part in SKIPPED_PYTHON):
                exec(self.localize(step), self.names)
        elif not any(" ".join([*step, ""]).startswith(f"{part} ") for part in SKIPPED):
            self.run_command([self.localize(word) for word in step])

    def localize(self, text: str) -> str:
        """Replace addresses of the network."""
        for remote, local in LOCAL.items():
            if remote in text:
                address = self.served() if "{served}" in local else ""
                text = text.replace(remote, local.format(teacher=self.teacher, served=address))
        return text

    def run_command(self, words: list[str]) -> None:
        if words[0] == "export":
            self.monkeypatch.setenv(*words[1].split("=", 1))
        elif find_verb(words):
            self.run_verb(find_verb(words))
        elif words[0] == "curl":
            subprocess.run([*words, "--fail-with-body"], check=True)
        else:  # mkdir, cp
            subprocess.run(words, check=True)

    def run_verb(self, words: list[str]) -> None:
        from hf_kd_ranking.cli import main

        self.monkeypatch.setattr("sys.argv", ["hf-kd-ranking", *make_small(words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert not exit_.value.code, " ".join(words)


def make_small(words: list[str]) -> list[str]:
    """Return a command with the options of `SMALL`."""
    options = SMALL.get(words[0], SMALL.get(" ".join(words[:2]), ""))
    for name in re.findall(r"--\S+", options):
        if name in words:
            place = words.index(name)
            del words[place]
            while place < len(words) and not words[place].startswith("--"):
                del words[place]
    return [*words, *options.split()]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda page: page.name)
def test_page_runs_from_top_to_bottom(path, workplace, monkeypatch, teacher, served):
    steps = list(read_steps(path.read_text(encoding="utf-8")))
    for step in steps:  # a page begins without what it makes
        if "--output" in step and "--plan-only" not in step:
            output = workplace / step[step.index("--output") + 1]
            if output.is_dir():
                shutil.rmtree(output)
            output.unlink(missing_ok=True)
    page = Page(monkeypatch, teacher, served)
    for step in steps:
        page.run(step)


@pytest.mark.parametrize("part", [*SKIPPED, *SKIPPED_PYTHON])
def test_every_exception_is_on_a_page(part):
    assert any(part in path.read_text(encoding="utf-8") for path in EXECUTED)


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
