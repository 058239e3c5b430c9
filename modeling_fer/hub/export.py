"""Exports of trained models, each compared with torch on faces before it is put in place.

| format | folder |
|---|---|
| `vit` | a stock `ViTForImageClassification` with its image processor; see `export_vit` |
| `onnx`, stills | `onnx/model.onnx`: pixel_values to logits; with int8 also `onnx/model_quantized.onnx` |
| `onnx`, videos | `onnx/features.onnx`: pixel_values to features; `onnx/temporal.onnx`: on to frame logits |

ONNX folders have the file names that transformers.js looks for, and a `config.json` with the class names: of
the encoder for stills, of the whole model for videos; beside a stock model, that one's. Logits are the
model's, before post-processing.

The graph `temporal.onnx` is for windows of the length that the model learnt from (`num_frames`): of a
transformer, time and memory grow with the square of the frames, heads x frames^2 x 4 bytes at once (with 4
heads 16 MB at 1,000 frames, 1.6 GB at 10,000), where torch's grow with the frames. Cut longer videos into
windows that overlap.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageClassification

from modeling_fer import FerForImageClassification, FerForVideoClassification
from modeling_fer.hub import export_onnx
from modeling_fer.hub.export_vit import plain_model, stock_vit
from modeling_fer.hub.runs import FACTS, read_json

FORMATS = ("vit", "onnx")
STOCK_LOGITS = 1e-4  # largest difference of logits between a stock model and ours
ONNX_PROBABILITIES = 1e-4  # largest difference of probabilities between a graph and torch
INT8_LABELS = 0.98  # least share of examples that int8 weights must leave in their class
BATCH = 64

CARD = """---
{metadata}
---

# {name}: {formats}

The model of {origin} in other formats, for programs that do not run its own code. It was not trained further.
Compared with it before this was written:

{agreements}

## Limits

It names the expression that annotators perceived, not what a person felt. Training data, scores, the crop
of the face that it expects and all further limits are those of {origin}: read its card first. In the European
Union, the AI Act (Regulation (EU) 2024/1689, Art. 5(1)(f)) prohibits inferring emotions at work and in
education, except for medical or safety reasons.

Licence of the weights: {licence}.

## How to use
{snippets}"""
SNIPPETS = {
    "vit": """
```python
from transformers import pipeline

classify = pipeline("image-classification", model="path/of/this/folder")
for found in classify("face.png"):  # the crop of one face
    print(f"{found['label']}: {found['score']:.4f}")
```
""",
    "stills": """
```js
import { pipeline } from "@huggingface/transformers";

const classify = await pipeline("image-classification", "org/name", { dtype: "fp32" });
console.log(await classify("face.png")); // the crop of one face
```
""",
    "videos": """
With `pixels` of the frames `(frames, 3, height, width)` from the image processor, and `seconds`, their times;
windows as long as `num_frames` in `config.json`, for memory grows with the square of the frames:

```python
import numpy as np
import onnxruntime

first, second = (
    onnxruntime.InferenceSession(f"path/of/this/folder/onnx/{part}.onnx") for part in ("features", "temporal")
)
[features] = first.run(None, {"pixel_values": pixels})
inputs = {
    "frame_features": features[None],
    "frame_mask": np.ones((1, len(features)), dtype=bool),
    "frame_times": np.asarray(seconds, dtype=np.float64)[None],
}
[logits] = second.run(None, inputs)  # (1, frames, classes), before post-processing
```
""",
}


@dataclass(frozen=True)
class Agreement:
    """How far an exported file agrees with torch.

    Attributes:
        file: what was compared, within the exported folder.
        examples: how many faces, or frames of videos.
        logits: largest difference of a logit.
        probabilities: largest difference of a probability.
        labels: share of examples with the same class.
    """

    file: str
    examples: int
    logits: float
    probabilities: float
    labels: float

    @classmethod
    def of(cls, file: str, expected: torch.Tensor, found: torch.Tensor) -> "Agreement":
        """Compare logits `(N, C)`."""
        apart = (softmax(expected) - softmax(found)).abs().max().item()
        same = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
        return cls(file, len(expected), (expected - found).abs().max().item(), apart, same)

    def __str__(self) -> str:
        return (
            f"{self.file}: largest probability difference {self.probabilities:.1e} "
            f"(logits {self.logits:.1e}), same class {self.labels:.1%}, over {self.examples} examples"
        )


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities in float64, so that only the logits' differences count."""
    return logits.double().softmax(dim=-1)


