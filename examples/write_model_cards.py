"""Render the cards of the paper's five published checkpoints, and of the demo's rankers, into `model_cards/`.

    python examples/write_model_cards.py [--demo demo_output]

Facts of the published ones are in `model_cards/facts.yaml`; the demo's students have cards when it is done. Cards are
in folders of their repositories' names, with `.eval_results` beside them.
"""

import argparse
import json
import shutil
from pathlib import Path

import yaml

from hf_kd_ranking.hub.model_card import write_card, write_model_card

OWNER = "sebastian-hofstaetter"
FOLDER = Path(__file__).parents[1] / "model_cards"


def main() -> None:
    """Render them."""
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
    # 2. The demo's students that were chosen, with what the demo measured
    outcome = {} if args.demo is None else json.loads((args.demo / "report" / "outcome.json").read_text("utf-8"))
    for name, folder in outcome.get("folders", {}).items():
        name = f"{name.replace(' ', '-')}-pydocs"
        (args.output / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(write_model_card(args.demo / folder, name), args.output / name / "README.md")


if __name__ == "__main__":
    main()
