"""Drafting is lossless: the lab's drafters in the real engine, on both runners, against transformers and given laws."""

import json

import numpy as np
import pytest
from drafters import quantise, random_drafter, tiny_target, write
from engines import prompts
from laws import greedy
from scipy import stats
from table_model import BOS_ID, Table
from transformers import AutoConfig

from vllm_align_spec import lab
from vllm_align_spec.drafters.config import VARIANTS, read

DRAFTS = 4
RUNNERS = ["v1", "v2"]


@pytest.fixture(params=RUNNERS, scope="session")
def runner(request):
    return request.param


def speculative(folder, k=DRAFTS):
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": k}


@pytest.fixture
def start(engines, runner):
    def get(variant="fspad", **config):
        return engines(runner, speculative_config=speculative(lab.drafter_path(variant)), **config)

    return get


def check(engine, requests):
    """Runs a batch; greedy responses must be the target's own. Close calls must stay rare."""
    outputs = engine.generate(requests)
    close = total = 0
    for request, output in zip(requests, outputs, strict=True):
        if not request.get("params", {}).get("temperature"):
            total += len(output["tokens"])
            close += greedy("base", request["prompt"], output["tokens"], 0, len(output["tokens"]))
    assert close <= max(1, total // 100)
    return outputs


def ask(i, **params):
    return {"prompt": prompts()[i], "params": params}


def test_greedy_answers_are_the_targets_own_alone_and_together(start, runner):
    engine = start()
    count = 40 if runner == "v1" else 4
    check(engine, [ask(count, max_tokens=32)])
    check(engine, [ask(i, max_tokens=8 + i % 25) for i in range(count)])


@pytest.mark.slow
def test_greedy_answers_over_two_hundred_prompts(start, runner):
    if runner == "v2":
        pytest.skip("hours under the interpreter")
    check(start(), [ask(i, max_tokens=48) for i in range(200)])


def test_sampled_and_greedy_requests_share_a_batch(start):
    check(start(), [ask(i, max_tokens=16, temperature=float(i % 2), seed=i) for i in range(6)])


def test_several_choices_and_a_prompt_that_comes_again(start):
    engine = start()
    (first,) = check(engine, [ask(7, max_tokens=20)])
    (again,) = check(engine, [ask(7, max_tokens=20)])
    assert first["tokens"] == again["tokens"]
    # Nearly greedy: several greedy choices are refused.
    (both,) = engine.generate([ask(7, max_tokens=20, n=2, temperature=1e-3, seed=1)])
    assert len(both["choices"]) == 2
    for tokens in both["choices"]:
        assert greedy("base", prompts()[7], tokens, 0, 20) <= 1


@pytest.mark.slow
def test_preempted_requests_say_what_they_would_have_said(start, runner):
    blocks, count, length = (14, 6, 90) if runner == "v1" else (8, 4, 44)
    engine = start(num_gpu_blocks_override=blocks, enable_prefix_caching=False, max_model_len=224)
    outputs = check(engine, [ask(i, max_tokens=length) for i in range(count)])
    assert all(len(o["tokens"]) == length for o in outputs)


@pytest.mark.slow
def test_chunked_prefill_and_a_prompt_up_to_the_models_limit(start):
    engine = start(max_num_batched_tokens=64, max_model_len=256)
    long = {"prompt": (prompts()[0] * 20)[: 256 - 6], "params": {"max_tokens": 6}}
    outputs = check(engine, [ask(1, max_tokens=40), long, ask(2, max_tokens=40)])
    assert len(outputs[1]["tokens"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "fspad"])
def test_every_variant_is_lossless(start, runner, variant):
    count = 12 if runner == "v1" else 2
    check(start(variant), [ask(i, max_tokens=24) for i in range(count)])


@pytest.mark.slow
def test_asynchronous_scheduling_changes_nothing(start):
    check(start(async_scheduling=True), [ask(i, max_tokens=24) for i in range(4)])


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True, scope="session")
def test_samples_follow_the_targets_law(engines, runner, tmp_path_factory):
    """Three tokens after <bos> from a bigram table at temperature 1: their law can be written down."""
    table = Table(5)
    folder = tmp_path_factory.mktemp("law")
    target = table.write(folder / "target")
    drafter = random_drafter(AutoConfig.from_pretrained(target), "fspad", scale=3.0)
    write(drafter, folder / "drafter")
    engine = engines(
        runner,
        model=target,
        max_model_len=64,
        max_num_seqs=64,
        speculative_config=speculative(folder / "drafter", 3),
    )
    count = 2000 if runner == "v1" else 300
    requests = [{"prompt": [BOS_ID], "params": {"max_tokens": 3, "temperature": 1.0, "seed": i}} for i in range(count)]
    found = np.zeros((len(table.logits),) * 3)
    for output in engine.generate(requests):
        found[tuple(output["tokens"])] += 1
    step = table.logits.double().softmax(-1).numpy()
    expected = count * step[BOS_ID][:, None, None] * step[:, :, None] * step[None, :, :]
    enough = expected >= 8
    told = np.append(found[enough], found[~enough].sum())
    wanted = np.append(expected[enough], expected[~enough].sum())
    statistic = ((told - wanted) ** 2 / wanted).sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, len(told) - 1)


