"""Semi-supervised learning on FER2013 with few or long-tailed labels: methods side by side, over seeds.

For each protocol and seed a fixed list of training faces keeps its labels, the rest of Training is
unlabelled; a slice of Training is set aside for choosing settings, PublicTest is reported. Every method has
the same encoder, steps, batch and augmentation, and its last weights are what is reported.

    fer data prepare fer2013 --csv fer2013.csv --rule fer2013 --drop-duplicates --out data/fer2013
    fer data prepare folder --root FACES --unlabeled True --out data/faces
    accelerate launch train.py --config configs/pretrain_cpu.yaml
    python -m benchmarks.ssl run --encoder runs/pretrain_cpu/model    # one or several such processes
    python -m benchmarks.ssl table

Or all methods start from the encoder that the labelled faces alone have made of a new convolutional network
(norm and classifier are new), so that unlabelled faces can count within a CPU's few steps; at half the
resolution, for speed:

    python -m benchmarks.ssl run --config configs/ssl_start_cpu.yaml --runs runs/ssl_start \\
        --methods supervised
    python -m benchmarks.ssl run --config configs/ssl_convolutional_cpu.yaml --runs runs/ssl_convolutional \\
        --encoder "runs/ssl_start/{protocol}-supervised-{seed}/run/model"
    python -m benchmarks.ssl table --runs runs/ssl_convolutional --name ssl_convolutional_cpu
"""

import argparse
import gc
import itertools
import json
import math
import shutil
import statistics
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from accelerate import Accelerator
from datasets import Dataset
from matplotlib.figure import Figure
from safetensors import safe_open
from scipy.stats import t

import train
from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.pixels import decode_split
from modeling_fer.evaluation import plots
from modeling_fer.evaluation.metrics import compute_metrics, write_whole
from modeling_fer.labels import CLASSES
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.inference import (
    class_names,
    load_classifier,
    over_all_classes,
    predict_probabilities,
)

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
CONFIGS = Path(__file__).parents[1] / "configs"
SLICE = 2_000  # training faces set aside for choosing settings
TAU = 0.5  # strength of debiasing
HEAD, RATIO = 1_000, 50  # long tail: labels of the largest class, and how many times those of the smallest

# What each method changes of the configuration. FixMatch and the rules draw labelled faces as they come;
# debias and feedback draw them evenly over classes, which is the package's default. Where classes have
# equally many labels the two are the same, and "balanced" is not run.
NATURAL, EVEN = {"sampling_alpha": 0.0}, {"sampling_alpha": 1.0}
NEW_VIT = {
    "patch_size": 8,
    "hidden_size": 192,
    "num_layers": 6,
    "num_heads": 3,
}  # of configs/pretrain_cpu.yaml
LORA = {"lora_targets": "all", "layer_decay": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {"method": "supervised", **NATURAL},
    "supervised, balanced": {"method": "supervised", **EVEN},
    "pseudo-label": {"method": "fixmatch", "strong_augmentation": "weak", **NATURAL},
    "FixMatch": {"method": "fixmatch", **NATURAL},
    "FixMatch, flex rule": {"method": "fixmatch", "threshold_rule": "flex", **NATURAL},
    "FixMatch, free rule": {"method": "fixmatch", "threshold_rule": "free", **NATURAL},
    "FixMatch, soft rule": {"method": "fixmatch", "threshold_rule": "soft", **NATURAL},
    "FixMatch, balanced": {"method": "fixmatch", **EVEN},
    "debias": {"method": "fixmatch", "debias_tau": TAU, **EVEN},
    "feedback": {"method": "feedback", **EVEN},
    "debias + feedback": {"method": "feedback", "debias_tau": TAU, **EVEN},
    "debias + feedback + sampler feedback": {
        "method": "feedback",
        "debias_tau": TAU,
        "sampler_bound": 3.0,
        **EVEN,
    },
    # What pretraining is worth, and what is lost where only an adapter is trained: run where asked for.
    "from scratch": {"method": "supervised", "encoder": "", "layer_decay": 1.0, **NEW_VIT, **NATURAL},
    "LoRA, rank 4": {"method": "supervised", "lora_rank": 4, **LORA, **NATURAL},
    "LoRA, rank 8": {"method": "supervised", "lora_rank": 8, **LORA, **NATURAL},
    "LoRA, rank 16": {"method": "supervised", "lora_rank": 16, **LORA, **NATURAL},
}
SEMI = [name for name in METHODS if "scratch" not in name and "LoRA" not in name]
PROTOCOLS = ("10", "25", "100", "250", "long tail")
# Accuracy on FER2013 with a WideResNet, for orientation, by labels a class.
PUBLISHED = {
    "FixMatch": {"10": 47.88, "25": 49.90, "100": 59.46, "250": 62.20},
    "mean teacher": {"10": 45.21, "25": 55.14, "100": 52.17, "250": 58.06},
    "pseudo-label": {"10": 32.79, "25": 36.04, "100": 49.21, "250": 54.88},
}
BASELINES = ("FixMatch", "FixMatch, balanced", "supervised, balanced")
FIGURES = ("accuracy", "macro_f1", "worst_recall")
COSTS = ("trained_parameters", "images_per_second", "peak_memory_mib")


