"""The cost and the effects of `import hf_kd_ranking`, and its public names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import hf_kd_ranking as kd

MAX_PUBLIC_NAMES = 55
MAX_IMPORT_SECONDS = 0.5
# Each is imported where it is used. evaluate alone costs 3.6 s, scipy.stats 0.6 s.
HEAVY_MODULES = {
    "evaluate",
    "datasets",
    "scipy.stats",
    "bm25s",
    "faiss",
    "ir_measures",
    "matplotlib",
    "mteb",
    "pandas",
    "pyarrow",
    "pytrec_eval",
    "qdrant_client",
    "sentence_transformers",
    "sklearn",
    "transformers.trainer",
    "typer",
}
EAGER_LAYERS = {"hf_kd_ranking", "hf_kd_ranking.models"}

# AutoModel is a lazy stub without the base classes (2 s on two cores): the first from_pretrained loads them anyway, so
# they are no cost of ours.
PROBE = """
import json, logging, sys, time
from transformers import AutoModel, Pipeline, PreTrainedModel

def root_logging():
    root = logging.getLogger()
    return [root.level, len(root.handlers), len(root.filters), root.disabled, logging.root.manager.disable]

socket_events = []
sys.addaudithook(lambda event, args: socket_events.append(event) if event.startswith("socket.") else None)
logging_before, modules_before = root_logging(), set(sys.modules)
for stream in (sys.stdout, sys.stderr):
    print("MARK", file=stream, flush=True)
start = time.process_time()
import hf_kd_ranking
seconds = time.process_time() - start
found = {
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - modules_before),
    "socket_events": socket_events,
    "logging": [logging_before, root_logging()],
    "dir": dir(hf_kd_ranking),
}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def run_probe(folder: Path) -> SimpleNamespace:
    # Without the offline switches, which would hide an attempt to reach the Hub.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder / "probe.json")],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed = [stream.partition("MARK\n")[2] for stream in (result.stdout, result.stderr)]
    return SimpleNamespace(printed=printed, **json.loads((folder / "probe.json").read_text()))


@pytest.fixture(scope="module")
def fresh_import(tmp_path_factory) -> SimpleNamespace:
    return run_probe(tmp_path_factory.mktemp("probe"))


def test_import_loads_no_heavy_module(fresh_import):
    prefixes = {".".join(name.split(".")[:depth]) for name in fresh_import.modules for depth in (1, 2)}
    assert prefixes & HEAVY_MODULES == set()


def test_import_loads_models_and_no_other_layer(fresh_import):
    layers = {".".join(name.split(".")[:2]) for name in fresh_import.modules if name.startswith("hf_kd_ranking")}
    assert layers == EAGER_LAYERS


def test_import_adds_little_time_to_importing_transformers(fresh_import, tmp_path):
    seconds = fresh_import.seconds
    for _ in range(2):  # the first run may have compiled our files
        if seconds < MAX_IMPORT_SECONDS:
            break
        seconds = min(seconds, run_probe(tmp_path).seconds)
    assert seconds < MAX_IMPORT_SECONDS


def test_import_is_silent_and_leaves_logging_alone(fresh_import):
    assert fresh_import.printed == ["", ""]
    logging_before, logging_after = fresh_import.logging
    assert logging_after == logging_before


def test_import_opens_no_socket(fresh_import):
    assert fresh_import.socket_events == []


def test_dir_fits_a_screen_and_lists_every_public_name(fresh_import):
    public_names = [name for name in fresh_import.dir if not name.startswith("_")]
    assert len(public_names) <= MAX_PUBLIC_NAMES
    assert set(kd.__all__) <= set(fresh_import.dir)


@pytest.mark.parametrize("name", sorted(kd.__all__))
def test_public_name_resolves_and_has_its_own_docstring(name):
    docstring = getattr(kd, name).__doc__  # not inspect.getdoc: it would answer with a parent's
    assert docstring and docstring.strip()
    assert not re.match(rf"{name}\(", docstring), "a dataclass's generated signature is no docstring"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchRanker"):
        _ = kd.NoSuchRanker


def test_version_is_a_literal_that_setuptools_reads_without_importing():
    source = Path(kd.__file__).read_text(encoding="utf-8")
    assert re.search(rf'^__version__ = "{re.escape(kd.__version__)}"$', source, flags=re.MULTILINE)
