"""The drafter's equations against an implementation of their own, chains, and what is refused."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from vllm_align_spec import doctor
from vllm_align_spec.drafters import ARCHITECTURE, from_speculators
from vllm_align_spec.drafters.config import (
    VARIANTS,
    DrafterError,
    check_target,
    check_tensors,
    for_target,
    from_hf,
    of_engine,
    read,
    shapes,
)
from vllm_align_spec.drafters.fspad import Drafter, Past

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}


def drafter(variant, config=None, **sizes):
    torch.manual_seed(3)
    config = config or LlamaConfig(**{**SIZES, **sizes})
    made = Drafter(for_target(config.to_dict(), variant)).eval()
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.2)
    return made


# An implementation of its own, row by row and head by head, from the equations as METHODS and the papers give them.


def norm(x, w, eps=1e-6):
    return x / torch.sqrt((x * x).mean() + eps) * w


def silu(x):
    return x / (1 + torch.exp(-x))


def rotated(x, position, theta=10000.0):
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half) / half)
    first, second = x[:half], x[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def row_s(w, e, f, variant):
    fc = "fc" if VARIANTS[variant][0] == "none" else "fc.fc"
    u = w[f"{fc}.weight"] @ torch.cat([e, f]) + w[f"{fc}.bias"]
    if VARIANTS[variant][0] == "none":
        return u
    normed = norm(u, w["fc.post_attention_layernorm.weight"])
    if VARIANTS[variant][0] == "gated":
        inner = silu(w["fc.mlp.gate_proj.weight"] @ e) * (w["fc.mlp.up_proj.weight"] @ normed)
    else:
        shared = w["fc.mlp.input_layernorm.weight"]
        inner = silu(w["fc.mlp.up_proj.weight"] @ torch.cat([norm(normed, shared), norm(e, shared)]))
    return u + w["fc.mlp.down_proj.weight"] @ inner


def independent(model, rows, variant):
    """(p, r) of the last of a list of (e, f, position); the rows before it are its context."""
    c, w = model.config, {name: x.detach() for name, x in model.state_dict().items()}
    s = [row_s(w, e, f, variant) for e, f, _ in rows]
    d, groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads

    def project(name, x):
        found = w[f"layers.0.self_attn.{name}_proj.weight"] @ x
        if c.qkv_bias:
            found = found + w[f"layers.0.self_attn.{name}_proj.bias"]
        heads = list(found.view(-1, d))
        return (
            [norm(h, w[f"layers.0.self_attn.{name}_norm.weight"]) for h in heads]
            if c.qk_norm and name != "v"
            else heads
        )

    out = []
    for head in range(c.num_attention_heads):
        q = rotated(project("q", s[-1])[head], rows[-1][2])
        scores = torch.stack(
            [q @ rotated(project("k", x)[head // groups], at) / d**0.5 for x, (_, _, at) in zip(s, rows, strict=True)]
        ).softmax(0)
        out.append(sum(weight * project("v", x)[head // groups] for weight, x in zip(scores, s, strict=True)))
    a = s[-1] + w["layers.0.self_attn.o_proj.weight"] @ torch.cat(out)
    n = norm(a, w["layers.0.post_attention_layernorm.weight"])
    mlp = w["layers.0.mlp.down_proj.weight"] @ (
        silu(w["layers.0.mlp.gate_proj.weight"] @ n) * (w["layers.0.mlp.up_proj.weight"] @ n)
    )
    h = c.hidden_size
    return (a + mlp[:h], a + mlp[h:]) if VARIANTS[variant][1] else (a + mlp, a + mlp)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_is_the_equations(variant):
    model, e, f = drafter(variant), torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    with torch.no_grad():
        p, r = model(e, f)
    rows = [(e[0, i], f[0, i], i) for i in range(6)]
    for i in range(6):
        wanted_p, wanted_r = independent(model, rows[: i + 1], variant)
        torch.testing.assert_close(p[0, i], wanted_p, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(r[0, i], wanted_r, atol=1e-4, rtol=1e-4)
    assert torch.equal(p, r) == (not VARIANTS[variant][1])


@pytest.mark.parametrize("variant", ["fspad", "griffin", "eagle"])
def test_every_row_of_a_chain_is_a_draft_step_after_the_targets(variant):
    """Row i of pass j is step j of the chain from i - j + 1: the target's rows to there, then the chain's own."""
    model, length, passes = drafter(variant), 7, 4
    e, f = torch.randn(1, length, 32), torch.randn(1, length, 32)
    with torch.no_grad():
        chain = model.chain(e, f, passes)
    for origin in range(length - passes):
        rows = [(e[0, i], f[0, i], i) for i in range(origin + 1)]
        for j in range(passes):
            p, r = independent(model, rows, variant)
            torch.testing.assert_close(chain[j][0][0, origin + j], p, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(chain[j][1][0, origin + j], r, atol=1e-3, rtol=1e-3)
            at = origin + j + 1
            rows.append((e[0, at], r, at))


@pytest.mark.parametrize(
    ("config", "bias", "norms"),
    [
        (Qwen2Config(**SIZES), True, False),
        (Qwen3Config(**SIZES, head_dim=16), False, True),
        (LlamaConfig(**{**SIZES, "num_key_value_heads": 1}), False, False),
    ],
)
def test_attention_is_the_targets(config, bias, norms):
    model = drafter("fspad", config)
    assert (model.config.qkv_bias, model.config.qk_norm) == (bias, norms)
    e, f = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    with torch.no_grad():
        p, r = model(e, f)
    wanted = independent(model, [(e[0, i], f[0, i], i) for i in range(5)], "fspad")
    torch.testing.assert_close(torch.stack([p[0, -1], r[0, -1]]), torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_padding_on_the_right_changes_nothing():
    model, e, f = drafter("fspad"), torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    with torch.no_grad():
        whole = model.chain(e, f, 3)
        short = model.chain(e[:, :5], f[:, :5], 3)
    for (p, _), (q, _) in zip(whole, short, strict=True):
        torch.testing.assert_close(p[:, :5], q, atol=1e-5, rtol=1e-5)


def test_passes_feed_back_no_gradient():
    model, e, f = drafter("fspad"), torch.randn(1, 6, 32), torch.randn(1, 6, 32)

    def gradient(p):
        (found,) = torch.autograd.grad(p.sum(), [model.fc.fc.weight], retain_graph=True)
        return found

    (_, (chained, _)) = model.chain(e, f, 2)
    past = Past()
    _, r = model(e, f, past)
    fed = torch.nn.functional.pad(r, (0, 0, 1, 0))[:, :-1]
    through, _ = model(e, fed, Past(list(past.keys), list(past.values)))
    constant, _ = model(e, fed.detach(), past)
    found = gradient(chained)
    torch.testing.assert_close(found, gradient(constant))
    assert (found - gradient(through)).abs().max() > 1e-3 * found.abs().max()


# Checkpoints -----------------------------------------------------------------------------------------------------


def write(model, folder, config=None, **changes):
    folder.mkdir(exist_ok=True)
    tensors = {**model.state_dict(), **changes}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or model.config.to_hf()))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_config(variant, tmp_path):
    model = drafter(variant)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == model.config.tensors()
    assert model.config.parameters() == sum(x.numel() for x in model.parameters())
    assert model.config.variant == variant
    assert read(write(model, tmp_path / "d")) == model.config
    assert shapes(tmp_path / "d") == model.config.tensors()


def published(model):
    """What the published code writes beside its tensors: a Llama's config."""
    keep = (*SIZES, "rms_norm_eps", "rope_parameters", "num_hidden_layers", "model_type")
    return {key: value for key, value in model.config.to_hf().items() if key in keep}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_published_checkpoint_says_its_variant_by_its_tensors(variant, tmp_path):
    model = drafter(variant)
    extra = {"embed_tokens.weight": torch.zeros(50, 32), "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    folder = write(model, tmp_path / "d", published(model), **extra)
    assert read(folder) == model.config


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_older_configs_say_the_scaling_of_rope_otherwise(name, tmp_path):
    model = drafter("griffin")
    config = {key: value for key, value in published(model).items() if key != "rope_parameters"}
    config |= {"rope_theta": 5e5, "rope_scaling": {name: "linear", "factor": 4.0}}
    found = read(write(model, tmp_path / "d", config))
    assert found.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_published_names_are_these():
    """Spelled out, so that a renaming shows: the keys of FSPAD's and GRIFFIN's public code."""
    layer = [
        "layers.0.mlp.down_proj.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.post_attention_layernorm.weight",
        *(f"layers.0.self_attn.{x}_proj.weight" for x in "koqv"),
    ]
    fspad = ["down_proj", "gate_proj", "up_proj"]
    assert sorted(drafter("fspad").config.tensors()) == [
        "fc.fc.bias",
        "fc.fc.weight",
        *(f"fc.mlp.{x}.weight" for x in fspad),
        "fc.post_attention_layernorm.weight",
        *layer,
    ]
    assert sorted(drafter("griffin").config.tensors()) == [
        "fc.fc.bias",
        "fc.fc.weight",
        *(f"fc.mlp.{x}.weight" for x in ("down_proj", "input_layernorm", "up_proj")),
        "fc.post_attention_layernorm.weight",
        *layer,
    ]
    assert sorted(drafter("eagle").config.tensors()) == ["fc.bias", "fc.weight", *layer]


def test_every_misfit_is_named_with_both_sides(tmp_path):
    model = drafter("fspad")
    folder = write(
        model,
        tmp_path / "d",
        **{
            "fc.fc.bias": None,
            "fc.mlp.gate_proj.weight": torch.zeros(47, 32),
            "lm_head.weight": torch.zeros(50, 32),
            "embed_tokens.weight": torch.zeros(51, 32),
        },
    )
    with pytest.raises(DrafterError) as error:
        read(folder)
    for part in (
        "fc.fc.bias [32] is missing",
        "fc.mlp.gate_proj.weight is [47, 32], its config asks for [48, 32]",
        "lm_head.weight [50, 32] is unknown to a fspad drafter",
        "embed_tokens.weight is [51, 32], its config asks for [50, 32]",
        str(folder),
    ):
        assert part in str(error.value)


def test_a_variant_that_is_not_the_tensors_is_refused():
    model = drafter("fspad")
    claimed = {**model.config.to_hf(), "partial_alignment": False}
    with pytest.raises(DrafterError, match=r"layers.0.mlp.down_proj.weight is \[64, 48\].*\[32, 48\]"):
        check_tensors(from_hf(claimed, model.config.tensors(), "d"), model.config.tensors(), "d")


def test_another_target_is_refused_and_both_are_named():
    config = drafter("fspad").config
    check_target(config, "d", target="t", hidden_size=32, vocab_size=50)
    with pytest.raises(DrafterError, match=r"drafter d.*target t.*hidden_size is 32, the target's 64.*50.*99"):
        check_target(config, "d", target="t", hidden_size=64, vocab_size=99)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"feature_sampling": "other"}, "feature_sampling: 'other'"),
        ({"intermediate_size": 0}, "intermediate_size"),
    ],
)
def test_a_config_that_describes_no_drafter_is_refused(config, why):
    with pytest.raises(DrafterError, match=why):
        from_hf({**drafter("fspad").config.to_hf(), **config}, {}, "d")


