"""The arrows of docs/architecture.md, read off the imports."""

import ast
from pathlib import Path

import pytest

import vllm_align_spec
import vllm_align_spec.patches

ROOT = Path(vllm_align_spec.__file__).parent
PATCHES = Path(vllm_align_spec.patches.__file__).parent

# A layer may import itself and what stands right of it in its row, never what imports it.
ALLOWED = {
    "options": set(),
    "metrics": {"options"},
    "report": {"options", "metrics"},
    "patches": set(),
    "companion": {"options", "processors"},
    "processors": {"options", "companion"},
    "rewards": {"options", "metrics"},
    "strategies": {"options", "processors", "rewards", "report", "metrics"},
    "registry": {"options", "processors", "strategies"},
    "engine": {
        *("options", "report", "metrics", "processors", "companion"),
        *("rewards", "strategies", "registry", "patches"),
        "cluster",  # only the exchange of tries, on demand
    },
    "plugin": {"options", "patches", "drafters"},
    "drafters": set(),
    "train": {"drafters", "cluster"},  # cluster: only its command line, on demand
    "lab": {"options", "processors", "drafters", "train"},
}
USERS = {"cli", "calibrate", "cluster", "doctor", "demo", "bench"}


def files():
    for path in sorted([*ROOT.rglob("*.py"), *PATCHES.rglob("*.py")]):
        if path.is_relative_to(PATCHES):
            yield "patches", path
        else:
            yield path.relative_to(ROOT).parts[0].removesuffix(".py"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("layer", "path"), list(files()), ids=lambda v: str(v.name) if isinstance(v, Path) else v)
def test_imports_point_downwards(layer, path):
    if layer in USERS or layer == "__init__":
        return
    ours = {
        name.split(".")[1] for name in imports(path) if name.startswith("vllm_align_spec.") and not name.endswith(".")
    } & (set(ALLOWED) | USERS)
    assert ours - {layer} <= ALLOWED[layer], f"{path} reaches up"


@pytest.mark.parametrize(("layer", "path"), list(files()), ids=lambda v: str(v.name) if isinstance(v, Path) else v)
def test_methods_know_nothing_of_the_engine(layer, path):
    if layer in {"processors", "rewards", "strategies", "options", "report"}:
        assert not [name for name in imports(path) if name == "vllm" or name.startswith("vllm.")]
