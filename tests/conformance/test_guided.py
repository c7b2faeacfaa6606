"""ARGS, DeRa, PAD and GenARM inside the real engine, on both runners, against loops that encode everything anew."""

import re

import pytest
import torch
from engines import judge, prompts, reference
from laws import greedy

RUNNERS = ["v1", "v2"]
CLOSE = 1e-3
"""Scores this near to each other may swap places: the engine's batches have other shapes than the reference's."""


@pytest.fixture(params=RUNNERS, scope="session")
def runner(request):
    return request.param


@pytest.fixture
def engine(engines, runner):
    return engines(runner)


@torch.no_grad()
def logits_of(name, prompt, tokens):
    """[len(tokens), V]: those that each token was chosen from."""
    return reference(name)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()


@torch.no_grad()
def rewards_of(name, prefix, candidates):
    """[k] of each candidate at its own position, by encoding everything anew."""
    model = judge(name)
    hidden = model.model(input_ids=torch.tensor([[*prefix, candidate] for candidate in candidates])).last_hidden_state
    return model.score(hidden[:, -1])[:, 0].float()


def args_law(prompt, tokens, names, weights, top_k, gate=0.0):
    """How many of greedy ARGS' tokens are close calls; the others are asserted."""
    close = 0
    for t, (z, chosen) in enumerate(zip(logits_of("base", prompt, tokens), tokens, strict=True)):
        values, candidates = z.topk(top_k)
        score = values.clone()
        if torch.special.entr(z.softmax(-1)).sum() > gate:
            for name, weight in zip(names, weights, strict=True):
                score += weight * rewards_of(name, prompt + tokens[:t], candidates.tolist())
        best = score.max()
        if (score > best - CLOSE).sum() > 1:
            close += 1
            continue
        assert chosen == candidates[score.argmax()], (t, chosen, candidates, score)
    return close


def rows_law(prompt, tokens, formula):
    """As `args_law`, for methods over whole rows: formula(base logits [V], companion logits [V]) -> [V]."""
    base, aligned = logits_of("base", prompt, tokens), logits_of("pilot", prompt, tokens)
    close = 0
    for t, chosen in enumerate(tokens):
        score = formula(base[t], aligned[t])
        if (score > score.max() - CLOSE).sum() > 1:
            close += 1
            continue
        assert chosen == score.argmax(), (t, chosen, score.topk(3))
    return close


def args(prompt, names=("judge",), weights=(1.0,), top_k=5, gate=0.0, **params):
    options = {"args_weight": list(weights), "args_top_k": top_k, "args_entropy_gate": gate}
    return {"prompt": prompt, "guided": ("args", list(names), options), "params": params}


def lm(method, prompt, arguments, **params):
    return {"prompt": prompt, "guided": (method, ["pilot"], arguments), "params": params}


def check(requests, outputs):
    """Every plain neighbour is what the base model says alone, and every guided request was guided."""
    for request, output in zip(requests, outputs, strict=True):
        if "guided" in request:
            (report,) = output["report"].values()
            assert "error" not in report
            assert report["unanswered"] == 0
            assert report["rows"] >= len(output["tokens"]) or request["guided"][2].get("args_entropy_gate")
        else:
            assert greedy("base", request["prompt"], output["tokens"], 0, len(output["tokens"])) <= 1


