"""
Makes transformers' Auto classes and `pipeline` know RefTR. Both they and the model take seconds to import, so that
each is told when it is imported itself, not when this package is.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


AUTO = "transformers.models.auto"
# (module of the library, our module, what is told there -> our class)
REGISTRATIONS = [
    (f"{AUTO}.configuration_auto", "configuration_reftr", {"AutoConfig": "RefTRConfig"}),
    (
        f"{AUTO}.modeling_auto",
        "modeling_reftr",
        {"AutoModel": "RefTRModel", "AutoModelForZeroShotObjectDetection": "RefTRForVisualGrounding"},
    ),
    (f"{AUTO}.image_processing_auto", "image_processing_reftr", {"AutoImageProcessor": "RefTRImageProcessor"}),
    (f"{AUTO}.processing_auto", "processing_reftr", {"AutoProcessor": "RefTRProcessor"}),
    ("transformers.pipelines", "pipeline_reftr", {"PIPELINE_REGISTRY": "VisualGroundingPipeline"}),
]


def register(library_module: str, our_module: str, classes: dict[str, str]):
    """Tell what there is in one module about our classes, which register themselves for their code to travel."""
    configuration = importlib.import_module(f"{__package__}.configuration_reftr")
    config_class = configuration.RefTRConfig
    for auto_name, our_name in classes.items():
        auto_class = getattr(sys.modules[library_module], auto_name)
        our_class = getattr(sys.modules[f"{__package__}.{our_module}"], our_name)
        if auto_name == "AutoConfig":
            auto_class.register(config_class.model_type, our_class)
        elif auto_name == "AutoImageProcessor":
            auto_class.register(config_class, image_processor_classes={"torchvision": our_class})
        elif auto_name == "PIPELINE_REGISTRY":
            modeling_auto = importlib.import_module(f"{AUTO}.modeling_auto")
            for task, entry in configuration.CUSTOM_PIPELINES.items():
                models = tuple(getattr(modeling_auto, name) for name in entry["pt"])
                auto_class.register_pipeline(task, our_class, pt_model=models, type=entry["type"])
        else:
            auto_class.register(config_class, our_class)


class RegisteringFinder(MetaPathFinder):
    """Finds the modules of `REGISTRATIONS` as Python does, and registers when both of a pair have been imported."""

    def __init__(self):
        self.pending = list(REGISTRATIONS)
        self.loading = set()

    def find_spec(self, name, path=None, target=None):
        """Python's own answer for the modules we wait for, so that their loading is noticed; None for all others."""
        pairs = [(library, f"{__package__}.{ours}") for library, ours, _ in self.pending]
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
            library_module, our_module, _ = registration
            our_name = f"{__package__}.{our_module}"
            if library_module in sys.modules and not {library_module, our_name} & self.loading:
                importlib.import_module(our_name)
                if registration in self.pending:  # importing it may have come here too
                    self.pending.remove(registration)
                    register(*registration)


def register_when_imported():
    """Register RefTR with each Auto class, and with `pipeline`, where they are imported, now or later."""
    finder = RegisteringFinder()
    sys.meta_path.insert(0, finder)
    finder.register_imported()
