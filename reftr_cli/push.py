"""
Push a model to the Hub, with its processor, code, card, images and results in one commit; and a Space that runs it:

    reftr push --model runs/demo --repo someone/reftr-shapes --private
    reftr push --model runs/demo --repo someone/reftr-shapes --space someone/reftr-shapes-demo

A folder without a card gets one, written from the files in it. The same command repeats a push that was interrupted:
files that the Hub already has are not sent again, and it serves the former commit until the new one is complete.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from training_reftr.locating import check_model


def push_space(repository: str, model: str, private: bool | None = None) -> str:
    """
    Push a Space that runs a model.

    Args:
        repository (`str`): "user/name" of the Space, created if it does not exist.
        model (`str`): Hub id of the model.
        private (`bool`, *optional*): whether a new Space is private.

    Returns:
        `str`: the URL of the Space.

    Raises:
        OSError: if the model is not on the Hub, or the Hub refuses the Space.
    """
    from huggingface_hub import HfApi

    from reftr_cli.demo import space_files
    from training_reftr.hub import reason_of, upload

    try:
        HfApi().model_info(model)
    except Exception as error:  # the network, the server and the token each have exceptions of their own
        raise OSError(
            f"The Space {repository!r} was not pushed because its model {model!r} was not found on the Hub "
            f"({reason_of(error)}). To push a folder with its Space: --model folder --repo user/name --space ..."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        for name, content in space_files(model).items():
            (Path(folder) / name).write_bytes(content)
        message = f"Run {model}"
        commit = upload(folder, repository, "space", private, None, message, space_sdk="gradio")
    HfApi().add_space_variable(repository, "REFTR_MODEL", model)
    return str(commit.repo_url)


def main(argv: list[str] | None = None) -> None:
    """Print the repositories pushed to as JSON."""
    parser = argparse.ArgumentParser(
        prog="reftr push", description="Push a model, and a Space that runs it, to the Hub."
    )
    parser.add_argument("--model", required=True, help="RefTR folder; with --space alone also a Hub id")
    parser.add_argument("--repo", help="user/name of the model on the Hub")
    parser.add_argument("--space", help="user/name of a Space that runs the model")
    parser.add_argument("--private", action="store_true", help="create new repositories as private")
    parser.add_argument("--message", default="Upload model", help="commit message")
    args = parser.parse_args(argv)
    if not args.repo and not args.space:
        raise ValueError("A repository is required: --repo user/name for the model, --space user/name for a Space.")

    check_model(args.model)

    pushed = {}
    if args.repo:
        from training_reftr.card import card_files
        from training_reftr.publishing import push_model

        card = card_files(args.model, args.repo)
        revision = push_model(args.model, args.repo, args.private or None, args.message, card)
        pushed |= {"repo": args.repo, "revision": revision}
    if args.space:
        pushed["space"] = push_space(args.space, args.repo or args.model, args.private or None)
    sys.stdout.write(json.dumps(pushed) + "\n")
