"""Train or evaluate with a recipe, in one process; `accelerate launch train_reftr.py` runs several."""

from training_reftr.arguments import parse_arguments
from training_reftr.locating import check_sources
from training_reftr.recipes import with_recipe


def main(argv: list[str] | None = None) -> int:
    """Parse the settings, then import and run the training script."""
    argv = with_recipe(argv or [])
    check_sources(parse_arguments(argv))  # an invalid command line fails before torch is imported

    import train_reftr

    return train_reftr.main(argv)
