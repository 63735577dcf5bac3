"""Deprecated: use `reftr reproduce`."""

from data_scripts.renamed_command import run_renamed


if __name__ == "__main__":
    run_renamed("python -m training_reftr.reproduce", "reproduce")
