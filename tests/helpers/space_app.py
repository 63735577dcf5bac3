"""Import the Space's app, `demo/app.py`, which does not belong to a package, and make a tiny model to serve."""

import importlib.util
import shutil

import torch

from modeling_reftr import RefTRForVisualGrounding
from tests.helpers.tiny import ROOT


DEMO = ROOT / "demo"
EXPRESSIONS = ["the green circle", "the star"]


def import_app():
    """Import a new copy of the app's module."""
    spec = importlib.util.spec_from_file_location("space_app_module", DEMO / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_with_masks(trained, path):
    """Copy a model folder, with a mask head and random weights that give different boxes for different expressions."""
    shutil.copytree(trained, path)
    model = RefTRForVisualGrounding.from_pretrained(path, predict_masks=True)
    torch.manual_seed(9)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.xavier_normal_(parameter.data.flatten(1))
    model.save_pretrained(path)
    return path
