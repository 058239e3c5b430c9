"""Does an out-of-distribution gate tell another source of faces from the one that the labels are from?

Scores of a trained classifier, by name in `GATES`, on held-out faces of its own source and on those of
another, unlabelled: area under the ROC curve, and the share of the others below the floor of 5 % of its own.

    python -m benchmarks.gate --model runs/ferplus_finetune_cpu/model --inside data/ferplus \\
        --outside data/faces
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from modeling_fer.data import schema
from modeling_fer.data.augment import Normalize
from modeling_fer.data.pixels import decode_split
from modeling_fer.learning.gate import GATES, auroc
from modeling_fer.learning.inference import load_classifier

RESULTS = Path(__file__).parent / "results"


@torch.inference_mode()
def logits_of(model: torch.nn.Module, pixels: np.ndarray, normalize: Normalize) -> torch.Tensor:
    """Logits `(N, C)` of uint8 faces."""
    batches = (torch.from_numpy(np.array(pixels[i : i + 256])) for i in range(0, len(pixels), 256))
    return torch.cat([model(pixel_values=normalize(batch)).logits for batch in batches])


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--inside", type=Path, required=True, help="prepared folder; its validation split")
    parser.add_argument("--outside", type=Path, required=True, help="prepared folder; its unlabeled split")
    args = parser.parse_args()
    model, processor = load_classifier(args.model)
    normalize, size = Normalize(processor.image_mean, processor.image_std), processor.size["height"]
    inside, outside = (
        logits_of(model, decode_split(schema.load(path, split)[split], size, path / "cache"), normalize)
        for path, split in ((args.inside, "validation"), (args.outside, "unlabeled"))
    )
    result = {"model": args.model, "faces": [len(inside), len(outside)]}
    for name in ("energy", "probability"):
        own, other = GATES[name](inside), GATES[name](outside)
        floor = own.quantile(0.05)
        below = (other < floor).float().mean().item()
        result[name] = {"auroc": auroc(own, other), "outside_left_out_at_5_percent_inside": below}
    print(json.dumps(result, indent=2))
    (RESULTS / "gate.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
