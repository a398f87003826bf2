"""One unit, run three ways: dense, masked and skipping. All three mean the same.

    output = keep * unit(x) + (1 - keep) * rest(x)        (SkipNet, eq. 1)

`rest(x)` is what a residual block gives when its branch is zero, and zeros for a dense layer. Channel keeps zero the
unit's hidden channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import Unit, rests_unchanged, run_slice

Keeps = Sequence[Tensor]  # for each hidden width, keeps of its channels: [B, channels]
Pattern = Sequence[tuple[bool, ...]]  # for each hidden width, which of its groups are kept
MOST_BYTES = 2**27  # of weights that are remembered


def checkpointed(model: nn.Module, unit: Unit) -> bool:
    """Whether a unit is computed again for its gradients: ResNets are told at the root, dense layers one by one."""
    asked = ((model, "grad_checkpointing"), (unit.module, "grad_checkpointing"), (unit.module, "memory_efficient"))
    return any(getattr(module, name, False) for module, name in asked)


class Slices(dict[Any, tuple[Tensor, Tensor | None]]):
    """Weights and biases of patterns of channels met before, of frozen weights; forgotten when they are too many."""

    bytes = 0

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        self.bytes = 0

    def keep(self, key: Any, weight: Tensor, bias: Tensor | None) -> None:
        """Remember one slice."""
        size = weight.nbytes + (0 if bias is None else bias.nbytes)
        if self.bytes + size > MOST_BYTES:
            self.clear()
        self[key] = weight, bias
        self.bytes += size


def shortcut(unit: Unit, x: Tensor) -> Tensor:
    """What is added to a residual block's branch: x, or the stock downsample of it. x: [B, C, H, W]."""
    return unit.kind.shortcut(unit.module, x)


def branch(unit: Unit, x: Tensor, keeps: Keeps | None = None) -> Tensor:
    """The unit without its shortcut, hidden channels multiplied by `keeps`. x: [B, C, H, W]."""
    if unit.kind.branch is not None:
        return unit.kind.branch(unit.module, x)
    for module in unit.kind.before(unit.module):
        if module is not None:
            x = module(x)
    for i, (conv, after) in enumerate(unit.kind.steps(unit.module)):
        x = conv(x)
        for module in after:
            if module is not None:
                x = module(x)
        if keeps is not None and i < len(keeps):
            x = x * keeps[i].to(x.dtype)[:, :, None, None]
    rate = unit.kind.dropout(unit.module)
    return F.dropout(x, rate, unit.module.training) if rate > 0 else x


def close(unit: Unit, y: Tensor, short: Tensor) -> Tensor:
    """The unit's output from its branch and its shortcut; `y` is used up."""
    if unit.kind.grows:
        return y
    y += short
    return unit.kind.act(unit.module)(y)


def rest(unit: Unit, short: Tensor) -> Tensor:
    """What a skipped unit gives. short: [B, C, H, W], which is used up where it is not the unit's input."""
    if unit.kind.grows:
        return _zeros(short, unit.kind.width(unit.module), short.shape[2:], layout_of(short))
    act = unit.kind.act(unit.module)
    if unit.module.downsample is not None:
        return act(short)
    return short if rests_unchanged(act) else act(short.clone())


def join(unit: Unit, x: Tensor, y: Tensor) -> Tensor:
    """The next unit's input, from this unit's input and output."""
    return torch.cat([x, y], 1) if unit.kind.grows else y


def run_dense(unit: Unit, x: Tensor, keeps: Keeps | None = None) -> Tensor:
    """The whole unit, as stock. x: [B, C, H, W]."""
    y = branch(unit, x, keeps)
    return close(unit, y, shortcut(unit, x))


def run_masked(unit: Unit, x: Tensor, keep: Tensor | None, keeps: Keeps | None) -> Tensor:
    """Everything computed, then mixed. x: [B, C, H, W], keep: [B] (0 to 1), keeps: [B, channels] each."""
    if keep is None:
        return run_dense(unit, x, keeps)
    y = branch(unit, x, keeps)
    short = shortcut(unit, x)
    y = close(unit, y, short)
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:  # no proxy of torch.fx
        run = keep[:, None, None, None]
        return torch.where(run, y, 0.0) if unit.kind.grows else torch.where(run, y, rest(unit, short))
    gate = keep.to(y.dtype)[:, None, None, None]
    if unit.kind.grows:  # rests at zeros
        return gate * y
    return _mix(rest(unit, short), y, gate, unit.module.training)


