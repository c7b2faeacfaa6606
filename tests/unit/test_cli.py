"""The command line: light, and the server's environment is changed no more than it says."""

import os
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vllm_align_spec import bench, cli


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-m", "vllm_align_spec.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys, contextlib, vllm_align_spec.cli as cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.endswith("[]\n")
    for command in ("serve", "vllm", "demo", "doctor", "calibrate", "lab", "bench"):
        assert command in told


def test_help_is_quick():
    def once():
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.5


def test_an_unknown_bench_is_refused_with_those_there_are():
    refused = run("bench", "nothing")
    assert refused.returncode == 2
    for name in bench.BENCHES:
        assert name in refused.stderr


def test_vllms_own_command_works_although_the_cpu_build_has_another_name():
    told = run("vllm", "--version")
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip().splitlines()[-1].startswith("0.3")


@pytest.fixture
def installed(monkeypatch):
    """Pretends that exactly these plugins are installed."""

    def pretend(**groups):
        plugins = EntryPoints(
            EntryPoint(name, "a:b", f"vllm.{group}") for group, names in groups.items() for name in names
        )
        monkeypatch.setattr("importlib.metadata.entry_points", lambda **wanted: plugins.select(**wanted))

    return pretend


def plugins(environ):
    return cli.server_environment(environ)["VLLM_PLUGINS"].split(",")


def test_every_plugin_that_would_have_been_loaded_still_is(installed):
    installed(
        general_plugins=["align_spec", "models"],
        platform_plugins=["device"],
        io_processor_plugins=["io"],
        stat_logger_plugins=["stats"],
        endpoint_plugins=["align_spec"],
    )
    assert sorted(plugins({})) == ["align_spec", "device", "io", "models", "stats"]


def test_nothing_is_loaded_that_would_not_have_been(installed):
    installed(general_plugins=["align_spec", "lora_hf_hub_resolver"], endpoint_plugins=["align_spec", "routes"])
    assert plugins({}) == ["align_spec"]


def test_a_plugin_whose_routes_come_along_is_named(installed, capsys):
    installed(general_plugins=["align_spec", "both"], endpoint_plugins=["align_spec", "both"])
    assert plugins({}) == ["both", "align_spec"]
    assert "'both'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("named", "expected"), [("x,y", "x,y,align_spec"), ("", "align_spec"), ("align_spec", "align_spec")]
)
def test_a_choice_of_plugins_is_respected(named, expected):
    assert cli.server_environment({"VLLM_PLUGINS": named})["VLLM_PLUGINS"] == expected


@pytest.fixture
def openmp(tmp_path, monkeypatch):
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(cli, "_is_cpu_build", lambda: True)
    return str(library)


def test_openmp_is_preloaded_on_a_cpu(openmp):
    assert cli.server_environment({})["LD_PRELOAD"] == openmp
    assert cli.server_environment({"LD_PRELOAD": "/x.so"})["LD_PRELOAD"] == f"{openmp}:/x.so"


def test_openmp_is_not_preloaded_twice_nor_on_a_gpu(openmp, monkeypatch):
    assert cli.server_environment({"LD_PRELOAD": "/libgomp.so.1"})["LD_PRELOAD"] == "/libgomp.so.1"
    monkeypatch.setattr(cli, "_is_cpu_build", lambda: False)
    assert "LD_PRELOAD" not in cli.server_environment({})


def test_nothing_else_of_the_environment_changes():
    before = {"PATH": "/bin", "VLLM_PLUGINS": "align_spec", "LD_PRELOAD": "/libiomp5.so"}
    assert cli.server_environment(before) == before


def test_serve_runs_vllms_serve_with_the_arguments_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(os, "execve", lambda *call: seen.append(call))
    cli.main(["serve", "model", "--port", "1", "--help"])
    ((_, command, environment),) = seen
    assert command[-6:] == ["vllm", "serve", "model", "--port", "1", "--help"]
    assert "align_spec" in environment["VLLM_PLUGINS"].split(",")
