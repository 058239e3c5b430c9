"""The release of a model: which files of its folder go to the Hub, whether they load, the adapter's card."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_fer
from modeling_fer.hub import export_onnx, handler
from modeling_fer.hub.facts import EXAMPLE
from modeling_fer.hub.runs import FACTS

RECORDS = ("arguments.json", "calibration.json", "environment.json", "metrics.json")
# What a run keeps beside its model. A picture of one's own is an example: `example_NAME.png`.
RUN_FILES = (
    *RECORDS, "confusion_matrix.png", "learning_curve.png", "reliability.png", "reconstructions.png",
    "risk_coverage.png", "timeline_*.png",
)  # fmt: skip
# What of a model folder goes to the Hub. Nothing else does: no checkpoint, log, cache or hidden file.
MODEL_FILES = (
    "README.md", "LICENSE", "config.json", "model.safetensors", "preprocessor_config.json", "*_fer.py",
    "handler.py", "requirements.txt", "onnx/*.onnx", FACTS, *RUN_FILES, f"{EXAMPLE}*",
)  # fmt: skip
CARD = "README.md"
# What an Inference Endpoint needs beside a model whose code travels with it; it knows stock models. Older
# transformers would need torchvision, too.
REQUIREMENTS = b"transformers>=5.23\npillow>=11\nav>=14.2\n"
ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS, PROCESSOR = "model.safetensors", "preprocessor_config.json"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}

ADAPTER_CARD = """---
{metadata}
---

# Adapter of {repo_id}

LoRA weights, pooling norm and heads; [{repo_id}](https://huggingface.co/{repo_id}) is the same model with
them merged, and needs no peft. Here they are put on the base that they were trained on:

```python
from peft import PeftModel
from modeling_fer import FerConfig, {architecture}

config = FerConfig.from_pretrained("{repo_id}"{revision})
options = {{name: getattr(config, name) for name in {options}}}
base = {architecture}.from_encoder_pretrained("{base}", **options)
model = PeftModel.from_pretrained(base, "{place}"{where}).eval()
```
"""
OPTIONS = ("image_size", "pooling", "id2label", "crop")
VIDEO_OPTIONS = (
    "temporal_head", "temporal_hidden_size", "temporal_num_layers", "temporal_num_heads", "temporal_window",
    "temporal_causal", "frame_rate", "num_frames", "postprocess",
)  # fmt: skip


def listed(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder that match, by their path in it; hidden ones do not."""
    found = {p.relative_to(folder).as_posix(): p for pattern in patterns for p in folder.glob(pattern)}
    return {name: p for name, p in sorted(found.items()) if p.is_file() and not p.name.startswith(".")}


def released_files(folder: Path) -> dict[str, Path]:
    """Files that a push of a model folder uploads, by their path in the repository; not the adapter's.

    The folder `model` of a run brings the run's records and pictures, where it has none itself; once `fer
    card` was there, it has all that the card is made of. Records go up as `facts.public` makes them.
    """
    run = folder.absolute().parent
    is_of_run = folder.absolute().name == "model" and (run / "arguments.json").is_file()
    is_of_run = is_of_run and not (folder / FACTS).is_file()
    return {**(listed(run, RUN_FILES) if is_of_run else {}), **listed(folder, MODEL_FILES)}


def is_outdated(name: str) -> bool:
    """Whether a push may have written a file of a repository, or it would be loaded with what is pushed."""
    patterns = (*MODEL_FILES, "*.safetensors", "*.safetensors.index.json", "adapter_config.json")
    return name.startswith(f"{ADAPTER}/") or any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns
    )


def endpoint_files(folder: Path) -> dict[str, Path | bytes]:
    """What Inference Endpoints run, by its path in the repository; nothing for a stock model."""
    if not json.loads((folder / "config.json").read_text()).get("custom_pipelines"):
        return {}
    return {"handler.py": Path(handler.__file__), "requirements.txt": REQUIREMENTS}


