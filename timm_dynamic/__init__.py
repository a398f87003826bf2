"""timm_dynamic: any ResNet or DenseNet of timm or torchvision, made dynamic.

Importing registers the names `skipnet_*`, `iadi_*` and `ddi_*` with timm.
"""

from . import registry as registry
from .budgets import set_budget
from .calibration import Calibration, calibrate
from .configs import BudgetConfig, ChannelGateConfig, EnergyConfig, ExitConfig, LayerGateConfig
from .costs import CostTable
from .forward import Decisions, anytime, decide
from .hub import push_to_hub, save_pretrained
from .inference import optimize_for_inference
from .measure import cost_table
from .onnx import export_onnx
from .onnx_session import onnx_runner
from .settling import busy_units, idle_units, open_units, settle_channels, shut_units, steady_channels
from .surgery import add_channel_gates, add_exits, add_layer_gates, force, set_execution, strip
from .version import __version__

__all__ = [
    "BudgetConfig",
    "Calibration",
    "ChannelGateConfig",
    "CostTable",
    "Decisions",
    "EnergyConfig",
    "ExitConfig",
    "LayerGateConfig",
    "__version__",
    "add_channel_gates",
    "add_exits",
    "add_layer_gates",
    "anytime",
    "busy_units",
    "calibrate",
    "cost_table",
    "decide",
    "export_onnx",
    "force",
    "idle_units",
    "onnx_runner",
    "open_units",
    "optimize_for_inference",
    "push_to_hub",
    "save_pretrained",
    "set_budget",
    "set_execution",
    "settle_channels",
    "shut_units",
    "steady_channels",
    "strip",
]
