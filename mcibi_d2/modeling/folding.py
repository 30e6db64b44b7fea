"""Batch norms folded into the convolutions before them, for models that are only evaluated."""

from collections import Counter
from collections.abc import Callable

import torch
from detectron2.layers import FrozenBatchNorm2d
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d as TimmFrozenBatchNorm2d

from ..errors import InputError

_NORMS = (_BatchNorm, FrozenBatchNorm2d, TimmFrozenBatchNorm2d, FrozenBatchNormAct2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, run: Callable[[], object]) -> int:
    """Put each batch norm that follows a convolution into its weights, in place.

    A batch norm with its running statistics is a factor and a summand for each channel, which the
    convolution can do as well. Which norm follows which convolution is not told by names or the
    order of modules, but seen in a forward pass: a pair is folded where the norm alone takes what
    the convolution gives, and takes nothing else. What a norm does beyond (timm's have an
    activation in them) stays.

    Names and values of the state dict are others afterwards, and the model refuses to be trained.

    Args:
        model: in evaluation mode.
        run: makes a forward pass of the model.

    Returns:
        The number of folded norms.
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, _NORMS) and not child.training:
                places.setdefault(child, []).append((parent, name))
    # A weight that several convolutions share cannot be that of each with its norm.
    owners: dict[Tensor, list[nn.Conv2d]] = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None:
            owners.setdefault(module.weight, []).append(module)

    seen = _Uses()
    inputs: dict[nn.Module, list[Tensor | None]] = {norm: [] for norm in places}
    handles = [
        norm.register_forward_pre_hook(lambda norm, args: inputs[norm].append(args[0]))
        for norm in places
    ]
    try:
        # In inference mode some operators would be seen as others.
        with torch.inference_mode(False), torch.no_grad(), seen:
            run()
    finally:
        for handle in handles:
            handle.remove()

    folded = 0
    for norm, given in inputs.items():
        weights = {seen.weight_of.get(x) for x in given}
        if len(weights) != 1 or weights == {None} or norm.running_mean is None:
            continue
        (weight,) = weights
        outputs = [x for x, of in seen.weight_of.items() if of is weight]
        if (
            len(owners.get(weight, ())) != 1
            or seen.count[weight] != len(outputs)
            or len(given) != len(outputs)
            or any(seen.count[x] != 1 for x in given)
        ):
            continue
        (conv,) = owners[weight]
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias,
        )  # fmt: skip
        for parent, name in places[norm]:
            setattr(parent, name, _without_norm(norm))
        folded += 1
    if folded:
        model.register_forward_pre_hook(_refuse_training)
    return folded


class _Uses(TorchDispatchMode):
    """Notes what convolutions give, and how often each tensor is an argument of an operator.

    Attributes:
        weight_of: of the result of each convolution, its weight.
        count: of each tensor that a convolution takes as weight or gives, its uses.
    """

    def __init__(self):
        super().__init__()
        self.weight_of: dict[Tensor, Tensor] = {}
        self.count: Counter[Tensor] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator."""
        kwargs = kwargs or {}
        self.count.update(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        result = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.convolution:
            self.weight_of[result] = args[1]
        return result


def _without_norm(norm: nn.Module) -> nn.Module:
    """What a norm does beyond its factor and summand."""
    more = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    if not more:
        return nn.Identity()
    return more[0] if len(more) == 1 else nn.Sequential(*more)


def _refuse_training(model: nn.Module, args: tuple) -> None:
    if model.training:
        raise InputError(
            "the batch norms of this model are folded into its convolutions, which is for "
            "evaluation, expected a model with TEST.FOLD_BATCH_NORM False in training"
        )