@pytest.mark.slow
def test_a_compiled_engine_drafts_too(engines):
    engine = engines(
        "v1",
        enforce_eager=False,
        speculative_config=speculative(lab.drafter_path("fspad")),
        per_request_spec_decode_metrics="summary",
    )
    steps = np.array([o["accepted"] for o in check(engine, [ask(i, max_tokens=24) for i in range(6)])]).sum(0)
    assert steps @ np.arange(DRAFTS + 1) / steps.sum() > 0.8  # drafts of garbage would be lossless, too


@pytest.mark.slow
def test_two_ranks_draft_what_one_drafts(engines):
    """A wrongly split drafter would still be lossless, so what counts here is how many of its drafts are accepted."""
    requests = [ask(i, max_tokens=32) for i in range(6)]
    accepted = []
    for size in (1, 2):
        engine = engines(
            "v1",
            tensor_parallel_size=size,
            speculative_config=speculative(lab.drafter_path("fspad")),
            per_request_spec_decode_metrics="summary",
        )
        steps = np.array([o["accepted"] for o in check(engine, requests)]).sum(0)
        accepted.append(steps @ np.arange(DRAFTS + 1) / steps.sum())
    assert accepted[0] > 0.8
    assert accepted[1] == pytest.approx(accepted[0], rel=0.05)


@pytest.mark.slow
def test_a_quantised_target_takes_a_drafter_that_is_not(engines, tmp_path):
    target = str(quantise(lab.model_path("base"), tmp_path / "int8"))
    requests = [ask(i, max_tokens=32) for i in range(6)]
    plain = engines("v1", model=target, dtype="bfloat16", speculative_config=None).generate(requests)
    engine = engines(
        "v1",
        model=target,
        dtype="bfloat16",
        speculative_config=speculative(lab.drafter_path("fspad")),
        per_request_spec_decode_metrics="summary",
    )
    drafted = engine.generate(requests)
    assert [o["tokens"] for o in drafted] == [o["tokens"] for o in plain]
    steps = np.array([o["accepted"] for o in drafted]).sum(0)
    assert steps @ np.arange(DRAFTS + 1) / steps.sum() > 0.8


@pytest.mark.slow
def test_a_steering_method_runs_while_fspad_drafts(engines):
    engine = engines("v1", speculative_config=speculative(lab.drafter_path("fspad")))
    grammar = {"json": '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'}
    params = {"temperature": 1.0, "max_tokens": 40, "grammar": grammar}
    steered = [{"prompt": prompts()[i], "asap": "adaptive", "seed": i, "params": dict(params)} for i in range(3)]
    outputs = engine.generate([*steered, ask(5, max_tokens=24)])
    assert greedy("base", prompts()[5], outputs[-1]["tokens"], 0, 24) <= 1
    assert all("error" not in o["report"] for o in outputs[:3])


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["v1"], indirect=True, scope="session")
def test_a_drafter_of_another_target_stops_the_start_and_names_both_sides(engines, runner, tmp_path):
    other = tiny_target("llama", tmp_path / "other")
    folder = write(random_drafter(other.config, "fspad"), tmp_path / "drafter")
    with pytest.raises(
        RuntimeError, match=r"drafter .*drafter does not fit target .*hidden_size is 128, the target's 256"
    ):
        engines("v1", speculative_config=speculative(folder))


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["v1"], indirect=True, scope="session")
def test_a_config_in_the_speculators_format_is_enough(engines, runner, tmp_path):
    shipped = lab.drafter_path("fspad")
    config = read(shipped).to_speculators(str(lab.model_path("base")), DRAFTS)
    (tmp_path / "model.safetensors").symlink_to(shipped / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(engines("v1", model=str(tmp_path), speculative_config=None), [ask(3, max_tokens=24)])
