"""What the start of a new ViT is worth: short runs with and without `condition_vit`, all else equal.

python -m benchmarks.initialization --data data/ferplus --config configs/ferplus_cpu.yaml
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import train
from modeling_fer.learning import image
from modeling_fer.learning.command_line import parse_arguments

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train, print a table and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configuration of train.py to start from")
    parser.add_argument("--data", required=True, help="prepared data set with train and validation")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    result: dict = {"config": Path(args.config).name, "steps": args.steps, "seeds": args.seeds, "runs": {}}
    for variant in ("random", "conditioned"):
        runs = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                flags = {
                    "data": args.data,
                    "output_dir": f"{folder}/run",
                    "seed": seed,
                    "max_steps": args.steps,
                    "log_steps": args.steps // 10,
                    "eval_steps": args.steps,
                    "save_steps": args.steps,
                    "tracker": "none",
                    "threads": args.threads,
                }
                given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
                arguments = parse_arguments(["--config", args.config, *given])
                start = image.condition_vit if variant == "conditioned" else lambda encoder: None
                with mock.patch.object(image, "condition_vit", start):
                    state = train.train(arguments)
                rows = [
                    json.loads(line) for line in Path(folder, "run/history.jsonl").read_text().splitlines()
                ]
                loss = [row["loss"] for row in rows if "loss" in row][-1]
                runs.append({"loss": loss, **state["best_metrics"]})
        result["runs"][variant] = runs
    names = ("loss", "accuracy", "macro_f1_present")
    for variant, runs in result["runs"].items():
        cells = [
            f"{n} {statistics.mean(r[n] for r in runs):.3f} ({', '.join(f'{r[n]:.3f}' for r in runs)})"
            for n in names
        ]
        print(f"{variant:12} {'  '.join(cells)}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "initialization.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
