"""A training step as a CUDA graph: recorded once, then replayed without a call of Python for each of its kernels."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from timm_dynamic.tasks import BaseTask, DynamicTask, ExitsTask, WarmupTask

# What these do does not hang on values that a GPU would have to be waited for; others are run as they are.
RECORDED = (BaseTask, WarmupTask, DynamicTask, ExitsTask)
WARM_UPS = 3


def takes(task: nn.Module) -> bool:
    """Whether a task's step can be recorded: not where units are dropped at random, which is drawn on the CPU."""
    forced = getattr(getattr(task.model, "dynamic", None), "forced", None)
    at_random = forced is not None and isinstance(forced.layer_keep, float)
    return type(task) in RECORDED and not at_random


class StepGraph:
    """Forward and backward pass of a task for batches of one shape, as a CUDA graph.

    The gradients lie in the graph's own memory: they must not be set to None while it is used.

    Args:
        accelerator: whose precision and backward pass are recorded.
        task: prepared by it, on a GPU. What the passes before the recording change in it is put back.
        x: a batch of images [B, C, H, W].
        y: their classes [B].
    """

    def __init__(self, accelerator: Accelerator, task: nn.Module, x: Tensor, y: Tensor):
        self.x, self.y = x.clone(), y.clone()
        inside = accelerator.unwrap_model(task)
        tensors = [*inside.parameters(), *inside.buffers()]
        kept = [tensor.detach().clone() for tensor in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(accelerator, task)
            inside.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.metrics = self._step(accelerator, task)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)

    def _step(self, accelerator: Accelerator, task: nn.Module) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = task(self.x, self.y)
        accelerator.backward(metrics["loss"])
        return {name: value.detach() for name, value in metrics.items()}

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Metrics of a batch; they, and the parameters' gradients, hold until the next call."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        return self.metrics
