"""
Makes transformers' Auto classes know RefTR. Both they and the model take seconds to import, so that each Auto class is
told when it is imported itself, not when this package is.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


AUTO = "transformers.models.auto"
# (module of an Auto class, our module, Auto class -> our class)
REGISTRATIONS = [
    ("configuration_auto", "configuration_reftr", {"AutoConfig": "RefTRConfig"}),
    (
        "modeling_auto",
        "modeling_reftr",
        {"AutoModel": "RefTRModel", "AutoModelForZeroShotObjectDetection": "RefTRForVisualGrounding"},
    ),
    ("image_processing_auto", "image_processing_reftr", {"AutoImageProcessor": "RefTRImageProcessor"}),
    ("processing_auto", "processing_reftr", {"AutoProcessor": "RefTRProcessor"}),
]


def register(auto_module: str, our_module: str, classes: dict[str, str]):
    """Tell the Auto classes of one module about our classes, which register themselves for their code to travel."""
    config_class = importlib.import_module(f"{__package__}.configuration_reftr").RefTRConfig
    for auto_name, our_name in classes.items():
        auto_class = getattr(sys.modules[f"{AUTO}.{auto_module}"], auto_name)
        our_class = getattr(sys.modules[f"{__package__}.{our_module}"], our_name)
        if auto_name == "AutoConfig":
            auto_class.register(config_class.model_type, our_class)
        elif auto_name == "AutoImageProcessor":
            auto_class.register(config_class, image_processor_classes={"torchvision": our_class})
        else:
            auto_class.register(config_class, our_class)


class RegisteringFinder(MetaPathFinder):
    """Finds the modules of `REGISTRATIONS` as Python does, and registers when both of a pair have been imported."""

    def __init__(self):
        self.pending = list(REGISTRATIONS)
        self.loading = set()

    def find_spec(self, name, path=None, target=None):
        """Python's own answer for the modules we wait for, so that their loading is noticed; None for all others."""
        pairs = [(f"{AUTO}.{auto}", f"{__package__}.{ours}") for auto, ours, _ in self.pending]
        if not any(name in pair for pair in pairs):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            self.loading.add(name)
            execute = spec.loader.exec_module

            def execute_and_register(module):
                try:
                    execute(module)
                finally:
                    self.loading.discard(name)
                self.register_imported()

            spec.loader.exec_module = execute_and_register
        return spec

    def register_imported(self):
        """Register each pair whose Auto class has been imported, unless either is still being imported."""
        for registration in list(self.pending):
            auto_module, our_module, _ = registration
            auto_name, our_name = f"{AUTO}.{auto_module}", f"{__package__}.{our_module}"
            if auto_name in sys.modules and not {auto_name, our_name} & self.loading:
                importlib.import_module(our_name)
                if registration in self.pending:  # importing it may have come here too
                    self.pending.remove(registration)
                    register(*registration)


def register_when_imported():
    """Register RefTR with each Auto class that is imported, now or later."""
    finder = RegisteringFinder()
    sys.meta_path.insert(0, finder)
    finder.register_imported()
