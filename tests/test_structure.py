"""The house: imports go one way, importing is quick and touches no network."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_dynamic as td

PACKAGE = Path(td.__file__).parent
RECIPES = PACKAGE.parent / "train_recipes"
# Each module imports from those before it only. "" is the package itself, timm_dynamic/__init__.py.
ORDER = [
    *("version", "configs", "safety", "shipped", "modes"),
    *("losses", "gates", "channel_gates", "exits", "cifar", "opaque", "families", "certainty", "units", "costs"),
    *("counting", "forcing", "walk", "leaving", "forward", "roots", "surgery", "measure", "budgets", "calibration"),
    *("spreading", "settling", "idle"),
    *("tasks", "reinforcement", "hindsight"),
    *("inference", "onnx_graph", "onnx_ops", "onnx_parts", "onnx_masked", "onnx_channels", "onnx_branches", "onnx"),
    *(
        "onnx_blocked",
        "onnx_session",
        "evaluation",
        "card",
        "twins",
        "hub",
        "report",
        "comparison",
        "timing",
        "benchmark",
    ),
    *("benchmark_train", "benchmark_budget"),
    *("analyses", "exchange", "feature_change", "trade_off", "claims", "claim_numbers", "paper_claims"),
    *("sections_cost", "sections_images", "analysis_report"),
    *("registry", "", "cli.errors", "cli.options", "cli.images", "cli.models", "cli.rows", "cli.runs", "cli.tables"),
    *("demo_samples", "demo_compare", "demo_page", "demo"),
    *("cli.export", "cli.benchmark", "cli.analyses", "cli.report", "cli.demo", "cli.evaluate"),
    *("cli.app", "cli"),
]
HEAVY = ("accelerate", "sklearn", "scipy", "matplotlib", "onnx", "onnxruntime", "gradio", "typer", "rich", "pandas")
HEAVY += ("yaml",)


def name_of(path: Path) -> str:
    """timm_dynamic/cli/app.py -> cli.app"""
    return ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(level, module, names) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The modules of the package that module `name` imports."""
    path = MODULES[name]
    found = set()
    for level, module, names in imports(path):
        if level == 0 and module.split(".")[0] != "timm_dynamic":
            continue
        parts = list(path.parent.relative_to(PACKAGE).parts)
        inside = module.split(".")[1:] if level == 0 else [*parts[: len(parts) - level + 1], *filter(None, [module])]
        whole = ".".join(inside)
        for imported in names or [""]:
            deeper = f"{whole}.{imported}".strip(".")
            found.add(deeper if imported and deeper in MODULES else whole)
    return found - {name}


def test_every_module_has_its_place() -> None:
    assert set(MODULES) <= set(ORDER)
    assert len(MODULES) > 20


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    later = {other for other in own_imports(name) if ORDER.index(other) > ORDER.index(name)}
    assert later == set()


def test_the_check_above_sees_imports() -> None:
    assert {"costs", "families", "units", "configs", "gates"} <= own_imports("walk")
    assert {"registry", "forward"} <= own_imports("")
    assert "configs" in own_imports("cli.options")
    assert "cli.errors" in own_imports("cli.app")


@pytest.mark.parametrize("name", MODULES)
def test_the_package_knows_nothing_of_recipes(name: str) -> None:
    recipes = {path.stem for path in RECIPES.glob("*.py")} | {"train_recipes", "accelerate"}
    absolute = {module.split(".")[0] for level, module, _ in imports(MODULES[name]) if level == 0}
    assert absolute & recipes == set()


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"families", "opaque", "cifar"}))
def test_only_families_names_classes_of_timm_and_torchvision(name: str) -> None:
    classes = {"ResNet", "DenseNet", "BasicBlock", "Bottleneck", "DenseLayer", "_DenseLayer", "BlurPool2d"}
    tree = ast.parse(MODULES[name].read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {imported for _, _, names in imports(MODULES[name]) for imported in names}
    assert used & classes == set()


def test_public_names() -> None:
    assert td.__all__ == sorted(td.__all__)
    assert all(hasattr(td, name) for name in td.__all__)
    wanted = (
        "add_layer_gates add_channel_gates add_exits strip decide anytime set_execution set_budget force cost_table"
    )
    assert set(wanted.split()) <= set(td.__all__)
    assert {"LayerGateConfig", "ChannelGateConfig", "ExitConfig", "Decisions", "CostTable"} <= set(td.__all__)


IMPORT = f"""
import socket, sys, time

def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")

import timm, torch, torch.utils.flop_counter, torchvision
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
before = set(sys.modules)
start = time.process_time()
import timm_dynamic
took = time.process_time() - start
timm.create_model("ddi_resnet20_cifar")
print(took, *sorted(({{name.split(".")[0] for name in set(sys.modules) - before}}) & set({HEAVY!r})))
"""


def test_importing_is_quick_and_quiet() -> None:
    """At most 0.3 s of the processor beyond timm and torch, no network, and nothing heavy that is not needed yet."""
    found = []
    for _ in range(6):  # a busy machine may be slow for a while
        answer = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        took, *heavy = answer.stdout.split()
        assert heavy == []
        found.append(float(took))
        if found[-1] <= 0.3:
            return
    pytest.fail(f"importing timm_dynamic took {min(found):.2f} s beyond timm and torch; wanted 0.3 or less")
