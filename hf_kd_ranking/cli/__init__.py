"""The command line: `hf-kd-ranking VERB`, `python -m hf_kd_ranking VERB`."""

import sys

from . import benchmark, distill, evaluate, push, retrieval, serve, teacher, train
from .parser import add_verb, exit_on_bad_input, make_app, run_app

__all__ = ["app", "exit_on_bad_input", "main"]

VERBS = [distill.distill, distill.demo, retrieval.passages, retrieval.index, retrieval.search, retrieval.fuse]
VERBS += [evaluate.rerank, evaluate.evaluate, evaluate.compare, benchmark.benchmark, benchmark.report]
VERBS += [serve.serve, push.export, push.push, train.train]

app = make_app("Distil fast passage rankers from slow ones.")
app.add_typer(teacher.app, name="teacher")
for verb in VERBS:
    add_verb(app, verb)


def main() -> None:
    """Run the verb that the process's command line names, and exit."""
    with exit_on_bad_input():
        run_app(app, sys.argv[1:], "hf-kd-ranking")
    sys.exit(0)
