"""`fer push`: a model folder on the Hub."""

import argparse

from modeling_fer.hub.push import push, summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grammar."""
    parser.add_argument("folder", help="model folder (RUN/model)")
    parser.add_argument("repo", help="org/name")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", help="branch, made if it is not there (default: main)")
    parser.add_argument("--adapter-repo", help="own repository of the LoRA adapter (default: its folder)")
    parser.add_argument("--base-model", help="Hub id of what the adapter was trained on")
    parser.add_argument("--no-adapter", action="store_true", help="leave the adapter out")
    parser.set_defaults(run=push_model)


def push_model(args: argparse.Namespace) -> int:
    """Push a model folder to the Hub."""
    options = {
        "adapter_repo": args.adapter_repo,
        "base_model": args.base_model,
        "adapter": not args.no_adapter,
    }
    print(summary(push(args.folder, args.repo, args.private, args.revision, **options)))
    return 0
