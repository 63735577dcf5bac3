"""Refuse missing models before torch is imported, which takes seconds. Nothing here is a collective."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from training_reftr.settings import TrainingSettings


# settings that name a folder or a Hub id -> what is there
SOURCES = {"init_from": "RefTR", "init_text": "text model", "tokenizer": "tokenizer"}
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")


@functools.cache
def locating_module() -> ModuleType:
    """Import `modeling_reftr.locating_reftr` by its path, as importing its package imports torch."""
    package = importlib.util.find_spec("modeling_reftr")
    path = Path(package.submodule_search_locations[0], "locating_reftr.py")
    spec = importlib.util.spec_from_file_location("locating_reftr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_model(name: str | Path | None) -> None:
    """
    Refuse a model that is neither a folder nor on the Hub, see `modeling_reftr.locating_reftr.check_source`.

    Raises:
        OSError: if it is missing.
    """
    locating_module().check_source(name)


def check_sources(settings: TrainingSettings) -> None:
    """
    Refuse a run whose model, text model or tokenizer is missing.

    Raises:
        OSError: naming the first that is missing.
    """
    if settings.evaluation.eval_only and settings.initialization.init_from is None:
        check_model(Path(settings.checkpoints.output_dir))
    elif settings.checkpoints.resume is None:  # otherwise the model may be that of a checkpoint
        for setting, what in SOURCES.items():
            name = getattr(settings.initialization, setting)
            if name is not None and Path(name).suffix not in WEIGHT_FILES:
                locating_module().check_source(name, what=what)