def _mix(rested: Tensor, y: Tensor, gate: Tensor, training: bool) -> Tensor:
    """`gate * y + (1 - gate) * rested`, exact for gates of 0 and 1. [B, C, H, W] twice, gate: [B, 1, 1, 1]."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(y) is not Tensor
    if training and torch.is_grad_enabled() and not followed:
        return _Mix.apply(rested, y, gate)
    return gate * y + (1 - gate) * rested


class _Mix(torch.autograd.Function):
    """The same in fewer passes over memory."""

    @staticmethod
    def forward(ctx: Any, rested: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """See `_mix`."""
        ctx.all_run = y.device.type == "cpu" and bool((gate == 1).all())  # on a GPU one would have to wait for this
        ctx.save_for_backward(*((rested, y, gate) if gate.requires_grad else (None, None, gate)))
        return y.view_as(y) if ctx.all_run else torch.lerp(rested, y, gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """grad: [B, C, H, W] -> gradients of what `forward` was given."""
        rested, y, gate = ctx.saved_tensors
        by_gate = _dots(grad, y - rested) if ctx.needs_input_grad[2] else None
        if ctx.all_run:
            return None, grad, by_gate
        return grad * (1 - gate), grad * gate, by_gate


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The product of each image of `a` with that of `b`: [B, C, H, W] twice -> [B, 1, 1, 1]."""
    if a.dtype == torch.float32:
        return (a * b).sum((1, 2, 3), keepdim=True)
    a, b = (t.permute(0, 2, 3, 1).flatten(1) for t in (a, b))
    return torch.bmm(a[:, None], b[:, :, None])[..., None]


def run_skipping(
    unit: Unit,
    x: Tensor,
    keep: Tensor | None,
    channels: Callable[[Tensor, Tensor | None], Keeps | None] | Pattern,
    reuse: bool = False,
    slices: Slices | None = None,
    sizes: Sequence[tuple[int, ...]] | None = None,
) -> Tensor:
    """Only what is kept, for the images that keep it.

    Args:
        unit: in eval mode.
        x: [B, C, H, W].
        keep: bool [B]; None where the unit is not gated.
        channels: the groups of each hidden width that all images keep; or what says which each keeps, given the inputs
            of the images that run and their places in `x` (None for all): bool [B', groups] for each hidden width, or
            None for all. Not called if no image runs.
        reuse: results may be put into `x` itself, because nobody else reads it.
        slices: remembers sliced weights, where these never change.
        sizes: for each hidden width, how many channels each group holds; None for one.
    """

    def run(x: Tensor, places: Tensor | None) -> Tensor:
        if callable(channels):
            return _sliced_branch(unit, x, channels(x, places), sizes, slices)
        return _branch_slice(unit, x, channels, sizes, slices)

    places = None if keep is None else _places(keep)
    if places is None:
        y = run(x, None)
        return close(unit, y, shortcut(unit, x))
    if len(places) == 0:
        return rest(unit, shortcut(unit, x))
    picked = gathered(x, places)
    y = run(picked, places)
    short = shortcut(unit, x)
    del picked
    if short is x and not unit.kind.grows and _by_image(y, x) and rests_unchanged(unit.kind.act(unit.module)):
        return _add_by_image(unit, x if reuse else x.clone(), places, y)
    if not unit.kind.grows:
        y = close(unit, y, gathered(short, places))
    out = rest(unit, short)
    if out.requires_grad or (out is x and not reuse):
        out = out.clone()
    return _put(out, places, y)


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """Some images, in the layout that they had. x: [B, C, H, W] -> [B', C, H, W]."""
    if layout_of(x) == torch.contiguous_format:
        return x.index_select(0, places)
    return x.permute(0, 2, 3, 1).index_select(0, places).permute(0, 3, 1, 2)


