"""Who may import whom inside hf_kd_ranking, read from the source: nothing is imported here, no module is exempt.

A layer is the first name below the package (`models`, `losses`, ...). Imports inside functions, under TYPE_CHECKING
and through `import_module` count.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_kd_ranking"

ANYTHING = None
# Layer -> the layers that it may import besides itself and `errors`.
MAY_IMPORT = {
    "models": (),
    "errors": ("models",),
    "losses": (),
    "processes": (),
    "artifacts": ("processes",),
    "data": ("artifacts",),
    "batches": ("models",),
    "inference": ("models", "data", "processes", "batches"),
    "ranker": ("models", "data", "processes", "inference"),
    "teachers": ("models", "data", "processes", "inference", "ranker", "artifacts"),
    "retrieval": ("models", "data", "processes", "inference", "ranker", "artifacts"),
    "interop": ("models", "data", "processes", "inference", "ranker", "artifacts"),
    "evaluation": ("models", "data", "processes", "inference", "ranker", "artifacts", "retrieval"),
    "hub": ("models", "data", "ranker", "artifacts"),
    "training": ("models", "losses", "data", "processes", "inference", "ranker", "evaluation", "hub", "artifacts"),
    "searcher": ("ranker", "data", "retrieval", "interop", "artifacts"),
    "reporting": ("models", "data", "inference", "ranker", "evaluation", "retrieval", "searcher", "artifacts"),
    "serving": ("models", "data", "inference", "ranker", "evaluation", "retrieval", "searcher", "artifacts"),
    "integrations": ("data", "inference", "ranker", "retrieval", "searcher"),
    "distillation": ANYTHING,
    "cli": ANYTHING,
    "demo": ANYTHING,
    "__main__": ("cli",),  # python -m hf_kd_ranking
    "__init__": ("models",),  # lazy_loader imports the other public names
}
# save_pretrained copies the files of `models` beside the weights, where they must run without this package.
# yaml and safetensors come with the others.
MODELS_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", "safetensors", "yaml", *sys.stdlib_module_names}
CATCH_ALL_NAMES = {"util", "utils", "common", "helper", "helpers"}


class When(Enum):
    """When an import statement is executed."""

    IMPORT = "while its module is imported"
    TYPES = "under TYPE_CHECKING"
    CALL = "when a function is called"


@dataclass(frozen=True)
class Module:
    """One source file. `parts` are its names below the package, () for the package's own `__init__.py`."""

    path: Path
    parts: tuple[str, ...]

    @property
    def layer(self) -> str:
        return layer_of(self.parts)

    @property
    def package(self) -> tuple[str, ...]:
        return self.parts if self.path.name == "__init__.py" else self.parts[:-1]


@dataclass(frozen=True)
class Import:
    """One imported name. `target` are the parts of a module of ours, or None where the import leaves the package."""

    module: Module
    line: int
    source: str  # as written: "torch.nn", ".scoring", ".."
    target: tuple[str, ...] | None
    when: When

    def __str__(self) -> str:
        return f"{self.module.path}:{self.line}"


def layer_of(parts: tuple[str, ...]) -> str:
    if not parts:
        return "__init__"
    return parts[0]


def read_modules(package: Path) -> dict[tuple[str, ...], Module]:
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        modules[parts] = Module(path, parts)
    return modules


def read_imports(package: Path) -> list[Import]:
    modules = read_modules(package)
    return [
        Import(module, line, source, resolve(source, name, module, package.name, modules), when)
        for module in modules.values()
        for line, source, name, when in imported_names(ast.parse(module.path.read_text(encoding="utf-8")))
    ]


