"""`fer push`: a model folder on the Hub."""

import argparse

from modeling_fer.hub.push import push, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.description = (
        "Push a model folder to the Hub, in one commit: weights or ONNX graphs, code, card, records and "
        "pictures of its run, files named example_*. What an earlier push wrote there and this one does not, "
        "is deleted; all else stays."
    )
    parser.add_argument("folder", help="model folder (RUN/model), or an export of it; it must have a card")
    parser.add_argument("repo", help="org/name")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="branch, made if it is not there (default: main)")
    parser.add_argument("--adapter-repo", help="own repository of the LoRA adapter (default: its folder)")
    parser.add_argument("--base-model", help="Hub id of what the adapter was trained on")
    parser.add_argument("--no-adapter", action="store_true", help="leave the adapter out")
    parser.add_argument(
        "--no-card",
        action="store_true",
        help="leave the card (README.md) out, as for an encoder, which `fer card` writes none for; one that "
        "is on the Hub stays there as it is",
    )
    parser.set_defaults(run=push_model)


def push_model(args: argparse.Namespace) -> int:
    """Push a model folder to the Hub."""
    options = {
        "adapter_repo": args.adapter_repo,
        "base_model": args.base_model,
        "adapter": not args.no_adapter,
        "card": not args.no_card,
    }
    print(summary(push(args.folder, args.repo, args.private, args.revision, **options)))
    return 0
