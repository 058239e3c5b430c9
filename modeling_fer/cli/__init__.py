"""The `fer` command: a thin face over the package's wings, one module a command.

A module is imported when its command is asked for: `fer --help` waits for none of them.
"""

import argparse
import sys
from importlib import import_module

from transformers.utils import logging

# Commands, each with a module of its name whose `add_arguments(parser)` is its grammar, and a line of help.
COMMANDS = {
    "data": "prepare data sets and look at them",
    "eval": "evaluate a model on a prepared data set",
    "calibrate": "fit a temperature and fold it into a model's weights",
    "submission": "challenge submissions",
    "card": "write the card of a model from its run's files",
    "push": "push a model folder to the Hub, in one commit",
    "export": "write a model as a stock ViT, or as ONNX graphs",
    "predict": "expression of faces in images and videos",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The grammar: of one command in full, of the others the names and a line each."""
    parser = argparse.ArgumentParser(prog="fer", description="Facial expression recognition.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in COMMANDS.items():
        one = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name == command:
            import_module(f"{__name__}.{name}").add_arguments(one)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; what the user can mend is told in one line."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(next((word for word in argv if word in COMMANDS), None)).parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"fer: {error}", file=sys.stderr)
        return 2
