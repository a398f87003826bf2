"""A copy of a dynamic network that makes the same decisions in less time."""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import families
from .counting import duplicate, on_meta
from .gates import RNN_SIZE, Memory, RecurrentGates, SettledGates, pooled
from .units import Slices, intercepted


def optimize_for_inference(model: Any) -> Any:
    """A copy for eval: batch norms folded into convolutions, channels-last, the RNN gate as two matrix products.

    The transitions of a DenseNet pool before they multiply. Weights sliced for a channel gate's pattern are remembered.

    It makes the decisions of the model it was made from and reports that model's MACs. It cannot be trained. A stock
    model is folded too, so that both can be timed at their best.

    Args:
        model: a dynamic or stock ResNet or DenseNet; it is not changed.

    Returns:
        The copy, in eval mode, on the same device. Logits agree with the model's to rounding.

    Raises:
        ValueError: if the model is of another kind.
    """
    with torch.inference_mode(False):
        return _optimized(model)


def _optimized(model: Any) -> Any:
    fast: Any = _settle_weights(duplicate(model)).eval().requires_grad_(False)
    if hasattr(fast, "dynamic"):
        fast.dynamic.origin, fast.dynamic.slices = fast.dynamic.origin or on_meta(model), Slices()
    for unit in families.units(fast):
        _fold_unit(unit)
        if hasattr(fast, "dynamic") and unit.kind.branch is None:
            _drop_identities(unit)
    _fold_root(fast)
    for module in list(fast.modules()):
        if isinstance(module, nn.Sequential):
            _fold_sequence(module)
            _pool_first(module)
    if isinstance(getattr(fast, "layer_gates", None), RecurrentGates):
        fast.layer_gates = FoldedRecurrentGates(fast.layer_gates)
    return fast.to(memory_format=torch.channels_last)


def _settle_weights(model: nn.Module) -> nn.Module:
    """Make plain parameters of weights that are computed: by `torch.nn.utils.prune`, or by parametrizations."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            names = list(cast(nn.ModuleDict, module.parametrizations))
            values = {name: getattr(module, name).detach().clone() for name in names}
            del module.parametrizations
            module.__class__ = type(module).__bases__[0]  # torch's way would change the class that both copies share
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value))
        pruned = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        for hook in pruned:
            prune.remove(module, hook._tensor_name)
    return model


class FoldedRecurrentGates(SettledGates):
    """`RecurrentGates` in eval with projection and input weights folded into one matrix for each input width."""

    CARRIES = True

    def __init__(self, gates: RecurrentGates) -> None:
        super().__init__()
        self.settle(gates.config, gates.gated)
        self.keys = list(gates.keys)
        self.threshold: Tensor = nn.Buffer(gates.threshold.clone())
        cell, matrices, offsets = gates.cell, {}, {}
        for key in dict.fromkeys(self.keys):
            project: Any = gates.project[key]
            matrices[key] = _frozen(cell.weight_ih @ project.weight)  # [4 * hidden, C]
            offsets[key] = _frozen(cell.weight_ih @ project.bias + cell.bias_ih + cell.bias_hh)
        self.matrices = nn.ParameterList(matrices[key] for key in self.keys)  # units of a width share one
        self.offsets = nn.ParameterList(offsets[key] for key in self.keys)
        self.hidden = _frozen(cell.weight_hh)  # [4 * hidden, hidden]
        self.nothing = _frozen(torch.zeros_like(cell.bias_hh))
        self.fc, self.certain, self.rest = gates.fc, gates.certain, gates.rest
        self.at_hand: list[tuple[Tensor, ...]] = []  # for each gated unit: looked up once, as that takes time
        self.register_load_state_dict_post_hook(_look_up_again)

    def __len__(self) -> int:
        return len(self.keys)

    def cut(self, count: int) -> None:
        """Forget what only the gates from `count` on use."""
        self.keys, self.threshold = self.keys[:count], self.threshold[:count]
        self.matrices, self.offsets = (nn.ParameterList(list(rows)[:count]) for rows in (self.matrices, self.offsets))
        self.forget_names(count)
        self.at_hand = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.at_hand = []
        return super()._apply(fn, recurse)

    def _weights(self, index: int) -> tuple[Tensor, ...]:
        """Of the cell at a gated unit, and of the last layer."""
        if not self.at_hand:
            same = (self.hidden, self.nothing, self.fc.weight, self.fc.bias)
            self.at_hand = [(matrix, offset, *same) for matrix, offset in zip(self.matrices, self.offsets, strict=True)]
        return self.at_hand[index]

    def forward(self, index: int, x: Tensor, memory: Memory, certainty: Tensor | None = None) -> tuple[Tensor, Memory]:
        """x: [B, C, H, W] -> probability of keeping gated unit `index` [B] in float32, and the next state.

        certainty: of the classifier [B, 1], where the gate looks at it.
        """
        if index not in self.asked:
            return self.settled_prob(index, x), memory
        seen = pooled(x)
        if memory is None:
            memory = (seen.new_zeros(len(seen), RNN_SIZE),) * 2
        matrix, offset, own, nothing, last, bias = self._weights(index)
        hidden, cell = torch.lstm_cell(seen, memory, matrix, own, offset, nothing)
        return self.prob(index, F.linear(hidden, last, bias), certainty), (hidden, cell)


def _look_up_again(gates: nn.Module, keys: object) -> None:
    assert isinstance(gates, FoldedRecurrentGates)
    gates.at_hand = []


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=False)


# Folding batch norms -------------------------------------------------------------------------------------------------


def _foldable(conv: Any, norm: Any) -> bool:
    """Whether `norm(conv(x))` is a convolution in eval (followed by what the norm holds beside).

    One with hooks or a forward of its own is not: they are to meet what they would meet without folding.
    """
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
        return False
    return not (intercepted(conv) or norm._forward_hooks or norm._forward_pre_hooks)


def _fold(conv: nn.Conv2d, norm: Any) -> nn.Module:
    """Fold a batch norm into the convolution before it; gives what is left of the norm."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.weight = nn.Parameter(weight.detach(), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return getattr(norm, "act", None) or nn.Identity()  # timm's norms may hold the activation


