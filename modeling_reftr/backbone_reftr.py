"""Find and freeze the stages of an image backbone."""

from torch import nn


STAGE_LISTS = ("stages", "layers", "layer", "blocks")  # what transformers calls the list of a backbone's stages


def find_stages(backbone: nn.Module) -> list[str]:
    """
    Return the names of a backbone's stages, in the order in which they run. What runs before the first is the stem.

    Args:
        backbone (`nn.Module`): a backbone of timm or of transformers, as `load_backbone` returns it.

    Returns:
        `list[str]`: for each stage the name of its last module within `backbone`; an empty list if the backbone does
        not say where its stages end.
    """
    if hasattr(backbone, "_backbone"):
        # timm counts the stem as a stage if it returns its features, whose stride is 2
        names = [stage["module"] for stage in backbone._backbone.feature_info.info if stage["reduction"] > 2]
        # timm flattens a network to return its features, and writes stages_0 for stages.0 then
        names = {*names, *(name.replace(".", "_") for name in names)}
        return [f"_backbone.{name}" for name, _ in backbone._backbone.named_modules() if name in names]
    for name, module in backbone.named_modules():
        *parents, last = name.split(".")
        # a list inside another list holds the blocks of one stage
        if isinstance(module, nn.ModuleList) and last in STAGE_LISTS and not any(map(str.isdigit, parents)):
            return [f"{name}.{index}" for index in range(len(module))]
    return []


def freeze_stages(backbone: nn.Module, num_stages: int) -> None:
    """
    Stop training a backbone's stem and its first stages.

    Args:
        backbone (`nn.Module`): see [`find_stages`].
        num_stages (`int`): number of stages to freeze behind the stem; 0 freezes nothing, not even the stem.

    Raises:
        ValueError: if fewer stages are found in the backbone.
    """
    if num_stages == 0:
        return
    stages = find_stages(backbone)
    if num_stages > len(stages):
        raise ValueError(
            f"num_frozen_backbone_stages={num_stages}, but {len(stages)} stages were found in the backbone "
            f"{type(backbone).__name__}; give a number up to that, 0 to train all of it."
        )
    # a backbone registers its modules in the order in which it uses them
    modules = list(backbone.named_modules())
    last_stage = stages[num_stages - 1]
    end = max(index for index, (name, _) in enumerate(modules) if f"{name}.".startswith(f"{last_stage}."))
    for _, module in modules[: end + 1]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