def _by_image(*tensors: Tensor) -> bool:
    """Whether images are best written one by one: they are on a CPU, and no gradient is to flow."""
    return all(t.device.type == "cpu" and not t.requires_grad for t in tensors)


def _put(out: Tensor, places: Tensor, y: Tensor) -> Tensor:
    """Write the images of `y` to their places in `out`: [B', C, H, W] -> [B, C, H, W]."""
    if not _by_image(out, y):
        out[places] = y
        return out
    for i, image in zip(places.tolist(), y.unbind(0), strict=True):
        out[i].copy_(image)
    return out


def _add_by_image(unit: Unit, out: Tensor, places: Tensor, y: Tensor) -> Tensor:
    """`close` on the images at `places`, in place: [B', C, H, W] -> [B, C, H, W]."""
    relu = isinstance(unit.kind.act(unit.module), nn.ReLU)
    for i, image in zip(places.tolist(), y.unbind(0), strict=True):
        row = out[i].add_(image)
        if relu:
            row.relu_()
    return out


def _places(keep: Tensor) -> Tensor | None:
    """Where `keep` [B] holds; None for everywhere."""
    if len(keep) == 1:  # most often asked, and quickest so
        return None if bool(keep) else keep.new_empty(0)
    places = keep.nonzero().flatten()
    return None if len(places) == len(keep) else places


def _sliced_branch(
    unit: Unit, x: Tensor, keeps: Keeps | None, sizes: Sequence[tuple[int, ...]] | None, slices: Slices | None
) -> Tensor:
    """The branch of each image with its own channels only: one run for each distinct pattern."""
    if keeps is None:
        return branch(unit, x)
    if len(x) == 1:
        return _branch_slice(unit, x, [tuple(k[0].tolist()) for k in keeps], sizes, slices)
    if all(bool(k.all()) for k in keeps):
        return branch(unit, x)
    patterns, which = torch.cat(list(keeps), 1).unique(dim=0, return_inverse=True)
    out: Tensor | None = None
    for i, pattern in enumerate(patterns):
        kept = [tuple(part.tolist()) for part in pattern.split([k.shape[1] for k in keeps])]
        if len(patterns) == 1:
            return _branch_slice(unit, x, kept, sizes, slices)
        places = (which == i).nonzero().flatten()
        y = _branch_slice(unit, gathered(x, places), kept, sizes, slices)
        if out is None:
            out = torch.empty(len(x), *y.shape[1:], dtype=y.dtype, device=y.device, memory_format=layout_of(y))
        out = _put(out, places, y)
    assert out is not None
    return out


def layout_of(x: Tensor) -> torch.memory_format:
    """The memory format of x: [B, C, H, W]; plain where both fit."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _zeros(like: Tensor, channels: int, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    out = torch.empty(len(like), channels, *shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return out.zero_()


class _Kept(NamedTuple):
    """What is kept of a hidden width: group by group, and the channels' places."""

    groups: tuple[bool, ...]
    channels: Tensor


def _branch_slice(
    unit: Unit,
    x: Tensor,
    patterns: Pattern,
    sizes: Sequence[tuple[int, ...]] | None,
    slices: Slices | None,
) -> Tensor:
    """The branch with some of the hidden channels only (a pattern of groups for each hidden width)."""
    if all(map(all, patterns)):
        return branch(unit, x)
    for module in unit.kind.before(unit.module):
        if module is not None:
            x = module(x)
    source: _Kept | None = None
    for i, (conv, after) in enumerate(unit.kind.steps(unit.module)):
        target = None
        if i < len(patterns):
            target = _kept(patterns[i], None if sizes is None else sizes[i], x.device, slices)
        x = _conv_slice(conv, x, source, target, f"{unit.name}.{i}", slices)
        for module in after:
            if module is not None:
                x = module(x) if target is None else run_slice(module, x, target.channels)
        source = target
    return x


