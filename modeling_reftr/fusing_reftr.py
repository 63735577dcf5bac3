"""A copy of a model for inference, its batch norms folded into the convolutions before them."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def fused_copy(model: nn.Module) -> nn.Module:
    """
    Return a copy of a model with its batch norms folded, see [`RefTRPreTrainedModel.fused_copy`].

    Args:
        model (`nn.Module`): with a `base_model` that has a `backbone`, such as [`RefTRForVisualGrounding`].

    Raises:
        ValueError: if weights are offloaded.
    """
    num_offloaded = sum(parameter.is_meta for parameter in model.parameters())
    if num_offloaded:
        raise ValueError(
            f"{num_offloaded} of the model's parameters are offloaded, and a fused copy is made of weights in memory: "
            "load the model without device_map, call fused_copy(), and offload the copy."
        )
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    channels = copied.config.backbone_config.num_channels
    fold_batch_norms(
        copied.base_model.backbone, torch.zeros(1, channels, 64, 64, device=copied.device, dtype=copied.dtype)
    )
    copied.base_model.is_fused = copied.is_fused = True
    return copied


@torch.no_grad()
def fold_batch_norms(module: nn.Module, example: torch.Tensor):
    """
    Fold each batch norm that reads nothing but a convolution's output into that convolution, in place. What follows
    within a norm of timm, its activation, stays in its place.

    Args:
        module (`nn.Module`): in evaluation mode.
        example (`torch.Tensor` of shape `(1, channels, height, width)`):
            An input, which is sent through to see what reads what.
    """
    norms = {
        child: (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if getattr(child, "running_mean", None) is not None and getattr(child, "weight", None) is not None
    }
    with UseOfOutputs(module, norms) as use:
        module(example)
    for hook in use.hooks:
        hook.remove()
    for convolution, norm in use.pairs().items():
        weight, bias = folded_parameters(convolution, norm)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        after = [getattr(norm, step) for step in ("drop", "act") if hasattr(norm, step)]
        after = nn.Sequential(*(step for step in after if not isinstance(step, nn.Identity)))
        parent, name = norms[norm]
        setattr(parent, name, after.eval())


class UseOfOutputs(TorchFunctionMode):
    """
    Sees what reads the outputs of a module's convolutions.

    Args:
        module (`nn.Module`): with convolutions and norms in it, which get hooks, see `hooks`.
        norms: those that may read a convolution's output.
    """

    def __init__(self, module: nn.Module, norms):
        super().__init__()
        self.outputs = {}  # id -> convolution and its output, which is kept so that no other tensor gets its id
        self.norms, self.has_others, self.runs, self.running = {}, set(), Counter(), None
        self.hooks = []
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                self.hooks.append(child.register_forward_hook(self._after_convolution))
            elif child in norms:
                self.hooks.append(child.register_forward_pre_hook(self._before_norm))
                self.hooks.append(child.register_forward_hook(self._after_norm))

    def _after_convolution(self, convolution, inputs, output):
        self.runs[convolution] += 1
        self.outputs[id(output)] = (convolution, output)

    def _before_norm(self, norm, inputs):
        self.runs[norm] += 1
        self.running = norm

    def _after_norm(self, norm, inputs, output):
        self.running = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            convolution, _ = self.outputs.get(id(value), (None, None))
            if convolution is None:
                continue
            if self.running is None or self.norms.setdefault(convolution, self.running) is not self.running:
                self.has_others.add(convolution)
        return function(*args, **(kwargs or {}))

    def pairs(self) -> dict[nn.Conv2d, nn.Module]:
        """The norm of each convolution whose output that norm alone reads; both ran once."""
        return {
            convolution: norm
            for convolution, norm in self.norms.items()
            if convolution not in self.has_others and self.runs[convolution] == self.runs[norm] == 1
        }


@torch.no_grad()
def folded_parameters(convolution: nn.Conv2d, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, laid out channels last, and bias of a convolution that does a norm's work as well, made in float32."""
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    weight = convolution.weight.float() * scale[:, None, None, None]
    bias = -norm.running_mean.float() if convolution.bias is None else convolution.bias.float() - norm.running_mean
    bias = bias * scale + norm.bias.float()
    weight = weight.to(convolution.weight.dtype, memory_format=torch.channels_last)
    return weight, bias.to(convolution.weight.dtype)