def export(
    model: nn.Module,
    processor: Any,
    faces: np.ndarray,
    out: str | Path,
    formats: str | Sequence[str],
    int8: bool = False,
    source: str | Path | None = None,
) -> list[Agreement]:
    """Write a model in one other format or more into a new folder, once it agrees with torch on faces.

    Args:
        model: a `FerForImageClassification`, for `onnx` a `FerForVideoClassification` too; LoRA is merged.
        processor: its image processor, which travels with it.
        faces: `(N, 3, H, W)` uint8 face crops to compare on; a model of videos takes them as frames.
        out: folder to write.
        formats: of `FORMATS`, in any order.
        int8: also write the stills' ONNX graph with int8 weights.
        source: the model's folder; where it has a card, the export has a short one that refers to it.

    Returns:
        What was compared, a row each.

    Raises:
        OSError: `out` is there already, or cannot be written.
        ValueError: unknown format, no faces, a model that the format cannot hold, something not installed, or
            a difference above what is allowed. `out` is not made then.
    """
    formats = [formats] if isinstance(formats, str) else formats
    if unknown := [repr(name) for name in formats if name not in FORMATS] or ["none"] * (not formats):
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {', '.join(unknown)}")
    if faces.ndim != 4 or faces.shape[1] != 3 or faces.dtype != np.uint8 or not len(faces):
        raise ValueError(
            f"faces to compare on must be uint8 (N, 3, H, W), N at least 1; got {faces.dtype} {faces.shape}"
        )
    plain = plain_model(model)
    if not isinstance(plain, FerForImageClassification | FerForVideoClassification):
        raise ValueError(f"expected a model of stills or of videos, got {type(plain).__name__}")
    is_video = isinstance(plain, FerForVideoClassification)
    if int8 and ("onnx" not in formats or is_video):
        raise ValueError("int8 weights are for models of stills in format onnx: leave out --int8")
    if "onnx" in formats:
        export_onnx.require_onnx()
    with fresh_folder(Path(out)) as folder, torch.no_grad():
        pixels = pixels_of(processor, faces)
        processor.save_pretrained(folder)
        agreements = write_stock(plain, pixels, folder) if "vit" in formats else []
        if "onnx" in formats:
            agreements += (
                write_video(plain, pixels, folder) if is_video else write_stills(plain, pixels, folder, int8)
            )
        if source is not None and (Path(source) / "README.md").is_file():
            card = export_card(Path(source), agreements, int8)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return agreements


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled, and renamed to it at the end; an error leaves nothing behind."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: delete it, or export to another folder")
    beside = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(out)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {out}: {error}; mend the cause (space, permissions), then export again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone after the rename


def pixels_of(processor: Any, faces: np.ndarray) -> torch.Tensor:
    """Faces as the model takes them, `(N, 3, S, S)`."""
    return processor(images=list(faces.transpose(0, 2, 3, 1)), return_tensors="pt")["pixel_values"]