def _kept(groups: tuple[bool, ...], sizes: tuple[int, ...] | None, device: Any, slices: Slices | None) -> _Kept:
    """The channels of the groups that are kept."""
    key = ("index", groups, sizes, device)
    if slices is not None and key in slices:
        return _Kept(groups, slices[key][0])
    with torch.inference_mode(False):  # it may be wanted again where gradients are
        wide = torch.tensor(groups).repeat_interleave(torch.tensor(sizes or (1,) * len(groups)))
        index = wide.nonzero().flatten().to(device)
    if slices is not None:
        slices.keep(key, index, None)
    return _Kept(groups, index)


def _conv_slice(
    conv: nn.Conv2d, x: Tensor, source: _Kept | None, target: _Kept | None, name: str, slices: Slices | None
) -> Tensor:
    """A convolution from input channels `source` to output channels `target` (None: all). x: [B, source, H, W].

    One that is more than its weights, by hooks (as of `torch.nn.utils.prune`) or a forward of its own, runs in full.
    """
    into, out_of = (None if kept is None else kept.channels for kept in (source, target))
    if intercepted(conv):
        wide = x if into is None else x.new_zeros(x.shape[0], conv.in_channels, *x.shape[2:]).index_copy_(1, into, x)
        return conv(wide) if out_of is None else conv(wide)[:, out_of]
    if conv.groups > 1 and (source is not None or target is not None):
        return _grouped_slice(conv, x, into, out_of)
    if slices is None:
        weight, bias = _weight_slice(conv, into, out_of)
    else:
        state = (name, conv.weight._version, conv.weight.dtype, conv.weight.device)
        key = (*state, *(None if kept is None else kept.groups for kept in (source, target)))
        if key not in slices:
            with torch.inference_mode(False):
                weight, bias = _weight_slice(conv, into, out_of)
                slices.keep(key, weight.contiguous(memory_format=layout_of(conv.weight)), bias)
        weight, bias = slices[key]
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        return _constant(conv, x, weight.shape[0], bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def intercepted(conv: nn.Module) -> bool:
    """Whether calling a convolution does more, or other things, than convolving with its weights."""
    own = type(conv).forward is not nn.Conv2d.forward or "forward" in vars(conv) or "parametrizations" in conv._modules
    return own or bool(conv._forward_hooks or conv._forward_pre_hooks)


def _weight_slice(conv: nn.Conv2d, source: Tensor | None, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight = conv.weight if target is None else conv.weight[target]
    weight = weight if source is None else weight[:, source]
    return weight, conv.bias if target is None or conv.bias is None else conv.bias[target]


def _grouped_slice(conv: nn.Conv2d, x: Tensor, source: Tensor | None, target: Tensor | None) -> Tensor:
    """`_conv_slice` for a grouped convolution: runs the groups whose inputs and outputs are both kept."""
    per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    every = torch.arange(conv.groups, device=x.device)
    ins = every if source is None else source[::per_in] // per_in
    outs = every if target is None else target[::per_out] // per_out
    both = ins[torch.isin(ins, outs)]
    out = _constant(conv, x, len(outs) * per_out, None)
    if len(both):
        picked = _channels(torch.searchsorted(ins, both), per_in)
        weight = conv.weight[_channels(both, per_out)]
        source_x = x[:, picked].contiguous(memory_format=layout_of(x))
        y = F.conv2d(source_x, weight, None, conv.stride, conv.padding, conv.dilation, len(both))
        out[:, _channels(torch.searchsorted(outs, both), per_out)] = y
    if conv.bias is not None:
        out += conv.bias[_channels(outs, per_out)][:, None, None]
    return out


def _channels(groups: Tensor, size: int) -> Tensor:
    """The channels of groups of `size`: [G] -> [G * size]."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _constant(conv: nn.Conv2d, x: Tensor, channels: int, bias: Tensor | None) -> Tensor:
    """What a convolution gives for an input of zeros. -> [B, channels, H', W']."""
    shape = []
    for i, size in enumerate(x.shape[2:]):
        reach = conv.dilation[i] * (conv.kernel_size[i] - 1) + 1
        shape.append((size + 2 * int(conv.padding[i]) - reach) // conv.stride[i] + 1)
    out = _zeros(x, channels, shape, layout_of(conv.weight))
    return out if bias is None else out + bias[:, None, None]
