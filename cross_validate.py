"""Cross-validate a temporal model over its training videos, and fit its post-processing on what comes out.

    python cross_validate.py --config configs/video.yaml --k 5 --out runs/video/folds --model runs/video/model

Trains the configuration once without each part of the training videos (those of one recording or one person
stay together) and predicts that part. From these predictions, of videos that their temporal head never saw,
come the scores with their spread over the parts, and temperature, smoothing and per-class bias, which are
written into the configuration of `--model`. Validation and test videos have no say. The image model is the
same for all parts: where it learnt from these very videos, the scores flatter. Runs under `accelerate
launch`, too; one that was interrupted goes on. Models of parts are never pushed to the Hub.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

import train
from modeling_fer import FerForVideoClassification
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import Collection
from modeling_fer.evaluation.metrics import compute_metrics, write_whole
from modeling_fer.evaluation.tuning import VideoLogits, cross_fit, fit
from modeling_fer.learning.arguments import FerTrainingArguments
from modeling_fer.learning.command_line import parse_arguments
from modeling_fer.learning.features import frame_features
from modeling_fer.learning.inference import class_names, load_model
from modeling_fer.learning.timelines import predict_tracks, tracks_of, video_logits
from modeling_fer.learning.video import split_fold
from modeling_fer.postprocess_fer import PostProcess

COMPARED = ("pooling", "image_size", "num_frames", "frame_rate")  # and all that is called temporal_...
ADAPTED = re.compile(r"\.[0-9]+\.|^norm\.")  # what LoRA changes or trains along with it


def train_fold(argv: list[str], folds: int, fold: int, out: Path) -> FerTrainingArguments:
    """Train without one part, judged only when it ends: the part does not choose the step."""
    given = ["--stage", "video", "--folds", str(folds), "--fold", str(fold), "--output_dir", str(out)]
    given += ["--resume", "auto", "--eval_steps", str(10**9), "--push_to_hub", "false"]
    arguments = parse_arguments([*argv, *given])
    train.train(arguments)
    return arguments


def predict_fold(model: Any, processor: Any, arguments: FerTrainingArguments) -> list[VideoLogits]:
    """Frame logits of the part of the training videos that a fold's model did not see."""
    accelerator = Accelerator()
    collection = Collection(arguments.data)
    rows = collection.frames("train")
    features = frame_features(
        model.fer,
        rows,
        Normalize(processor.image_mean, processor.image_std),
        model.config.image_size,
        Path(arguments.cache_dir or collection.cache_dir),
        accelerator,
        arguments.eval_batch_size,
    )
    found = tracks_of(rows, f"{arguments.data}, train")
    _, unseen = split_fold(found, arguments.folds, arguments.fold, arguments.seed)
    logits = predict_tracks(model, features, unseen, accelerator)
    return video_logits(logits, unseen, class_names(model))


def check_fits(model: Any, folder: Path, made: Any, adapted: bool = False) -> None:
    """Raise unless post-processing fitted on what a fold's model says is of use to another model.

    Args:
        model: the one to store it in, from `folder`.
        made: the fold's.
        adapted: each model has adapted the blocks of its encoder (LoRA): only the rest must be the same.
    """
    ours, theirs = made.config.to_dict(), model.config.to_dict()
    names = [name for name in ours if name.startswith("temporal_") or name in COMPARED]
    told = {name: (ours[name], theirs[name]) for name in names}
    told["classes"] = (class_names(made), class_names(model))
    other = [f"{name} {b}, the models of the folds have {a}" for name, (a, b) in told.items() if a != b]
    weights, own = made.fer.state_dict(), model.fer.state_dict()
    kept = [name for name in weights if not (adapted and ADAPTED.search(name))]
    if weights.keys() != own.keys() or not all(torch.equal(weights[name], own[name]) for name in kept):
        other.append("another encoder than the models of the folds")
    if other:
        raise ValueError(
            f"--model {folder} has {'; has '.join(other)}: pass the model that the same configuration made"
        )


def scores_of(videos: list[VideoLogits], names: list[str]) -> dict[str, Any]:
    """Scores of the highest logit on the labelled frames of all videos together."""
    references = np.concatenate([video.references for video in videos])
    predictions = np.concatenate([video.logits for video in videos]).argmax(1)
    found = compute_metrics(references, predictions, None, names, bootstrap_samples=0)
    return {name: found[name] for name in ("macro_f1", "macro_f1_present", "accuracy")}


def store(post: PostProcess, model: Path) -> None:
    """Write post-processing into a checkpoint's configuration, whole or not at all."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    kept = {name: value for name, value in post.to_dict().items() if name != "causal"}  # the model says that
    write_whole(path, (json.dumps({**config, "postprocess": kept}, indent=2, sort_keys=True) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    """Run from the command line: what the user can mend is one line, not a traceback."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--k", type=int, default=5, help="parts of the training videos")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the result")
    parser.add_argument("--model", type=Path, help="checkpoint to store the post-processing in")
    args, rest = parser.parse_known_args(argv)
    try:
        if args.k < 2:
            raise ValueError(f"--k {args.k}: there must be 2 parts or more")
        wanted = load_model(args.model)[0] if args.model else None
        if wanted is not None and not isinstance(wanted, FerForVideoClassification):
            raise ValueError(f"--model {args.model} is no video model")
        parts: list[list[VideoLogits]] = []
        runs: list[FerTrainingArguments] = []
        names: list[str] = []
        for fold in range(args.k):
            runs.append(train_fold(rest, args.k, fold, args.out / f"fold-{fold}"))
            made, processor = load_model(Path(runs[-1].output_dir) / "model")
            classes = class_names(made)
            if classes != names and fold:
                raise ValueError(
                    f"fold {fold} knows the classes {', '.join(classes)}, those before {', '.join(names)}: a "
                    "rare class is missing from some; take fewer parts"
                )
            names = classes
            if wanted is not None:
                check_fits(wanted, args.model, made, adapted=runs[0].lora_rank > 0)
            parts.append(predict_fold(made, processor, runs[-1]))
        videos = [video for part in parts for video in part]
        causal = runs[0].causal
        post, report = fit(videos, causal)
        fold_of = np.repeat(np.arange(args.k), [len(part) for part in parts])
        by_fold = [scores_of(part, names) for part in parts]
        result: dict[str, Any] = {
            "folds": by_fold,
            "mean": {name: statistics.mean(row[name] for row in by_fold) for name in by_fold[0]},
            "spread": {name: statistics.stdev(row[name] for row in by_fold) for name in by_fold[0]},
            "pooled": scores_of(videos, names),
            "postprocess": post.to_dict(),
            "tuning": report,
            "tuning_cross_fitted": cross_fit(videos, fold_of, causal),
        }
        accelerator = Accelerator()
        if accelerator.is_main_process:
            write_whole(args.out / "cross_validation.json", (json.dumps(result, indent=2) + "\n").encode())
            if args.model:
                store(post, args.model)
            mean, spread = result["mean"]["macro_f1"], result["spread"]["macro_f1"]
            tuned = result["tuning_cross_fitted"]
            print(f"macro F1 over {args.k} parts: mean {mean:.3f}, deviation {spread:.3f}; all together:")
            print(
                f"  as they are {tuned['before']['pooled']:.3f}, post-processed as fitted on the other parts "
                f"{tuned['after']['pooled']:.3f}"
            )
            print(f"post-processing: {post.to_dict()}" + (f", stored in {args.model}" if args.model else ""))
            print(f"written: {args.out / 'cross_validation.json'}")
        accelerator.end_training()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"cross_validate.py: {error}")


if __name__ == "__main__":
    main()
