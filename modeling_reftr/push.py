"""Deprecated: use `reftr push`."""

from data_scripts.renamed_command import run_renamed


if __name__ == "__main__":
    run_renamed("python -m modeling_reftr.push", "push")
