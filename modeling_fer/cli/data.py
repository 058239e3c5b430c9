"""`fer data`: data sets prepared and looked at."""

import argparse
import dataclasses
from typing import Any

from transformers import HfArgumentParser

from modeling_fer.data.prepare import prepare
from modeling_fer.data.report import show
from modeling_fer.data.sources import SOURCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar; the flags of a source come from the fields of its options."""
    actions = parser.add_subparsers(dest="action", required=True)
    preparing = actions.add_parser(
        "prepare", help="write a data set as parquet, with a report of what is in it"
    )
    sources = preparing.add_subparsers(dest="source", required=True, parser_class=HfArgumentParser)
    for name, source in SOURCES.items():
        one: Any = sources.add_parser(
            name, dataclass_types=source.options, help=(source.options.__doc__ or "").split("\n")[0]
        )
        one.add_argument("--out", required=True, help="folder to write")
        one.add_argument(
            "--drop-duplicates",
            action="store_true",
            help="remove training images that are repeated or held out elsewhere",
        )
        one.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
        one.set_defaults(run=prepare_data)
    showing = actions.add_parser("show", help="print the report again")
    showing.add_argument("folder", help="folder written by `fer data prepare`")
    showing.set_defaults(run=show_data)


def prepare_data(args: argparse.Namespace) -> int:
    """Write a prepared data set and print its report."""
    source = SOURCES[args.source]
    options = source.options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(source.options)})
    prepare(args.source, options, args.out, args.drop_duplicates, args.overwrite)
    print(show(args.out))
    return 0


def show_data(args: argparse.Namespace) -> int:
    """Print the report of a prepared data set."""
    print(show(args.folder))
    return 0