def test_args_takes_the_tokens_of_the_published_loop(engine):
    requests = [
        args(prompts()[0]),
        args(prompts()[1], top_k=10, weights=[1.5]),
        {"prompt": prompts()[2]},
        args(prompts()[3], ("judge", "judge-other"), (0.7, -0.4), 3),
        args(prompts()[4], weights=[0.0]),
        args(prompts()[5], weights=[2.0], gate=0.5),
    ]
    outputs = engine.generate(requests)
    check(requests, outputs)
    close = total = 0
    for request, output in zip(requests, outputs, strict=True):
        if "guided" in request:
            _, names, options = request["guided"]
            close += args_law(
                request["prompt"], output["tokens"], names, options["args_weight"], options["args_top_k"],
                options["args_entropy_gate"],
            )  # fmt: skip
            total += len(output["tokens"])
    assert close <= max(2, total // 20)


def test_the_ends_of_the_knobs_are_plain_decoding_and_the_companion_itself(engine):
    requests = [
        args(prompts()[6], weights=[0.0], top_k=40),
        lm("dera", prompts()[6], {"dera_lambda": 0.0}),
        lm("genarm", prompts()[6], {"genarm_alpha": 0.0}),
        lm("pad", prompts()[6], {"pad_weight": 0.0, "pad_top_k": 10}),
        lm("dera", prompts()[6], {"dera_lambda": 1.0}),
    ]
    outputs = engine.generate(requests)
    for output in outputs[:4]:
        assert greedy("base", prompts()[6], output["tokens"], 0, len(output["tokens"])) <= 1
    assert greedy("pilot", prompts()[6], outputs[4]["tokens"], 0, len(outputs[4]["tokens"])) <= 1
    assert outputs[4]["tokens"] != outputs[1]["tokens"]


def test_formulas_over_whole_rows(engine):
    def pad(base, aligned):
        values, token = base.topk(10)
        score = torch.full_like(base, -torch.inf)
        score[token] = values + 1.3 * (aligned[token].log_softmax(-1) - values.log_softmax(-1))
        return score

    cases = [
        ("dera", {"dera_lambda": 0.5}, lambda b, a: 0.5 * b + 0.5 * a),
        ("dera", {"dera_lambda": 1.7}, lambda b, a: 1.7 * a - 0.7 * b),
        ("genarm", {"genarm_alpha": 0.8}, lambda b, a: b.log_softmax(-1) + 0.8 * a.log_softmax(-1)),
        ("pad", {"pad_weight": 1.3, "pad_top_k": 10}, pad),
    ]
    requests = [lm(method, prompts()[7 + i], arguments) for i, (method, arguments, _) in enumerate(cases)]
    requests.append({"prompt": prompts()[11]})
    outputs = engine.generate(requests)
    check(requests, outputs)
    close = 0
    for request, output, (_, _, formula) in zip(requests, outputs, cases, strict=False):
        close += rows_law(request["prompt"], output["tokens"], formula)
    assert close <= 3


def test_a_companion_with_a_prompt_of_its_own(engine):
    persona = prompts()[12]
    prompt = prompts()[13]
    (output,) = engine.generate([{**lm("dera", prompt, {"dera_lambda": 1.0}), "own_prompt": persona}])
    # At lambda = 1 only the companion decides: its own greedy answer to its own prompt.
    assert greedy("pilot", persona, output["tokens"], 0, len(output["tokens"])) <= 1


def test_guidance_stays_within_a_grammar(engine):
    grammar = {"regex": "(yes|no|maybe)( (yes|no|maybe)){2}"}
    requests = [
        args(prompts()[14], weights=[-3.0], top_k=5, grammar=grammar, ignore_eos=False),
        lm("dera", prompts()[14], {"dera_lambda": 1.5}, grammar=grammar, ignore_eos=False),
    ]
    from engines import tokenizer

    for output in engine.generate(requests):
        text = tokenizer().decode(output["tokens"], skip_special_tokens=True)
        assert re.fullmatch(grammar["regex"], text), text


def test_samples_stay_among_the_top_k(engine):
    requests = [args(prompts()[15], top_k=2, temperature=1.0, seed=seed) for seed in range(3)]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        tops = logits_of("base", request["prompt"], output["tokens"]).topk(2)
        outside = [t not in top for t, top in zip(output["tokens"], tops.indices.tolist(), strict=True)]
        assert sum(outside) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("speculative", [None], ids=["without speculation"])
def test_args_without_speculation(engines, runner, speculative):
    engine = engines(runner, speculative_config=speculative)
    requests = [args(prompts()[0]), args(prompts()[1], top_k=10, weights=[1.5]), {"prompt": prompts()[2]}]
    outputs = engine.generate(requests)
    check(requests, outputs)
    assert args_law(prompts()[0], outputs[0]["tokens"], ["judge"], [1.0], 5) <= 2
    assert args_law(prompts()[1], outputs[1]["tokens"], ["judge"], [1.5], 10) <= 2


@pytest.mark.slow
def test_preempted_requests_keep_to_the_law(engines, runner):
    # So few blocks of 32 tokens cannot hold what the requests need together.
    blocks, count, length = (14, 6, 90) if runner == "v1" else (8, 4, 44)
    engine = engines(runner, num_gpu_blocks_override=blocks, enable_prefix_caching=False, max_model_len=224)
    requests = [args(p, max_tokens=length) for p in prompts()[:count]]
    outputs = engine.generate(requests)
    check(requests, outputs)
    assert sum(args_law(p, o["tokens"], ["judge"], [1.0], 5) for p, o in zip(prompts(), outputs, strict=False)) <= 20
    assert any(output["report"]["args"]["preempted"] for output in outputs), "the test shows nothing"
    assert all(len(output["tokens"]) == length for output in outputs)
