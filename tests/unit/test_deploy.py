"""What is under deploy/, as far as it can be held against something without a cluster.

Helm's own library renders the chart, and Kubernetes' published schemas take every object; both are packages that the
test fetches for itself, because nothing else needs them. Where they cannot be had it is skipped.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "vllm-align-spec"
PACKAGES = ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "importlib-resources==6.5.2")
VALUES = {
    "model": "some/model",
    "replicas": 2,
    "speculative": {"method": "draft_model", "model": "some/pilot", "num_speculative_tokens": 5},
    "alignSpec": {"rewards": {"judge": {"kind": "http", "url": "http://judge:8000/it's"}}},
    "extraArgs": ["--max-model-len=4096"],
    "apiKeySecret": "keys",
    "hubTokenSecret": "hub",
    "podMonitor": {"enabled": True},
    "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models"}],
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with the packages in it."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be had here: {', '.join(PACKAGES)}")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    return folder


def render(packages, values):
    """The chart's objects, and Helm's complaints."""
    script = """
        import json, sys
        sys.path.insert(0, sys.argv[1])
        import helm_python as helm
        values = json.loads(sys.argv[3])
        with helm.Chart.load(sys.argv[2]) as chart:
            try:
                chart.validate_schema(values)
                print(json.dumps({"files": chart.render(values, name="demo", namespace="prod")}))
            except Exception as error:
                print(json.dumps({"error": str(error)}))
    """
    arguments = [str(packages), str(CHART), json.dumps(values)]
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def objects(files):
    for name, text in files.items():
        if name.endswith(".yaml"):
            yield from (one for one in yaml.safe_load_all(text) if one)


def valid(packages, one):
    script = """
        import json, sys
        sys.path.insert(0, sys.argv[1])
        import kubernetes_validate
        kubernetes_validate.validate(json.loads(sys.argv[2]), "1.33", strict=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(packages), json.dumps(one)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_chart_renders_to_objects_that_kubernetes_accepts(packages):
    found = {one["kind"]: one for one in objects(render(packages, VALUES)["files"])}
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget", "PodMonitor"}
    for kind, one in found.items():
        if kind != "PodMonitor":  # not of Kubernetes itself
            valid(packages, one)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert server["securityContext"]["readOnlyRootFilesystem"]
    # It is given longer than it may take, and leaves the Service before it stops listening.
    drain = next(int(one.partition("=")[2]) for one in server["args"] if one.startswith("--shutdown-timeout="))
    assert pod["terminationGracePeriodSeconds"] > drain + int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()


def test_the_charts_arguments_are_ones_that_vllm_and_we_understand(packages):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_align_spec.options import parse_engine

    found = {one["kind"]: one for one in objects(render(packages, VALUES)["files"])}
    arguments = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[0] == "some/model"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    assert parsed.speculative_config == VALUES["speculative"]
    assert parse_engine(parsed.additional_config).rewards["judge"].url.endswith("it's")
    assert parsed.shutdown_timeout == 600


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "model"),
        ({**VALUES, "replicas": 0}, "replicas"),
        ({**VALUES, "replica": 2}, "replica"),
        ({**VALUES, "service": {"port": 8000, "affinity": "Sticky"}}, "affinity"),
    ],
)
def test_values_that_the_chart_does_not_know_are_refused(packages, values, says):
    assert says in render(packages, values)["error"]


def test_rays_manifest_is_what_ray_and_we_accept(packages):
    from ray.serve.schema import ServeDeploySchema

    from vllm_align_spec.cluster.judge import JudgeArgs
    from vllm_align_spec.cluster.serving import ServingArgs, checked

    manifest = yaml.safe_load((DEPLOY / "kuberay" / "rayservice.yaml").read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    arguments = {one.name: one.args for one in config.applications}
    JudgeArgs.model_validate(arguments["judge"])
    rewards = checked(ServingArgs.model_validate(arguments["llm"])).engine_kwargs["additional_config"]["align_spec"]
    route = next(one.route_prefix for one in config.applications if one.name == "judge")
    assert rewards["rewards"]["judge"]["url"].endswith(f":{config.http_options.port}{route}")
    cluster = manifest["spec"]["rayClusterConfig"]
    import ray

    assert cluster["rayVersion"] == ray.__version__
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **group["template"]}
        valid(packages, pod)


def test_the_images_copy_what_is_there_and_do_not_run_as_root():
    for file in (DEPLOY / "docker").iterdir():
        text = re.sub(r"\\\n\s*", "", file.read_text())
        assert "\nUSER 10001" in text, "it does not run as root"
        for line in text.splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                *sources, _ = shlex.split(line)[1:]
                assert all((ROOT / source).exists() for source in sources), line


def test_compose_mounts_what_is_there():
    folder = DEPLOY / "compose"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (folder / source).is_dir(), volume
    build = services["vllm"]["build"]
    assert (folder / build["context"] / build["dockerfile"]).is_file()
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["type"] == "prometheus"