def _child_name(parent: nn.Module, child: nn.Module) -> str:
    return next(name for name, module in parent.named_children() if module is child)


def _fold_unit(unit: families.Unit) -> None:
    for conv, after in unit.kind.steps(unit.module):
        norm = after[0] if after else None
        if norm is not None and _foldable(conv, norm):
            setattr(unit.module, _child_name(unit.module, norm), _fold(conv, norm))


def _drop_identities(unit: families.Unit) -> None:
    """Leave out what does nothing; a dynamic network's units are run step by step, and a call takes time."""
    idle = {id(m) for _, after in unit.kind.steps(unit.module) for m in after if type(m) is nn.Identity}
    for name, child in list(unit.module.named_children()):
        if id(child) in idle:
            setattr(unit.module, name, None)


def _fold_sequence(sequence: nn.Sequential) -> None:
    names = list(sequence._modules)
    for first, second in itertools.pairwise(names):
        conv, norm = getattr(sequence, first), getattr(sequence, second)
        if _foldable(conv, norm):
            setattr(sequence, second, _fold(conv, norm))


def _pool_first(sequence: nn.Sequential) -> None:
    """The transition of a DenseNet: pooled before it is multiplied, for a quarter of the work.

    Where one of the two has hooks or a forward of its own, it stays as it is.
    """
    parts: list[Any] = [None, None, *sequence]
    conv, pool = parts[-2:]
    if families.commute(conv, pool) and not (intercepted(conv) or pool._forward_hooks or pool._forward_pre_hooks):
        name = _child_name(sequence, conv)
        sequence._modules[name] = sequence._modules.pop(name)  # the last one now


def _fold_root(model: Any) -> None:
    """The stem of a ResNet: `conv1` (or the last convolution in it) and `bn1`."""
    conv: Any = getattr(model, "conv1", None)
    conv = conv[-1] if isinstance(conv, nn.Sequential) else conv
    if conv is not None and _foldable(conv, getattr(model, "bn1", None)):
        model.bn1 = _fold(conv, model.bn1)
