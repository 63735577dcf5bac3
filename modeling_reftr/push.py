"""
Push a model to the Hub, with its processor, code, card, pictures and results in one commit; and a Space that asks it:

    reftr push --model runs/demo --repo someone/reftr-shapes --private
    reftr push --model runs/demo --repo someone/reftr-shapes --space someone/reftr-shapes-demo

A folder without a card gets one, made from what lies in it. A push that was broken off is done again by the same
command: what the Hub has already is not sent twice, and until its one commit is made the former one is served.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from data_scripts.uploading import reason_of, select_files, upload, write_contents
from modeling_reftr.demo import space_files
from modeling_reftr.escaping import for_terminal


# what of a model's folder goes to the Hub: no checkpoints, and nothing else that may lie there
PATTERNS = [
    "README.md",
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "*_reftr.py",
    "recipe.yaml",
    "origin.json",
    "metrics.json",
    "metrics.jsonl",
    "report.md",
    "predictions.jsonl",
    "predictions.png",
    "example.png",
    "visualizations/*/*",
    ".eval_results/*.yaml",
]
# without these it is no model that anybody can load
NEEDED = ["README.md", "config.json", "model*.safetensors", "processor_config.json", "tokenizer*", "modeling_reftr.py"]


def push_model(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    message: str = "Upload model",
    card: dict[str, bytes] | None = None,
) -> str:
    """
    Push a saved model.

    Args:
        folder (`str` or `Path`): with the model and its processor; `PATTERNS` are taken.
        repository (`str`): "user/name"; made where it is not there.
        private (`bool`, *optional*): whether a new repository is private.
        message (`str`, *optional*): of the commit.
        card (`dict[str, bytes]`, *optional*): the card's files, see `training_reftr.card.card_files`. They are part of
            the commit, and written into the folder once it is made. Absent: the card in the folder.

    Returns:
        `str`: the commit's id, for `from_pretrained(..., revision=...)`.

    Raises:
        OSError: if the folder lacks something, or the Hub does not take it; the folder stays as it was, and so does
            what the Hub had before.
    """
    card = card or {}
    files = {*select_files(Path(folder), PATTERNS), *card}
    missing = [pattern for pattern in NEEDED if not any(Path(name).match(pattern) for name in files)]
    if missing:
        raise OSError(f"{str(folder)!r} is no whole RefTR folder, it has no {', '.join(missing)}: nothing was pushed.")
    revision = upload(folder, repository, "model", private, PATTERNS, message, card).oid
    write_contents(folder, card)
    return revision


def push_space(repository: str, model: str, private: bool | None = None) -> str:
    """
    Push the Space that asks a model.

    Args:
        repository (`str`): "user/name" of the Space; made where it is not there.
        model (`str`): Hub id of the model.
        private (`bool`, *optional*): whether a new Space is private.

    Returns:
        `str`: the Space's address.

    Raises:
        OSError: if there is no such model on the Hub, the demo's files are not there, or the Hub does not take them.
    """
    try:
        HfApi().model_info(model)
    except Exception as error:  # the network, the server and the token each have exceptions of their own
        raise OSError(
            f"The Space {repository!r} was not pushed: its model {model!r} is not on the Hub, as far as can be seen "
            f"({reason_of(error)}). A folder is pushed with its Space: --model folder --repo user/name --space ..."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        for name, content in space_files(model).items():
            (Path(folder) / name).write_bytes(content)
        message = f"A page that asks {model}"
        commit = upload(folder, repository, "space", private, None, message, space_sdk="gradio")
    HfApi().add_space_variable(repository, "REFTR_MODEL", model)
    return str(commit.repo_url)


def main(argv: list[str] | None = None):
    """The command: where it was pushed, as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="reftr push", description="A model, and a Space that asks it, to the Hub.")
    parser.add_argument("--model", required=True, help="RefTR folder; with --space alone also a Hub id")
    parser.add_argument("--repo", help="user/name of the model on the Hub")
    parser.add_argument("--space", help="user/name of a Space that asks the model, on the Hub")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--message", default="Upload model", help="of the commit")
    args = parser.parse_args(argv)
    if not args.repo and not args.space:
        raise ValueError("Name where to push: --repo user/name for the model, --space user/name for a Space.")

    pushed = {}
    if args.repo:
        from training_reftr.card import card_files  # a card tells of a run, which knows the model

        card = card_files(args.model, args.repo)
        revision = push_model(args.model, args.repo, args.private or None, args.message, card)
        pushed |= {"repo": args.repo, "revision": revision}
    if args.space:
        pushed["space"] = push_space(args.space, args.repo or args.model, args.private or None)
    sys.stdout.write(json.dumps(pushed) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(for_terminal(f"error: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
