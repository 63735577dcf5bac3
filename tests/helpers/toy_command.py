"""Run the command `python -m data_scripts` with the toy source of layout_toy.py registered."""

import runpy

from tests.helpers import layout_toy  # noqa: F401


if __name__ == "__main__":
    runpy.run_module("data_scripts", run_name="__main__")
