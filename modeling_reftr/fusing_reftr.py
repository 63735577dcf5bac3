"""Fold the batch norms of an image backbone into its convolutions, in a copy of a model for inference."""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.utils import logging


logger = logging.get_logger(__name__)

TRACE_LOCK = threading.Lock()


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
            f"{num_offloaded} parameters of the model are offloaded, but `fused_copy` requires weights in memory: "
            "load the model without `device_map`, call fused_copy(), and offload the copy."
        )
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(copied.base_model.backbone)
    copied.base_model.is_fused = copied.is_fused = True
    return copied


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """
    Fold each batch norm that is the only reader of a convolution's output into that convolution, in place. The
    activation inside a batch norm of timm stays where the norm was. Batch norms in a part that torch.fx cannot trace
    are left as they are.

    Args:
        module (`nn.Module`): a module in evaluation mode.
    """
    pairs = find_foldable_pairs(module)
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            if norm in pairs:
                fold_batch_norm(pairs[norm], norm)
                setattr(parent, name, steps_after_normalization(norm))
    num_left = sum(is_batch_norm(child) for child in module.modules())
    if num_left:
        logger.warning_once(
            f"{num_left} batch norms of {type(module).__name__} were not folded: torch.fx found no convolution whose "
            "output they alone read. The answers are the same; inference is slower than it could be."
        )


class ConvolutionTracer(fx.Tracer):
    """
    Trace how convolutions and batch norms are connected. Modules without any of them inside are single nodes, so that
    control flow that depends on shapes, as in paddings and poolings of timm, does not stop the tracing.
    """

    def call_module(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a module. torch.fx intercepts all modules of the process; others' calls just run."""
        return (
            super().call_module(module, forward, args, kwargs) if module in self.traced else forward(*args, **kwargs)
        )

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module. One thread at a time, for torch.fx replaces `nn.Module.__call__` meanwhile."""
        self.traced = set(root.modules())
        with TRACE_LOCK:
            return super().trace(root, concrete_args)

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node of the graph."""
        is_traced = any(isinstance(child, nn.Conv2d) or is_batch_norm(child) for child in module.modules())
        return isinstance(module, nn.Conv2d) or is_batch_norm(module) or not is_traced


def find_foldable_pairs(module: nn.Module) -> dict[nn.Module, nn.Conv2d]:
    """Return the convolution of each batch norm that can be folded. A module that torch.fx cannot trace is searched
    child by child."""
    if not any(is_batch_norm(child) for child in module.modules()):
        return {}
    try:
        graph = ConvolutionTracer().trace(module)
    except Exception as error:  # a module that is not traceable can fail in any way
        logger.debug(f"torch.fx cannot trace {type(module).__name__}: {error}")
        return {norm: conv for child in module.children() for norm, conv in find_foldable_pairs(child).items()}
    calls = [(node, module.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"]
    num_calls = Counter(child for _, child in calls)
    called = dict(calls)
    pairs = {}
    for node, norm in calls:
        reads = node.all_input_nodes
        convolution = called.get(reads[0]) if len(reads) == 1 else None
        if not is_batch_norm(norm) or not isinstance(convolution, nn.Conv2d):
            continue
        is_only_reader = len(reads[0].users) == 1 and num_calls[convolution] == num_calls[norm] == 1
        if is_only_reader and not has_hooks(convolution) and not has_hooks(norm):
            pairs[norm] = convolution
    return pairs


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes by running statistics and has affine parameters, frozen or not."""
    return getattr(module, "running_mean", None) is not None and getattr(module, "weight", None) is not None


def has_hooks(module: nn.Module) -> bool:
    """Return whether forward hooks read the inputs or outputs of a module, which the graph does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fold_batch_norm(convolution: nn.Conv2d, norm: nn.Module) -> None:
    """Give a convolution the weight (channels last) and bias that do the work of the batch norm behind it as well."""
    dtype, bias = convolution.weight.dtype, convolution.bias
    # float32 whatever the dtype of the model, so that half precision rounds once
    weight, bias = fuse_conv_bn_weights(
        convolution.weight.float(),
        None if bias is None else bias.float(),
        norm.running_mean.float(),
        norm.running_var.float(),
        norm.eps,
        norm.weight.float(),
        norm.bias.float(),
    )
    weight = weight.detach().to(dtype, memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)


def steps_after_normalization(norm: nn.Module) -> nn.Sequential:
    """Return what a batch norm of timm does after it normalizes: its dropout and activation; nothing for others."""
    steps = [getattr(norm, step) for step in ("drop", "act") if hasattr(norm, step)]
    return nn.Sequential(*(step for step in steps if not isinstance(step, nn.Identity))).eval()
