"""Batch norms folded into the convolutions before them, for inference, and taken out again."""

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass
class FoldedNorm:
    """
    A batch norm that a convolution does the work of.

    Args:
        convolution (`nn.Conv2d`): holds both.
        weight, bias (`nn.Parameter`): the convolution's own; bias may be None.
        parent (`nn.Module`), name (`str`): where the norm stood.
        norm (`nn.Module`): itself.
    """

    convolution: nn.Conv2d
    weight: nn.Parameter
    bias: nn.Parameter | None
    parent: nn.Module
    name: str
    norm: nn.Module


def fold_batch_norms(module: nn.Module, example: torch.Tensor) -> list[FoldedNorm]:
    """
    Fold each batch norm that reads nothing but a convolution's output into that convolution. What follows within a
    norm of timm, its activation, stays in its place.

    Args:
        module (`nn.Module`): in evaluation mode.
        example (`torch.Tensor` of shape `(1, channels, height, width)`):
            An input, which is sent through to see what reads what.

    Returns:
        `list[FoldedNorm]`, for `restore_batch_norms`.
    """
    norms = {
        child: (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if getattr(child, "running_mean", None) is not None and getattr(child, "weight", None) is not None
    }
    folded = []
    for convolution, norm in convolutions_before(norms, module, example).items():
        parent, name = norms[norm]
        folded.append(FoldedNorm(convolution, convolution.weight, convolution.bias, parent, name, norm))
        weight, bias = folded_parameters(convolution, norm)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        after = [getattr(norm, step) for step in ("drop", "act") if hasattr(norm, step)]
        setattr(parent, name, nn.Sequential(*(step for step in after if not isinstance(step, nn.Identity))))
    return folded


def fused_copy(model: nn.Module) -> nn.Module:
    """
    Return a copy of a model that is fused and in evaluation mode; the model itself, which may be training or answering
    in another thread, is not touched. The copy has weights of its own and is not compiled.

    Args:
        model (`nn.Module`): with a method `fuse`, such as [`RefTRForVisualGrounding`].
    """
    return copy.deepcopy(model).eval().fuse()


def unfolded_state_dict(
    state: dict[str, torch.Tensor], folded: list[FoldedNorm], module: nn.Module, prefix: str, keep_vars: bool
):
    """
    Put weights and batch norms into a state dict as they were before they were folded; no module is changed.

    Args:
        state (`dict[str, torch.Tensor]`): of `module`, changed in place.
        folded (`list[FoldedNorm]`): of `fold_batch_norms`.
        module (`nn.Module`): that the convolutions are part of.
        prefix (`str`): of the names of `module` in `state`.
        keep_vars (`bool`): whether values stay parameters, as `nn.Module.state_dict` has it.
    """
    names = {child: f"{prefix}{name}" for name, child in module.named_modules()}
    for entry in folded:
        convolution, norm = names[entry.convolution], f"{names[entry.parent]}.{entry.name}"
        like = entry.convolution.weight
        for key in [key for key in state if key.startswith(f"{norm}.")]:  # of what stands in the norm's place
            del state[key]
        del state[f"{convolution}.bias"]
        unfolded = {f"{convolution}.weight": entry.weight, f"{convolution}.bias": entry.bias}
        unfolded |= entry.norm.state_dict(prefix=f"{norm}.", keep_vars=keep_vars)
        for key, value in unfolded.items():
            if value is not None:
                value = value if keep_vars else value.detach()
                state[key] = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)


def restore_batch_norms(folded: list[FoldedNorm]):
    """Undo `fold_batch_norms` to the last bit; on the device and in the data type where the module is by now."""
    for entry in folded:
        weight = entry.convolution.weight
        entry.norm.to(weight.device, weight.dtype)
        for parameter in (entry.weight, entry.bias):
            if parameter is not None:
                parameter.data = parameter.data.to(weight.device, weight.dtype)
        entry.convolution.weight, entry.convolution.bias = entry.weight, entry.bias
        setattr(entry.parent, entry.name, entry.norm)


class UseOfOutputs(TorchFunctionMode):
    """
    Sees what reads the outputs of a module's convolutions.

    Args:
        module (`nn.Module`): with convolutions and norms in it; it keeps the hooks that look at them.
        norms: those that may read a convolution's output.
    """

    def __init__(self, module: nn.Module, norms):
        super().__init__()
        self.outputs = {}  # id -> convolution and its output, which is kept so that no other tensor gets its id
        self.norms, self.has_others, self.runs, self.running = {}, set(), Counter(), None
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                child.register_forward_hook(self._after_convolution)
            elif child in norms:
                child.register_forward_pre_hook(self._before_norm)
                child.register_forward_hook(self._after_norm)

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
def convolutions_before(norms, module: nn.Module, example: torch.Tensor) -> dict[nn.Conv2d, nn.Module]:
    """
    Return the norm of each convolution whose output nothing else reads, found by sending `example` through a copy of
    `module`: hooks on the module itself would see what other threads send through it.
    """
    # the copy shares all weights
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    traced = copy.deepcopy(module, shared)
    original = dict(zip(traced.modules(), module.modules(), strict=True))
    with UseOfOutputs(traced, {child for child in traced.modules() if original[child] in norms}) as use:
        traced(example)
    return {original[convolution]: original[norm] for convolution, norm in use.pairs().items()}


@torch.no_grad()
def folded_parameters(convolution: nn.Conv2d, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, laid out channels last, and bias of a convolution that does a norm's work as well, made in float32."""
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    weight = convolution.weight.float() * scale[:, None, None, None]
    bias = -norm.running_mean.float() if convolution.bias is None else convolution.bias.float() - norm.running_mean
    bias = bias * scale + norm.bias.float()
    weight = weight.to(convolution.weight.dtype, memory_format=torch.channels_last)
    return weight, bias.to(convolution.weight.dtype)
