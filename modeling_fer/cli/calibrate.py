"""`fer calibrate`: a trained classifier of stills with honest probabilities, ready to be used."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.dataset import class_translation
from modeling_fer.data.pixels import decode_split
from modeling_fer.evaluation.metrics import compute_metrics, write_whole
from modeling_fer.labels import IGNORE
from modeling_fer.learning.checkpoint import write_folder
from modeling_fer.learning.folding import calibrate, fold_grey
from modeling_fer.learning.inference import class_names, load_classifier, predict_probabilities

KEPT = ("arguments.json", "history.jsonl", "environment.json", "learning_curve.png")  # of the run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.add_argument("--model", required=True, help="model folder, of a classifier of stills")
    parser.add_argument("--data", required=True, help="prepared data set that the model has not learnt from")
    parser.add_argument("--split", default="validation", choices=schema.SPLITS)
    parser.add_argument("--out", required=True, help="run folder to write; the model goes into its model/")
    parser.add_argument(
        "--grey", action="store_true", help="the faces learnt from were grey: see colour as grey"
    )
    parser.add_argument(
        "--bias",
        action="store_true",
        help="fit a bias of each class as well: for labels that came about otherwise than those learnt from",
    )
    parser.add_argument("--half", action="store_true", help="store the weights in half precision")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fit a temperature, fold it into the weights, and write the model with what its run recorded."""
    out = Path(args.out)
    if (out / "model").exists():
        raise ValueError(f"{out / 'model'} is there already: choose another --out, or delete it")
    model, processor = load_classifier(args.model)
    split = schema.load(args.data, args.split)[args.split]
    names = class_names(model)
    references = class_translation(names).numpy()[expressions_of(split)]
    labelled = references != IGNORE
    if labelled.sum() < 2:
        raise ValueError(
            f"{args.data}: fewer than two faces of its {args.split} split have a label of the model's"
        )
    pixels = decode_split(split, processor.size["height"], Path(args.data) / "cache")[labelled]
    normalize = Normalize(processor.image_mean, processor.image_std)
    before = predict_probabilities(model, np.array(pixels), normalize, show_progress=True)
    references = references[labelled]
    logits = np.log(np.maximum(before, 1e-30))
    temperature, bias, after = calibrate(model, logits, references, args.bias)
    record: dict[str, Any] = {
        "data": Path(args.data).name,
        "split": args.split,
        "faces": len(references),
        "temperature": temperature,
        "bias": dict(zip(names, bias.tolist(), strict=True)) if args.bias else None,
    }
    for name, found in {"before": before, "cross_fitted": after}.items():
        scores = compute_metrics(references, found.argmax(-1), found, names, bootstrap_samples=0)
        record[name] = {key: scores[key] for key in ("ece", "nll", "accuracy", "macro_f1_present")}
    if args.grey:
        fold_grey(model, processor)

    def save(folder: Path) -> None:
        (model.half() if args.half else model).save_pretrained(folder)
        if args.half:  # stored in half precision, computed in single
            config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
            write_whole(
                folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
            )
        processor.save_pretrained(folder)

    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        for folder in (Path(args.model).parent, Path(args.model)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
                break
    write_whole(out / "calibration.json", (json.dumps(record, indent=2) + "\n").encode())
    write_folder(out / "model", save)
    print(
        f"temperature {temperature:.3f}; ECE {record['before']['ece']:.3f} before, "
        f"{record['cross_fitted']['ece']:.3f} on faces that it was not fitted on\nwritten: {out / 'model'}"
    )
    return 0