def imported_names(node: ast.AST, when: When = When.IMPORT) -> Iterator[tuple[int, str, str, When]]:
    """Yield (line, source module as written, imported name or "", when) for everything imported below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, "", when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            yield from ((child.lineno, source, alias.name, when) for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
            is_literal = child.args and isinstance(child.args[0], ast.Constant)
            yield child.lineno, child.args[0].value if is_literal else "", "", when
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imported_names(child, When.CALL)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from imported_names(ast.Module(child.body), When.TYPES)
            yield from imported_names(ast.Module(child.orelse), when)
        else:
            yield from imported_names(child, when)


def resolve(source: str, name: str, module: Module, root: str, modules: dict) -> tuple[str, ...] | None:
    names = tuple(source.lstrip(".").split(".")) if source.lstrip(".") else ()
    level = len(source) - len(source.lstrip("."))
    if level:
        package = module.package
        target = package[: max(len(package) - level + 1, 0)] + names
    elif names[:1] == (root,):
        target = names[1:]
    else:
        return None
    return (*target, name) if (*target, name) in modules else target


def is_allowed(item: Import) -> bool:
    layer, target = item.module.layer, layer_of(item.target)
    allowed = MAY_IMPORT.get(layer, ())
    if allowed is ANYTHING:
        return True
    return any(target == name or target.startswith(f"{name}.") for name in (layer, "errors", *allowed))


def table_violations(package: Path) -> list[str]:
    unknown = [
        f"{module.path}:1: layer {module.layer} is not in the import table"
        for module in read_modules(package).values()
        if module.layer not in MAY_IMPORT
    ]
    return unknown + [
        f"{item}: {item.module.layer} may not import {layer_of(item.target)} "
        f"({'.'.join((package.name, *item.target))}, {item.when.value})"
        for item in read_imports(package)
        if item.target is not None and not is_allowed(item)
    ]


def hidden_import_violations(package: Path) -> list[str]:
    return [
        f"{item}: a module name computed at run time cannot be checked; import it by name"
        for item in read_imports(package)
        if not item.source and MAY_IMPORT.get(item.module.layer) is not ANYTHING
    ]


def models_violations(package: Path) -> list[str]:
    nested = [
        f"{module.path}:1: models/ is flat, move the file up"
        for module in read_modules(package).values()
        if module.layer == "models" and len(module.parts) > 2
    ]
    # Only `from .sibling import name` is found by transformers when it collects the files to ship.
    return nested + [
        f"{item}: models/ ships as remote code, so it imports torch, transformers, huggingface_hub, the standard "
        f"library and `from .sibling import name`, not {item.source}"
        for item in read_imports(package)
        if item.module.layer == "models" and not is_shippable(item.source)
    ]


def is_shippable(source: str) -> bool:
    if source.startswith("."):
        return source[1:].isidentifier()
    return source.split(".")[0] in MODELS_MAY_IMPORT


def cycle_violations(package: Path) -> list[str]:
    edges = {
        (item.module.parts, item.target): item
        for item in read_imports(package)
        if item.target is not None and item.when is not When.CALL
    }
    graph = {}
    for importer, target in edges:
        graph.setdefault(importer, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1][::-1]  # importer before imported
        steps = [str(edges[pair]) for pair in pairwise(cycle)]
        return [f"{steps[0]}: import cycle {' -> '.join('.'.join(parts) for parts in cycle)}, by {', '.join(steps)}"]
    return []


def file_violations(package: Path) -> list[str]:
    catch_all = [
        f"{path}:1: name the file or folder after what it does"
        for path in sorted(package.rglob("*"))
        if path.stem.strip("_") in CATCH_ALL_NAMES
    ]
    folders = {path.parent for path in package.rglob("*.py")}
    return catch_all + [
        f"{folder}/__init__.py:1: missing, setuptools would leave the folder out"
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
    ]


RULES = [table_violations, hidden_import_violations, models_violations, cycle_violations, file_violations]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    assert read_imports(PACKAGE), f"no source in {PACKAGE}"
    violations = rule(PACKAGE)
    assert not violations, "\n" + "\n".join(violations)


# file -> its source, then the rule that objects, the place that it names and what it says.
FORBIDDEN = {
    "absolute": (
        {"losses.py": "import torch\nimport hf_kd_ranking.models.tk\n"},
        table_violations,
        "losses.py:2",
        "models",
    ),
    "relative": ({"losses.py": "from .models.tk import TK\n"}, table_violations, "losses.py:1", "models"),
    "parent relative": ({"hub/card.py": "from ..training import x\n"}, table_violations, "hub/card.py:1", "training"),
    "package from": (
        {"losses.py": "", "ranker.py": "from . import losses\n"},
        table_violations,
        "ranker.py:1",
        "losses",
    ),
    "in a function": (
        {"teachers/score.py": "def f():\n    from ..retrieval.bm25 import BM25Index\n"},
        table_violations,
        "teachers/score.py:2",
        "when a function is called",
    ),
    "in a method": (
        {"data/texts.py": "class A:\n    async def f(self):\n        import hf_kd_ranking.ranker\n"},
        table_violations,
        "data/texts.py:3",
        "ranker",
    ),
    "for types": (
        {"retrieval/bm25.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..evaluation import x\n"},
        table_violations,
        "retrieval/bm25.py:3",
        "under TYPE_CHECKING",
    ),
    "by import_module": (
        {"inference.py": "import importlib\nimportlib.import_module('hf_kd_ranking.ranker')\n"},
        table_violations,
        "inference.py:2",
        "ranker",
    ),
    "package root": (
        {"ranker.py": "from hf_kd_ranking import BertDot\n"},
        table_violations,
        "ranker.py:1",
        "__init__",
    ),
    "upwards": ({"artifacts.py": "from .data.texts import x\n"}, table_violations, "artifacts.py:1", "data"),
    "eager name": ({"__init__.py": "from .ranker import Ranker\n"}, table_violations, "__init__.py:1", "ranker"),
    "unknown layer": ({"extras/x.py": ""}, table_violations, "extras/x.py:1", "extras is not in the import table"),
    "computed name": (
        {"teachers/x.py": "from importlib import import_module as _import_module\n_import_module(f'{__name__}')\n"},
        hidden_import_violations,
        "teachers/x.py:2",
        "cannot be checked",
    ),
    "models: other library": ({"models/tk.py": "import numpy as np\n"}, models_violations, "models/tk.py:1", "numpy"),
    "models: own name": (
        {"models/tk.py": "from hf_kd_ranking.models.base import x\n"},
        models_violations,
        "models/tk.py:1",
        "hf_kd_ranking",
    ),
    "models: module": ({"models/tk.py": "from . import base\n"}, models_violations, "models/tk.py:1", "sibling"),
    "models: folder": ({"models/tk/model.py": ""}, models_violations, "models/tk/model.py:1", "flat"),
    "cycle": (
        {
            "data/a.py": "from .b import x\n",
            "data/b.py": "\nfrom hf_kd_ranking.data import c\n",
            "data/c.py": "from .a import x",
        },
        cycle_violations,
        "data/b.py:2",
        "import cycle",
    ),
    "cycle through the package": (
        {"data/__init__.py": "from .a import A\n", "data/a.py": "from . import A\n"},
        cycle_violations,
        "data/a.py:1",
        "import cycle",
    ),
    "utils": (
        {"training/__init__.py": "", "training/_utils.py": ""},
        file_violations,
        "training/_utils.py:1",
        "name the file",
    ),
    "helpers": (
        {"cli/__init__.py": "", "cli/helpers/__init__.py": ""},
        file_violations,
        "cli/helpers:1",
        "name the file",
    ),
    "no __init__": ({"cli/x.py": ""}, file_violations, "cli/__init__.py:1", "missing"),
}


@pytest.mark.parametrize(("files", "rule", "place", "words"), FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_forbidden_import_is_reported_with_file_and_line(tmp_path, files, rule, place, words):
    package = write_package(tmp_path, files)
    (violation,) = rule(package)
    assert f"{package}/{place}" in violation
    assert words in violation


def test_allowed_imports_are_not_reported(tmp_path):
    files = {
        "__init__.py": "from .models import TK\n",
        "models/__init__.py": "from .tk import TK\n",
        "models/base.py": "import torch.nn\nfrom transformers import PreTrainedModel\nfrom dataclasses import field\n",
        "models/tk.py": "from .base import x\nfrom huggingface_hub.dataclasses import strict\n",
        "data/__init__.py": "from . import texts\n",
        "data/texts.py": "import numpy\nfrom .formats import x\n",
        "data/tables.py": "import pyarrow\n",
        "hub/__init__.py": "",
        "hub/card.py": "from ..data import tables\nfrom ..data.runs import Run\nimport hf_kd_ranking.models.tk\n",
        "ranker.py": "from hf_kd_ranking.data.texts import x\n",
        "cli/__init__.py": "import hf_kd_ranking as kd\ndef main():\n    from ..training import trainer\n",
    }
    package = write_package(tmp_path, files)
    assert [violation for rule in RULES for violation in rule(package)] == []


def write_package(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "hf_kd_ranking"
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    return package