def test_what_cannot_be_read_off_tensors_must_be_said():
    with pytest.raises(DrafterError, match=r"feature_sampling: missing.*partial_alignment: missing"):
        from_hf(published(drafter("fspad")), {}, "hub/name")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\xff" * 40])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    write(drafter("fspad"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DrafterError, match=r"model\.safetensors is no safetensors file"):
        read(tmp_path)


def test_a_folder_with_other_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DrafterError, match="safetensors"):
        read(tmp_path)


def engine(folder, config, hidden_size=32, vocab_size=50):
    hf = SimpleNamespace(to_dict=lambda: config)
    return SimpleNamespace(
        draft_model_config=SimpleNamespace(model=str(folder), hf_config=hf, architectures=[ARCHITECTURE]),
        target_model_config=SimpleNamespace(
            model="target", get_hidden_size=lambda: hidden_size, get_vocab_size=lambda: vocab_size
        ),
    )


def test_an_engines_drafter_is_held_against_its_target_and_its_file(tmp_path):
    model = drafter("griffin")
    folder = write(model, tmp_path / "d")
    assert of_engine(engine(folder, model.config.to_hf())) == model.config
    with pytest.raises(DrafterError, match="vocab_size is 50, the target's 4096"):
        of_engine(engine(folder, model.config.to_hf(), vocab_size=4096))
    write(model, tmp_path / "d", **{"fc.fc.bias": torch.zeros(7)})
    with pytest.raises(DrafterError, match=r"fc.fc.bias is \[7\]"):
        of_engine(engine(folder, model.config.to_hf()))