def check_model(folder: Path) -> None:
    """Load a model folder as its users will: weights, ONNX graphs, or both.

    Raises:
        FileNotFoundError: no configuration, no weights or no image processor.
        ValueError: a pickle, an adapter's configuration beside merged weights, weights that are missing,
            damaged or of another model, a damaged graph, or shipped code that is not whole.
    """
    graphs = sorted(folder.glob("onnx/*.onnx"))
    for name in ("config.json", *([] if graphs else [WEIGHTS])):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}: pass the model folder of a run (RUN/model), or an export of it"
            )
    if not (folder / PROCESSOR).is_file():
        raise FileNotFoundError(
            f"{folder} has no {PROCESSOR}, so that nobody knows how to prepare images: write it there with "
            "save_pretrained of the image processor"
        )
    if pickles := sorted(p for p in folder.rglob("*") if p.suffix in PICKLES):
        raise ValueError(f"{pickles[0]} may run code when it is loaded: delete it, weights are safetensors")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder}/adapter_config.json would make Auto classes load the adapter onto merged weights: "
            f"move it and its weights to {folder / ADAPTER}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        for graph in graphs if export_onnx.importable("onnxruntime") else ():
            export_onnx.check_graph(graph)
        if not (folder / WEIGHTS).is_file():
            return
        architecture = (config.architectures or ["none"])[0]
        model_class: Any = getattr(modeling_fer, architecture, None) or getattr(
            transformers, architecture, None
        )
        if model_class is None:
            raise ValueError(f"config.json names an unknown architecture, {architecture}")
        _, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"model.safetensors lacks {', '.join(sorted(info['missing_keys'])[:5])}")
        auto_map: dict[str, str] = getattr(config, "auto_map", None) or {}
        if config.model_type == modeling_fer.FerConfig.model_type and not auto_map:
            raise ValueError("config.json has no auto_map, so that it loads with this package only")
        for module in {value.split(".")[0] for value in auto_map.values()}:
            code = folder / f"{module}.py"
            for file in (str(code), *get_relative_import_files(code)):
                if not Path(file).is_file():
                    raise FileNotFoundError(f"the shipped code lacks {Path(file).name}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} does not load, so it is not pushed: {error}; save it again with save_pretrained"
        ) from error


def adapter_base(folder: Path, files: Mapping[str, Path], base_model: str | None) -> str:
    """Name of the model that an adapter belongs on: as passed, or as the adapter or its run recorded it.

    Raises:
        ValueError: it is not known, or is a folder, which nobody else has.
    """
    recorded = json.loads((folder / ADAPTER / "adapter_config.json").read_text()).get(
        "base_model_name_or_path"
    )
    if not recorded and "arguments.json" in files:
        recorded = json.loads(files["arguments.json"].read_text()).get("encoder")
    base = base_model or recorded
    if not base or Path(base).exists() or len(Path(base).parts) > 2:
        found = f"is the folder {base}, which nobody else has" if base else "is not recorded"
        raise ValueError(
            f"the base of {folder / ADAPTER} {found}: push it, then name it with --base-model org/name, or "
            "leave the adapter out with --no-adapter"
        )
    return base


def adapter_files(
    folder: Path, base: str, repo_id: str, adapter_repo: str | None, revision: str | None
) -> dict[str, Path | bytes]:
    """The adapter's files by their name: weights, a configuration that names the base, and a small card.

    Raises:
        FileNotFoundError: it has no weights.
        ValueError: the weights are damaged.
    """
    source = folder / ADAPTER
    for name in ADAPTER_FILES:
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}: save the adapter again, or pass --no-adapter")
    weights = source / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}; save the adapter again") from error
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    known = ModelCard.load(folder / "README.md").data if (folder / "README.md").is_file() else ModelCardData()
    metadata = ModelCardData(
        license=known.license,
        library_name="peft",
        base_model=base,
        base_model_relation="adapter",
        tags=["lora", "facial-expression-recognition"],
    )
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    at = f', revision="{revision}"' if revision else ""
    card = ADAPTER_CARD.format(
        metadata=metadata.to_yaml(),
        repo_id=repo_id,
        base=base,
        architecture=architecture,
        options=OPTIONS + (VIDEO_OPTIONS if "Video" in architecture else ()),
        revision=at,
        place=adapter_repo or repo_id,
        where=at + ("" if adapter_repo else f', subfolder="{ADAPTER}"'),
    )
    configuration = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        "README.md": card.encode(),
        "adapter_config.json": configuration.encode(),
        "adapter_model.safetensors": weights,
    }
