"""Training arguments from a YAML file and the command line."""

import argparse
import dataclasses
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from modeling_fer.learning.arguments import FerTrainingArguments


def parse_arguments(argv: list[str] | None = None) -> FerTrainingArguments:
    """Read `--config FILE.yaml`, then `--field value` for any field, which wins over the file.

    Raises:
        ValueError: the file holds something other than known fields, or a value is out of range.
    """
    argv = _join_data(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(FerTrainingArguments, description="Train a facial-expression model.")  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file of the fields below; the command line wins over it")
    config_only = argparse.ArgumentParser(add_help=False)
    config_only.add_argument("--config")
    first, _ = config_only.parse_known_args(argv)
    if first.config:
        parser.set_defaults(**_read_config(Path(first.config)))
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    return FerTrainingArguments(**namespace)


def _join_data(argv: list[str]) -> list[str]:
    """Several `--data` as one, their values separated by commas."""
    kept, values = [], []
    words = iter(argv)
    for word in words:
        if word == "--data":
            values.append(next(words, ""))
        elif word.startswith("--data="):
            values.append(word.removeprefix("--data="))
        else:
            kept.append(word)
    return [*kept, "--data", ",".join(values)] if values else kept


def _read_config(path: Path) -> dict[str, str]:
    """Fields of a YAML file, without those left empty.

    As strings: argparse converts and checks them like the command line's (YAML reads 1e-3 as a string).
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    known = [f.name for f in dataclasses.fields(FerTrainingArguments)]
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of fields to values; known fields: {', '.join(known)}")
    if unknown := [str(name) for name in values if name not in known]:
        raise ValueError(
            f"{path} holds unknown fields {', '.join(unknown)}; known fields: {', '.join(known)}"
        )
    for name, value in values.items():
        if isinstance(value, (dict, list)):
            raise ValueError(f"{path}: {name} must be a single value, got {value}")
    return {name: str(value) for name, value in values.items() if value is not None}
