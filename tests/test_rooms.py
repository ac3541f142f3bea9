"""The rooms and who may import whom: `gan ← manifold_defense ← pipelines`, and nothing points back.

Imports are read from the source, so one inside a function, under `TYPE_CHECKING` or by
`import_module("name")` counts like any other. A name put together at run time is not seen.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("gan", "manifold_defense", "pipelines")


class Rule(NamedTuple):
    """`imported`, and all below it, may be imported by `importers` and those below them alone;
    by `lazy_importers` inside a function only."""

    imported: str
    importers: tuple[str, ...]
    lazy_importers: tuple[str, ...] = ()


LOOPS = (
    "gan.training",
    "gan.inversion",
    "gan.optimisation",
    "manifold_defense.hardening",
    "manifold_defense.evaluation",
)

RULES = (
    Rule("gan", ("gan", "manifold_defense.artifact", "manifold_defense.hardening.training", "pipelines")),
    Rule("manifold_defense", ("manifold_defense", "pipelines")),
    Rule("pipelines", ("pipelines",)),
    Rule("lightning_fabric", (*LOOPS, "pipelines")),
    Rule("torchvision", ("pipelines",), lazy_importers=("manifold_defense.classifiers",)),
    Rule("tensorboard", ("pipelines",)),
    Rule("torch.utils.tensorboard", ("pipelines",)),
    Rule("pydantic", ("pipelines",)),
    Rule("click", ("pipelines",)),
    Rule("rich", ("pipelines",)),
    Rule("matplotlib", ("pipelines",)),
    Rule("sklearn", ("pipelines",)),
    Rule("PIL", ("pipelines",)),
    Rule("tomllib", ("pipelines",)),
)


class Import(NamedTuple):
    line: int
    names: tuple[str, ...]  # all modules that the statement may load, in full
    in_function: bool


def imports(module: str, source: str) -> list[Import]:
    """All imports of `module`. An `__init__.py` is named `package.__init__`, so that the dots of a
    relative import count from the same place in every file."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield Import(node.lineno, tuple(alias.name for alias in node.names), in_function)
            case ast.ImportFrom():
                above = module.split(".")[: -node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                # `from a import b` loads a.b if that is a module.
                names = (base, *(f"{base}.{alias.name}" for alias in node.names))
                yield Import(node.lineno, names, in_function)
            case ast.Call(
                func=ast.Name("import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ):
                yield Import(node.lineno, (name,), in_function)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                in_function = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return list(visit(ast.parse(source), False))


def within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether `name` is one of `modules` or below one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def violations(module: str, source: str, rules: tuple[Rule, ...] = RULES) -> list[str]:
    """One line for every import of `module` that a rule forbids."""
    return [
        f"{module}, line {found.line}: imports {rule.imported}, which is left to {', '.join(rule.importers)}"
        for found in imports(module, source)
        for rule in rules
        if any(within(name, (rule.imported,)) for name in found.names)
        and not within(module, rule.importers)
        and not (found.in_function and within(module, rule.lazy_importers))
    ]


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rooms(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert violations(module, path.read_text(encoding="utf-8")) == []


LAZY = "def resnet18():\n    import torchvision"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gan.bad", "import manifold_defense"),
        ("gan.bad", "import torch, pipelines.config"),
        ("gan.bad", "from manifold_defense.types import Generator"),
        ("gan.bad", "if TYPE_CHECKING:\n    from pipelines.config import Config"),
        ("gan.bad", "importlib.import_module('pipelines.config')"),
        ("gan.bad", "from lightning_fabric import Fabric"),
        ("gan.__init__", "import lightning_fabric"),
        ("gan.training", "from torch.utils.tensorboard import SummaryWriter"),
        ("gan.training", "from torch.utils import tensorboard"),
        ("gan.training_board", "import lightning_fabric"),
        ("gan.bad", LAZY),
        ("manifold_defense.bad", "from pipelines import config"),
        ("manifold_defense.bad", "from gan.networks import Generator"),
        ("manifold_defense.__init__", "def load():\n    from gan import networks"),
        ("manifold_defense.attacks.bad", "from ...gan import networks"),
        ("manifold_defense.attacks.artifact", "import gan"),
        ("manifold_defense.filter", "from lightning_fabric import Fabric"),
        ("manifold_defense.classifiers", "from torchvision.models import resnet18"),
        ("manifold_defense.classifiers", f"{LAZY}\nimport torchvision"),
        ("manifold_defense.bad", LAZY),
        *(
            ("manifold_defense.bad", f"def f():\n    import {name}")
            for name in (
                "click",
                "lightning_fabric",
                "matplotlib.pyplot",
                "PIL.Image",
                "pydantic",
                "rich.table",
                "sklearn.datasets",
                "tensorboard",
                "tomllib",
            )
        ),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert found[0].startswith(f"{module}, line ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gan.networks", "import torch\nfrom torch.utils import checkpoint\nfrom . import losses"),
        ("gan.networks", "import ganesh, richer, pipelines_of_others"),
        ("gan.training", "from lightning_fabric import Fabric"),
        ("manifold_defense.__init__", "from .filter import ManifoldFilter"),
        ("manifold_defense.artifact", "from gan.networks import Generator"),
        ("manifold_defense.classifiers", LAZY),
        ("manifold_defense.hardening.loop", "import lightning_fabric\nfrom ..attacks import pgd"),
        ("manifold_defense.evaluation.__init__", "import lightning_fabric"),
        ("pipelines.cli", "import click, gan, manifold_defense, pydantic, rich, tomllib, torchvision"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_each_room_is_a_typed_package(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()
    assert (ROOT / package / "py.typed").is_file()


# A deployed filter needs torch and safetensors alone: everything else is made to look absent.
BLOCKED = (
    "click",
    "lightning_fabric",
    "matplotlib",
    "PIL",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchvision",
)
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter in which no module of `BLOCKED` can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_deployed_filter_needs_torch_and_safetensors_alone() -> None:
    done = run_blocked(
        "import manifold_defense\nfrom manifold_defense import ManifoldFilter, load_filter, project\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_holds(name: str) -> None:
    done = run_blocked(f"import {name}\n")
    assert done.returncode != 0
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr
