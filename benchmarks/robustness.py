"""What bad pictures cost: a classifier on held-out faces, blurred, noisy, dark, hidden in part or small.

The same seed degrades the same way, so that models can be compared on the same pixels.

    python -m benchmarks.robustness --model runs/release/model --data data/fer2013
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.collection import expressions_of
from modeling_fer.data.pixels import decode_split
from modeling_fer.evaluation.metrics import compute_metrics
from modeling_fer.learning.inference import (
    class_names,
    load_classifier,
    over_all_classes,
    predict_probabilities,
)

RESULTS = Path(__file__).parent / "results"


def blur(face: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur; the deviation is a share of the side."""
    return np.asarray(Image.fromarray(face).filter(ImageFilter.GaussianBlur(share * len(face))))


def noise(face: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, the same on all colours; the deviation is in grey levels."""
    drawn = rng.normal(0, deviation, face.shape[:2])[..., None]
    return np.clip(np.round(face + drawn), 0, 255).astype(np.uint8)


def low_light(face: np.ndarray, exposure: float, rng: np.random.Generator) -> np.ndarray:
    """Less light, with the shot noise of a sensor that holds 1,000 electrons at white."""
    electrons = rng.poisson(np.maximum(face[..., :1].astype(float), 0) / 255 * 1000 * exposure)
    return np.repeat(np.clip(np.round(electrons / 1000 * 255), 0, 255).astype(np.uint8), 3, axis=2)


def occlusion(face: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A grey square somewhere, which covers a share of the area."""
    side = round(len(face) * share**0.5)
    row, column = rng.integers(0, len(face) - side + 1, 2)
    hidden = face.copy()
    hidden[row : row + side, column : column + side] = 127
    return hidden


def small(face: np.ndarray, pixels: float, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to so many pixels a side, and enlarged again."""
    size = (len(face), len(face))
    tiny = Image.fromarray(face).resize((int(pixels), int(pixels)), Image.Resampling.BOX)
    return np.asarray(tiny.resize(size, Image.Resampling.BILINEAR))


Degrade = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
# What is done, and at which strengths.
DEGRADATIONS: dict[str, tuple[Degrade, tuple[float, ...]]] = {
    "Gaussian blur, deviation as a share of the side": (blur, (0.01, 0.02, 0.04)),
    "Gaussian noise, deviation in grey levels": (noise, (10, 25, 50)),
    "low light, exposure": (low_light, (0.5, 0.25, 0.1)),
    "square hidden, share of the area": (occlusion, (0.1, 0.25, 0.4)),
    "face of so many pixels": (small, (32, 24, 16)),
}


def degraded(faces: np.ndarray, degrade: Degrade, strength: float, seed: int = 0) -> np.ndarray:
    """uint8 faces `(N, 3, H, W)`, each degraded by its own random numbers."""
    rows = faces.transpose(0, 2, 3, 1)
    done = [degrade(row, strength, np.random.default_rng([seed, i])) for i, row in enumerate(rows)]
    return np.stack(done).transpose(0, 3, 1, 2)


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--split", default="validation", choices=schema.SPLITS)
    parser.add_argument("--name", default="robustness", help="of the JSON in benchmarks/results")
    args = parser.parse_args()
    model, processor = load_classifier(args.model)
    normalize, size = Normalize(processor.image_mean, processor.image_std), processor.size["height"]
    split = schema.load(args.data, args.split)[args.split]
    faces, references = np.array(decode_split(split, size, args.data / "cache")), expressions_of(split)
    result = {
        "model": args.model,
        "data": str(args.data),
        "split": args.split,
        "faces": len(faces),
        "rows": [],
    }

    def judge(pixels: np.ndarray, what: str, strength: float | None) -> None:
        found = over_all_classes(predict_probabilities(model, pixels, normalize), class_names(model))
        scores = compute_metrics(references, found.argmax(-1), found, bootstrap_samples=0)
        row = {key: scores[key] for key in ("macro_f1_present", "accuracy", "ece")}
        result["rows"].append({"degradation": what, "strength": strength, **row})
        shown = "" if strength is None else f" {strength:g}"
        numbers = (
            f"macro F1 {row['macro_f1_present']:.3f}, accuracy {row['accuracy']:.3f}, ECE {row['ece']:.3f}"
        )
        print(f"{what + shown:60} {numbers}", flush=True)

    judge(faces, "as they are", None)
    for what, (degrade, strengths) in DEGRADATIONS.items():
        for strength in strengths:
            judge(degraded(faces, degrade, strength), what, strength)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