def in_batches(compute: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What `compute` says of many faces, some at once; the last batch may be smaller."""
    return torch.cat([compute(part) for part in pixels.split(BATCH)])


def write_stock(model: Any, pixels: torch.Tensor, folder: Path) -> list[Agreement]:
    """Write the stock model, load it again as anyone would, and compare."""
    stock_vit(model).save_pretrained(folder)
    stock: Any = AutoModelForImageClassification.from_pretrained(folder).eval()
    found = in_batches(lambda part: stock(part).logits, pixels)
    agreement = Agreement.of("model.safetensors", in_batches(lambda part: model(part).logits, pixels), found)
    hold(agreement, agreement.logits <= STOCK_LOGITS, f"logits may differ by {STOCK_LOGITS:g}")
    return [agreement]


def write_stills(model: Any, pixels: torch.Tensor, folder: Path, int8: bool = False) -> list[Agreement]:
    """Write the graph of a model of stills, with `int8` a quantised one too, and compare."""
    file, small = "onnx/model.onnx", "onnx/model_quantized.onnx"
    export_onnx.export_stills(model, folder / file)
    expected = in_batches(lambda part: model(part).logits, pixels)
    agreements = [Agreement.of(file, expected, run_stills(folder / file, pixels))]
    hold_probabilities(agreements[0])
    if int8:
        export_onnx.quantize(folder / file, folder / small)
        agreements.append(Agreement.of(small, expected, run_stills(folder / small, pixels)))
        allowed = f"{INT8_LABELS:.0%} must keep their class; leave out --int8, or compare on more faces"
        hold(agreements[1], agreements[1].labels >= INT8_LABELS, allowed)
    names = {"id2label": model.config.id2label, "label2id": model.config.label2id}
    own = {**names, "image_size": model.config.image_size, "crop": model.config.crop}
    write_about(folder, {**model.config.encoder_config.to_dict(), **own})
    return agreements


def run_stills(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    """A graph's output of many faces."""
    session = export_onnx.open_graph(path)
    return in_batches(lambda part: export_onnx.run_graph(session, pixel_values=part), pixels)


def write_video(model: Any, pixels: torch.Tensor, folder: Path) -> list[Agreement]:
    """Write both graphs of a model of videos, and compare frame logits of videos made of the faces.

    The temporal graph takes the features of torch, then those of the other graph.
    """
    first, second = "onnx/features.onnx", "onnx/temporal.onnx"
    export_onnx.export_features(model, folder / first)
    export_onnx.export_temporal(model, folder / second)
    features = in_batches(lambda part: model.fer(part).pooler_output, pixels)
    session = export_onnx.open_graph(folder / second)
    agreements = []
    for name, given in (
        (second, features),
        (f"{first} and {second}", run_stills(folder / first, pixels)),
    ):
        expected, found = [], []
        for rows, mask, times in videos_of(len(features), model.config):
            timing = {"frame_mask": mask, "frame_times": times}
            expected.append(model(frame_features=features[rows], **timing).frame_logits[mask])
            found.append(export_onnx.run_graph(session, frame_features=given[rows], **timing)[mask])
        agreements.append(Agreement.of(name, torch.cat(expected), torch.cat(found)))
        hold_probabilities(agreements[-1])
    write_about(folder, model.config.to_dict())
    return agreements


def videos_of(faces: int, config: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches of videos made of `faces` faces: rows, mask, and times, each `(B, T)`.

    One frame; some; and more than the torch model attends over in one block, with every face there. One frame
    of five is absent; times are uneven and an hour in, where float32 would blur them.
    """
    rng = np.random.default_rng([faces, config.temporal_window])
    long = 3 * config.temporal_window + 17
    for frames in (1, 40, long):
        there = np.arange(frames) % 5 != 4
        videos = max(2, -(-faces // int(there.sum()))) if frames == long else 2
        mask = rng.permuted(np.tile(there, (videos, 1)), axis=1)
        rows = np.zeros(mask.shape, np.int64)
        rows[mask] = np.resize(rng.permutation(faces), int(mask.sum()))
        numbers = 3600 * config.frame_rate + rng.integers(1, 4, mask.shape).cumsum(axis=1)
        yield torch.from_numpy(rows), torch.from_numpy(mask), torch.from_numpy(numbers / config.frame_rate)


def hold_probabilities(agreement: Agreement) -> None:
    """Refuse a float32 graph whose probabilities are not torch's."""
    allowed = (
        f"probabilities may differ by {ONNX_PROBABILITIES:g}; see constraints.txt for versions that agree"
    )
    hold(agreement, agreement.probabilities <= ONNX_PROBABILITIES, allowed)


def hold(agreement: Agreement, good: bool, allowed: str) -> None:
    """Raise a ValueError with the numbers unless they are good (not-a-number is not)."""
    if not good:
        raise ValueError(f"the export does not agree with torch and is not kept. {agreement}; {allowed}")


def write_about(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration, without what names code or another folder; a stock model's stays."""
    if (folder / "config.json").exists():
        return
    unwanted = ("auto_map", "custom_pipelines", "architectures", "_name_or_path", "dtype")
    kept = {key: value for key, value in config.items() if key not in unwanted}
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n")


def export_card(source: Path, agreements: Sequence[Agreement], int8: bool) -> str:
    """The card of an export: terms and task of its model's card, what is in the folder, how to use it."""
    known = ModelCard.load(source / "README.md").data
    facts = read_json(source / FACTS) or {}
    base = facts.get("repo_id")
    page = base and f"https://huggingface.co/{base}"
    files = " ".join(one.file for one in agreements)
    kinds = {"vit": "model.safetensors", "stills": "onnx/model.onnx", "videos": "onnx/temporal.onnx"}
    held = [kind for kind, file in kinds.items() if file in files]
    metadata = ModelCardData(
        license=known.license,
        license_name=known.get("license_name"),
        license_link=page if known.get("license_link") == "README.md" else known.get("license_link"),
        library_name={"vit": "transformers", "stills": "transformers.js", "videos": "onnx"}[held[0]],
        pipeline_tag=known.get("pipeline_tag"),
        tags=["facial-expression-recognition", *(["onnx"] if "onnx/" in files else [])],
        base_model=base,
        base_model_relation=("quantized" if int8 else "finetune") if base else None,
    )
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=facts.get("name") or source.absolute().name,
        formats=" and ".join("stock ViT" if kind == "vit" else "ONNX" for kind in held),
        origin=f"[{base}]({page})" if base else "the folder that it was exported from",
        agreements="\n".join(f"- {one}" for one in agreements),
        licence=known.get("license_name") or known.license or "unknown",
        snippets="".join(SNIPPETS[kind] for kind in held),
    )