def test_the_speculators_format_names_target_method_and_length():
    config = drafter("fspad").config
    written = config.to_speculators("org/target", 4)
    layer = written["transformer_layer_config"]
    from_speculators(written, layer)
    assert layer["architectures"] == [ARCHITECTURE]
    assert from_hf(layer, {}, "d") == config
    with pytest.raises(ValueError, match="EagleSpeculator"):
        from_speculators({**written, "architectures": ["EagleSpeculator"]}, {})


def test_an_unknown_variant_is_refused_with_those_there_are():
    with pytest.raises(DrafterError, match="no-feature-sampling"):
        for_target(LlamaConfig(**SIZES).to_dict(), "medusa")


def test_registering_names_the_drafter_and_its_format_to_vllm():
    code = """
        from vllm_align_spec.plugin import register
        register()
        import sys
        assert "torch" not in sys.modules
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES
        register()
        found = ModelRegistry.models["EagleFspadForCausalLM"]
        print(found.module_name, found.class_name, SUPPORTED_SPECULATORS_TYPES["eagle"].__name__)
        assert "vllm_align_spec.drafters.served" not in sys.modules
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert told.stdout.split() == ["vllm_align_spec.drafters.served", "EagleFspadForCausalLM", "from_speculators"], (
        told.stderr
    )


def test_the_doctor_holds_a_drafter_against_the_model(tmp_path):
    target = LlamaConfig(**SIZES)
    target.save_pretrained(tmp_path / "target")
    folder = write(drafter("eagle"), tmp_path / "d")
    (fits,) = doctor._drafter(str(tmp_path / "target"), str(folder))
    assert (fits.state, "eagle" in fits.detail) == ("ok", True)
    LlamaConfig(**{**SIZES, "vocab_size": 51}).save_pretrained(tmp_path / "other")
    (misfit,) = doctor._drafter(str(tmp_path / "other"), str(folder))
    assert misfit.state == "problem"
    assert "vocab_size is 50, the target's 51" in misfit.detail