def label_counts(protocol: str, sizes: np.ndarray) -> np.ndarray:
    """How many faces of each class `(8,)` keep their label; classes without faces get 0.

    The long tail falls geometrically from the largest class to the smallest, as natural counts rank them.
    """
    counts = np.zeros_like(sizes)
    present = np.flatnonzero(sizes)
    if protocol == "long tail":
        ranked = present[np.argsort(-sizes[present], kind="stable")]
        counts[ranked] = np.round(HEAD * RATIO ** (-np.arange(len(ranked)) / (len(ranked) - 1)))
    else:
        counts[present] = int(protocol)
    return np.minimum(counts, sizes)


def write_protocol(source: Path, protocol: str, seed: int, out: Path) -> None:
    """Write the data set of one protocol and seed: train, unlabeled, validation (the slice), test."""
    if out.exists():
        return
    data = schema.load(source)
    labels = expressions_of(data["train"])
    # The slice is the same for every protocol and seed: settings are chosen on it once.
    fixed = np.random.default_rng(0).permutation(len(labels))
    aside, rest = fixed[:SLICE], fixed[SLICE:]
    counts = label_counts(protocol, np.bincount(labels[rest], minlength=len(CLASSES)))
    order = rest[np.random.default_rng([seed, PROTOCOLS.index(protocol)]).permutation(len(rest))]
    labelled = np.concatenate([order[labels[order] == c][:n] for c, n in enumerate(counts)])
    unlabelled = np.setdiff1d(rest, labelled)
    fresh = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    (fresh / "data").mkdir(parents=True)
    splits: dict[str, Dataset] = {
        "train": data["train"].select(np.sort(labelled)),
        "unlabeled": data["train"].select(unlabelled),
        "validation": data["train"].select(np.sort(aside)),
        "test": data["validation"],
    }
    for split, rows in splits.items():
        rows.to_parquet(str(fresh / "data" / f"{split}-00000-of-00001.parquet"))
    try:
        fresh.rename(out)
    except OSError:  # another process was quicker
        shutil.rmtree(fresh)


def score(model_folder: Path, data: Path, split: str) -> dict[str, Any]:
    """Accuracy, macro F1 over the classes that occur, recall by class and its minimum."""
    model, processor = load_classifier(model_folder)
    rows = schema.load(data, split)[split]
    references = expressions_of(rows)
    pixels = decode_split(rows, processor.size["height"], data / "cache", show_progress=False)
    normalize = Normalize(processor.image_mean, processor.image_std)
    found = over_all_classes(predict_probabilities(model, pixels, normalize), class_names(model))
    metrics = compute_metrics(references, found.argmax(-1), found, bootstrap_samples=0)
    recall = {
        CLASSES[c]: float((found.argmax(-1)[references == c] == c).mean()) for c in np.unique(references)
    }
    return {
        "accuracy": metrics["accuracy"],
        "macro_f1": metrics["macro_f1_present"],
        "worst_recall": min(recall.values()),
        "recall": recall,
    }


