"""Render the cards of the paper's five published checkpoints, and of the demo's rankers, into `model_cards/`.

    python examples/write_model_cards.py [--demo demo_output]

Facts are in `model_cards/facts.yaml` and, of the demo's rankers, in what its training and its report measured: run
`make demo` first. Cards are in folders of their repositories' names, with `.eval_results` beside them.
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml
from transformers import AutoConfig

import hf_kd_ranking  # noqa: F401 (registers the architectures)
from hf_kd_ranking.hub.model_card import write_card, write_model_card

OWNER = "sebastian-hofstaetter"
FOLDER = Path(__file__).parents[1] / "model_cards"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, help="What `make demo` wrote; only the published checkpoints without.")
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    # 1. The published checkpoints
    facts = yaml.safe_load((FOLDER / "facts.yaml").read_text(encoding="utf-8"))
    for name, own in facts["cards"].items():
        (args.output / name).mkdir(parents=True, exist_ok=True)
        known = {**facts["shared"], **own, "name": name, "repository": f"{OWNER}/{name}"}
        write_card(args.output / name, known | {"costs": known["costs_text"]})
    # 2. The demo's rankers, with what their latencies were
    if args.demo is None:
        return
    measured = json.loads((args.demo / "report" / "efficiency.json").read_text(encoding="utf-8"))
    chosen = json.loads((args.demo / "results.json").read_text(encoding="utf-8"))["chosen_learning_rate"]
    for condition, rate in chosen.items():
        trained = args.demo / "runs" / f"student-{condition.replace(' ', '_')}-{rate:g}-seed42"
        name = f"bert_dot-{condition.replace(' ', '_')}-pydocs"
        config, costs = AutoConfig.from_pretrained(trained).to_dict(), {"costs": measured["rankers"][condition]}
        write_model_card(trained, config, name, measured | costs)
        (args.output / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trained / "README.md", args.output / name / "README.md")


if __name__ == "__main__":
    main()
