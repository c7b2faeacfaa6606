"""The ledger: what it says is what is in vLLM, applying it is safe, and unknown source is refused."""

import importlib
import subprocess
import sys
import textwrap

import pytest

from vllm_align_spec import patches
from vllm_align_spec.patches import ABSENT, Patch, PatchMismatchError, fingerprint, install
from vllm_align_spec.patches.ledger import LEDGER
from vllm_align_spec.plugin import HOOKS


def original(patch):
    owner = importlib.import_module(patch.module)
    *path, name = patch.symbol.split(".")
    for part in path:
        owner = getattr(owner, part)
    found = getattr(owner, name, None)
    if getattr(found, "__align_spec_patch__", None):
        return getattr(found, "__wrapped__", None)
    return found


@pytest.mark.parametrize("patch", LEDGER, ids=lambda p: p.name)
def test_the_symbol_is_in_this_vllm_as_it_was_verified(patch):
    assert fingerprint(original(patch)) in patch.fingerprints.values()


@pytest.mark.parametrize("patch", LEDGER, ids=lambda p: p.name)
def test_a_record_is_complete(patch):
    assert set(patch.fingerprints) == {"0.32", "0.33"}
    for text in (patch.why, patch.how, patch.removable_when):
        assert len(text) > 15
    assert patch.upstream.startswith("https://")


def test_names_are_distinct_and_hooks_belong_to_patches():
    names = [p.name for p in LEDGER]
    assert len(set(names)) == len(names)
    assert set(HOOKS) <= set(names)
    for hook in HOOKS.values():
        module, _, function = hook.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def make(tmp_path, monkeypatch, name, source, known):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patches, "STATE", {})

    def wrap(function, hook):
        def replacement():
            return "wrapped " + (function() if function else "nothing")

        return replacement

    return Patch(name, name, "f", "because it must", "by wrapping it", "https://x", "when it can go", known, wrap)


def test_a_patch_waits_for_its_module_and_applies_once(tmp_path, monkeypatch):
    source = "def f():\n    return 'original'\n"
    patch = make(tmp_path, monkeypatch, "waits_for_import", source, {"1": ""})
    spec = importlib.util.spec_from_file_location("_probe", tmp_path / "waits_for_import.py")
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    patch.fingerprints["1"] = fingerprint(probe.f)
    install([patch], {})
    assert patches.STATE == {"waits_for_import": "pending"}
    module = importlib.import_module("waits_for_import")
    assert module.f() == "wrapped original"
    assert patches.STATE == {"waits_for_import": "applied"}
    install([patch], {})
    patches.STATE.clear()
    install([patch], {})
    assert module.f() == "wrapped original"


def test_unknown_source_is_refused_at_import_and_names_both_sides(tmp_path, monkeypatch):
    patch = make(tmp_path, monkeypatch, "has_changed", "def f():\n    return 'changed'\n", {"1": "0123456789abcdef"})
    install([patch], {})
    with pytest.raises(PatchMismatchError, match=r"has_changed.*0123456789abcdef"):
        importlib.import_module("has_changed")
    sys.modules.pop("has_changed", None)


def test_unknown_source_is_only_warned_about_if_the_operator_says_so(tmp_path, monkeypatch, caplog):
    patch = make(tmp_path, monkeypatch, "changed_too", "def f():\n    return 'changed'\n", {"1": "0123456789abcdef"})
    install([patch], {}, allow_unverified=True)
    assert importlib.import_module("changed_too").f() == "wrapped changed"
    assert patches.STATE["changed_too"].startswith("unverified")


def test_a_fingerprint_sees_code_and_not_layout(tmp_path, monkeypatch):
    sources = {
        "layout_a": "def f(x):\n    'Says.'\n    return x + 1  # one\n",
        "layout_b": "def f( x ):\n    return (x\n        + 1)\n",
        "layout_c": "def f(x):\n    return x + 2\n",
    }
    found = {}
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
        found[name] = fingerprint(importlib.import_module(name).f)
    assert found["layout_a"] == found["layout_b"] != found["layout_c"]
    assert fingerprint(None) == ABSENT


def test_registering_is_light_and_idempotent():
    code = """
        import sys
        from vllm_align_spec.plugin import register
        register(); register()
        print(sorted({"torch", "vllm", "transformers", "ray", "triton", "pydantic", "numpy"} & set(sys.modules)))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_kill_switch_of_the_environment_leaves_vllm_alone():
    code = "from vllm_align_spec import patches, plugin; plugin.register(); print(patches.STATE)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"VLLM_ALIGN_SPEC_DISABLE": "1"}
    )
    assert out.stdout.strip() == "{}"
