"""The Space's page for its tests: `demo/app.py`, which is no part of a package, and a tiny model to serve."""

import importlib.util
import shutil

import torch

from modeling_reftr import RefTRForVisualGrounding
from tests.helpers.tiny import ROOT


DEMO = ROOT / "demo"
EXPRESSIONS = ["the green circle", "the star"]


def import_app():
    """A module of its own for each caller."""
    spec = importlib.util.spec_from_file_location("space_app_module", DEMO / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_with_masks(trained, path):
    """A trained folder again, with a mask head, and random weights with which two expressions get two boxes."""
    shutil.copytree(trained, path)
    model = RefTRForVisualGrounding.from_pretrained(path, predict_masks=True)
    torch.manual_seed(9)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter.data.flatten(1))
    model.save_pretrained(path)
    return path