def cost_of(run: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Trained parameters, labelled images a second, and peak memory of the process so far.

    So memory is that of a cell only where each has a process of its own.
    """
    adapter = run / "model/adapter/adapter_model.safetensors"
    with safe_open(adapter if adapter.exists() else run / "model/model.safetensors", "np") as weights:
        trained = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    rates = [row["images_per_second"] for row in history if "images_per_second" in row]
    memory = json.loads((run / "environment.json").read_text())["peak_memory_mib"]
    return {
        "trained_parameters": trained,
        "images_per_second": statistics.median(rates),
        "peak_memory_mib": memory,
    }


def run_one(
    protocol: str,
    method: str,
    seed: int,
    config: Path,
    encoder: str,
    source: Path,
    beside: list[str],
    root: Path,
    extra: list[str],
) -> None:
    """Train and score one cell of the grid, unless it is done or another process is at it."""
    name = f"{protocol}-{method}-{seed}".replace(" ", "_")
    encoder = encoder.format(protocol=protocol.replace(" ", "_"), seed=seed)
    run = root / name
    data = root.parent / "ssl_data" / f"{protocol}-{seed}".replace(" ", "_")
    settings = {"encoder": encoder, **yaml.safe_load(config.read_text()), **METHODS[method]}
    folders = ",".join([f"labelled={data}", *(f"unlabelled={path}" for path in beside)])
    settings |= {"data": folders, "output_dir": run / "run", "seed": seed}
    arguments = parse_arguments([f"--{k}={v}" for k, v in settings.items()] + extra)
    arguments.eval_steps = arguments.max_steps  # the last weights are kept, whatever the slice says of others
    try:
        run.mkdir(parents=True)
    except FileExistsError:
        return
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        write_protocol(source, protocol, seed, data)
        train.train(arguments)
    except BaseException:
        shutil.rmtree(run)  # so that another process may try
        raise
    history = [json.loads(line) for line in (run / "run/history.jsonl").read_text().splitlines()]
    rounds = [
        {k.removeprefix("round/"): v for k, v in row.items() if k.startswith("round/")}
        for row in history
        if any(k.startswith("round/") for k in row)
    ]
    row: dict[str, Any] = {
        "protocol": protocol,
        "method": method,
        "seed": seed,
        "slice": score(run / "run/model", data, "validation"),
        "PublicTest": score(run / "run/model", data, "test"),
        "last_round": rounds[-1] if rounds else None,
        **cost_of(run / "run", history),
        "settings": {k: str(v) for k, v in settings.items() if k not in ("data", "output_dir", "encoder")},
        "config": config.name,
        "encoder": settings["encoder"],
        "extra": extra,
        "unlabelled": [Path(path).name for path in beside],
    }
    write_whole(run / "result.json", (json.dumps(row, indent=1) + "\n").encode())
    for folder in ("checkpoints", "logs"):
        shutil.rmtree(run / "run" / folder, ignore_errors=True)
    print(f"{name}: " + ", ".join(f"{key} {row['PublicTest'][key]:.3f}" for key in FIGURES), flush=True)
    gc.collect()


def interval(values: list[float]) -> tuple[float, float, float] | None:
    """Mean, and the 95 % interval of the mean by Student's t over the seeds; None of a single one."""
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    low, high = t.interval(0.95, len(values) - 1, mean, error) if error else (mean, mean)
    return mean, float(low), float(high)


def tabulate(root: Path, name: str) -> None:
    """Gather the results into JSON, a Markdown table, a figure, and the gains over FixMatch."""
    rows = [json.loads(path.read_text()) for path in sorted(root.glob("*/result.json"))]
    if open_cells := sorted(run.name for run in root.iterdir() if not (run / "result.json").exists()):
        print(f"without a result, not in the table: {', '.join(open_cells)}")
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["protocol"], row["method"]), []).append(row)
    summary = []
    for protocol, method in itertools.product(PROTOCOLS, METHODS):
        if found := cells.get((protocol, method)):
            entry: dict[str, Any] = {"protocol": protocol, "method": method, "seeds": len(found)}
            for key in FIGURES:
                values = [row["PublicTest"][key] for row in found]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                entry[key] = {"mean": statistics.mean(values), "std": spread, "values": values}
            rounds = [row["last_round"] for row in found if row["last_round"]]
            for key in ("pseudo_label_rate", "pseudo_label_accuracy"):  # of the last round
                values = [last[key] for last in rounds if key in last]
                entry[key] = statistics.mean(values) if values else None
            costs = [row for row in found if "trained_parameters" in row]  # earlier runs did not note it
            entry["cost"] = (
                {key: statistics.mean(row[key] for row in costs) for key in COSTS} if costs else None
            )
            summary.append(entry)
    gains = []
    for ((protocol, method), found), over in itertools.product(cells.items(), BASELINES):
        base = {row["seed"]: row for row in cells.get((protocol, over), [])}
        pairs = [(row, base[row["seed"]]) for row in found if row["seed"] in base and method != over]
        if len(pairs) > 1:
            gain: dict[str, Any] = {
                key: interval([a["PublicTest"][key] - b["PublicTest"][key] for a, b in pairs])
                for key in FIGURES
            }
            gains.append({"protocol": protocol, "method": method, "over": over, "seeds": len(pairs), **gain})
    result = {"published_accuracy": PUBLISHED, "summary": summary, "gains": gains, "runs": rows}
    write_whole(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
    columns = [
        "protocol",
        "method",
        "seeds",
        "accuracy",
        "macro F1",
        "worst recall",
        "counting labels, right",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for entry in summary:
        shown = " | ".join(f"{100 * entry[k]['mean']:.1f} ± {100 * entry[k]['std']:.1f}" for k in FIGURES)
        rates = [entry[key] for key in ("pseudo_label_rate", "pseudo_label_accuracy")]
        shown += " | " + ", ".join("-" if rate is None else f"{100 * rate:.1f}" for rate in rates)
        print(f"| {entry['protocol']} | {entry['method']} | {entry['seeds']} | {shown} |")
    print("| labels | method | trained parameters | images/s | peak memory, MiB |\n|---|---|---|---|---|")
    for entry in summary:
        if cost := entry["cost"]:
            shown = " | ".join(f"{cost[key]:,.0f}" for key in COSTS)
            print(f"| {entry['protocol']} | {entry['method']} | {shown} |")
    for gain in gains:
        shown = ", ".join(
            f"{k} {100 * gain[k][0]:+.1f} ({100 * gain[k][1]:+.1f} to {100 * gain[k][2]:+.1f})"
            for k in FIGURES
        )
        print(f"{gain['protocol']}: {gain['method']} over {gain['over']}: {shown}")
    plots.save(comparison_figure(summary), IMAGES / f"{name}.png")


def comparison_figure(summary: list[dict[str, Any]]) -> Figure:
    """One panel a protocol: macro F1 and worst recall of each method, mean and deviation over seeds."""
    protocols = [p for p in PROTOCOLS if any(entry["protocol"] == p for entry in summary)]
    methods = [
        m for m in METHODS if any(entry["method"] == m for entry in summary)
    ]  # panels share their axis
    figure = Figure(figsize=(4.4 * len(protocols) + 2, 3.6), layout="constrained")
    for axes, protocol in zip(
        figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0], protocols, strict=True
    ):
        entries = [entry for entry in summary if entry["protocol"] == protocol]
        places = np.array([methods.index(entry["method"]) for entry in entries])
        for offset, key, colour in ((-0.18, "macro_f1", plots.BLUE), (0.18, "worst_recall", plots.ORANGE)):
            means = [100 * entry[key]["mean"] for entry in entries]
            errors = [100 * entry[key]["std"] for entry in entries]
            axes.barh(places + offset, means, 0.34, xerr=errors, color=colour, label=key.replace("_", " "))
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(protocol if protocol == "long tail" else f"{protocol} labels a class")
        axes.set_xlabel("PublicTest, %")
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(loc="lower left", fontsize=8)
    return figure


def main() -> None:
    """Run cells of the grid, or gather them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=Path("data/fer2013"))
    parser.add_argument("--unlabelled", nargs="*", default=[], help="further folders, of another domain")
    parser.add_argument("--config", type=Path, default=CONFIGS / "ssl_cpu.yaml")
    parser.add_argument(
        "--encoder",
        default="runs/pretrain_cpu/model",
        help="may hold {protocol} and {seed}; a configuration that names one keeps it",
    )
    parser.add_argument("--protocols", nargs="+", default=["25", "250", "long tail"], choices=PROTOCOLS)
    parser.add_argument("--methods", nargs="+", default=SEMI, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/ssl"))
    parser.add_argument("--name", default="ssl_cpu", help="of the JSON and the figure")
    args, extra = parser.parse_known_args()
    if args.action == "table":
        tabulate(args.runs, args.name)
        return
    Accelerator()
    for seed, protocol, method in itertools.product(args.seeds, args.protocols, args.methods):
        if method.endswith(", balanced") and protocol != "long tail":
            continue
        run_one(
            protocol, method, seed, args.config, args.encoder, args.data, args.unlabelled, args.runs, extra
        )


if __name__ == "__main__":
    main()
