"""`fer card`: the card of a model."""

import argparse

from modeling_fer.hub.card import write_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.add_argument("folder", help="run folder, or model folder")
    parser.add_argument("--repo", help="org/name on the Hub, for the snippets")
    parser.add_argument(
        "--eval", nargs="+", default=[], help="folders of `fer eval` (default: the run's own)"
    )
    parser.add_argument("--example", nargs="+", default=[], help="images for the Hub's widget")
    parser.add_argument("--licence", help="of the weights (default: what the training data leave)")
    parser.set_defaults(run=card)


def card(args: argparse.Namespace) -> int:
    """Write the model card of a run."""
    print(f"written: {write_card(args.folder, args.repo, args.eval, args.example, args.licence)}")
    return 0
