"""Whatever a client writes into a request, it gets an answer or a 400, and the server lives on."""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import MESSAGES, PARTS, PROMPT, TOOLS_USED

NAN = float("nan")
OURS = {
    "wsd": ["shared", "shared", "shared", "shared", "handover", "on", "", 1, 0, ["shared"], 2.5],
    "wsd_gamma": [0.8, 0.5, 1, 1.0, 1e-9, 0, -1, 2, "0.5", NAN, [0.5], 1e308],
    "wsd_window": [1, 2, 6, 64, 0, 65, -3, 2.0, 2.5, "6", 10**18],
    "wsd_max_draft": [1, 3, 8, 512, 65536, 0, -1, 65537, "8", 1.5],
    "wsd_fallback": ["error", "base", "none", 1],
    "asap": ["adaptive", "exact", "weighted", "gcd", 1, ["exact"]],
    "asap_max_attempts": [1, 2, 0, 4097, "2"],
    "cards": ["on", "off", 1],
    "cards_reward": ["short", "good", "best", "", 1],
    "cards_threshold": [-1.0, 0, 1e9, NAN, "1"],
    "cards_entropy": [0, 0.5, 3.0, -1, 1e9],
    "cards_beta": [0.7, 1, 0, 1e9],
    "cards_top_k": [0, 40, -1, 10**9],
    "cards_max_tries": [1, 2, 3, 0, 1025, 2.0],
    "cards_candidates": [1, 2, 0, 65],
    "cards_fallback": ["error", "base", "first"],
    "bon": [1, 2, 3, 0, 257, "2"],
    "bon_reward": ["short", ["short", "good"], ["short", "short"], [], "best"],
    "bon_weights": [1.0, [1.0, 2.0], ["1"], NAN],
    "bon_reference": [0, 1, 2, -1],
    "bon_stop": [0.5, 1, 0, 2],
    "deal": ["on", 0],
    "deal_reward": ["short", ["short"]],
    "deal_top_k": [1, 2, 20, 21, 0],
    "deal_lookahead": [0, 1, 4, -1, 1025],
    "align_spec_trie": ["00"],
    "align_spec_strict": [0, 1, 2, "yes"],
    "align_spec_id": ["x"],
    "align_spec_first_token": [5],
    "align_spec_stop_ids": [[1, 2]],
    "wsd_": [1],
    "wsd_gama": [0.8],
    "unrelated": ["kept", 3, [1, 2]],
}
SAMPLING = {
    "temperature": [0, 0, 0.7, 1.5],
    "top_p": [1.0, 0.5],
    "top_k": [0, 5],
    "min_p": [0.0, 0.1],
    "seed": [0, 7, 2**31],
    "n": [1, 1, 2, 3],
    "stop": ["a", ["the", ", "], []],
    "stop_token_ids": [[5, 6], [], list(range(20, 90)), [4095], [99999]],
    "ignore_eos": [True, False],
    "min_tokens": [0, 1, 4],
    "presence_penalty": [0, 0, 0.5],
    "repetition_penalty": [1.0, 1.0, 1.1],
    "logit_bias": [{}, {"7": 3}],
    "bad_words": [[], ["desk"]],
    "allowed_token_ids": [[5, 6, 7]],
    "skip_special_tokens": [True, False],
    "include_stop_str_in_output": [True],
    "return_token_ids": [True],
    "use_beam_search": [False],
    "priority": [0],
    "cache_salt": ["salt"],
    "structured_outputs": [{"choice": ["yes", "no"]}],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
    "truncate_prompt_tokens": [5, 1],
}
COMPLETION = {"logprobs": [0, 2, 5], "echo": [True, False], "suffix": [None], "prompt_logprobs": [1]}
PROMPTS = [
    PROMPT,
    "A",
    "",
    [9],
    [9, 10],
    [9, 2],
    [PROMPT, "Another desk"],
    [[5, 6, 7], [8, 9]],
    "é🙂 " * 30,
    [5] * 1020,
    [5] * 1023,
]
CHAT = {"logprobs": [True, False], "top_logprobs": [0, 2], "echo": [True], "add_generation_prompt": [True, False]}
CONVERSATIONS = [
    MESSAGES,
    [{"role": "system", "content": "Be brief."}, *MESSAGES],
    [*MESSAGES, {"role": "assistant", "content": "First"}],
    [{"role": "user", "content": ""}],
    PARTS,
    TOOLS_USED,
    [{"role": "assistant"}, *MESSAGES],
]


JUDGED = [
    {"cards": "on", "cards_reward": "short", "cards_threshold": -1.0, "cards_entropy": 0.5, "cards_max_tries": 3},
    {"cards": "on", "cards_reward": "good", "cards_threshold": 0.0, "cards_max_tries": 2},
    {"bon": 2, "bon_reward": "short"},
    {"bon": 2, "bon_reward": ["short", "good"], "bon_reference": 1},
    {"deal": "on", "deal_reward": "short", "deal_top_k": 2, "deal_lookahead": 2},
]

GRAMMARS = [
    {"regex": "[01]{2}"},
    {"regex": "[01]*"},
    {"choice": ["yes", "no"]},
    {"json": {"type": "object"}},
    {"grammar": 'root ::= "a" root | "b"'},
    {"grammar": "root ::= ("},
    {"regex": "[01]{50}"},
]


def some(rng, table, chance):
    return {key: rng.choice(values) for key, values in table.items() if rng.random() < chance}


def build(rng, chance):
    """One request: path and body, with each of our options, mostly a wrong one, by this chance."""
    body = {"model": "base", "max_tokens": rng.choice([1, 3, 6, 7, 8, 8, 9, 12]), **some(rng, SAMPLING, 0.03)}
    body["vllm_xargs"] = {"wsd": "shared"} if rng.random() < 0.6 else {}
    if rng.random() < 0.15:
        body["vllm_xargs"] = {"asap": rng.choice(["adaptive", "exact", "weighted"]), "asap_max_attempts": 2}
        body |= {"temperature": rng.choice([0.5, 1.0]), "structured_outputs": rng.choice(GRAMMARS)}
    if rng.random() < 0.2:
        body["vllm_xargs"] = dict(rng.choice(JUDGED))
        body["temperature"] = 0 if "deal" in body["vllm_xargs"] else 1.0
    body["vllm_xargs"] |= some(rng, OURS, chance)
    body["stream"] = rng.random() < 0.5
    if rng.random() < 0.5:
        path = "/v1/chat/completions"
        body |= {"messages": rng.choice([*[MESSAGES] * 4, *CONVERSATIONS]), **some(rng, CHAT, 0.1)}
    else:
        path = "/v1/completions"
        body |= {"prompt": rng.choice([*[PROMPT] * 9, *PROMPTS]), **some(rng, COMPLETION, 0.1)}
    if body.keys() & {"structured_outputs", "response_format"}:
        # A grammar that is over while its end is forbidden leaves no legal token, nor does one whose letters end the
        # response, since xgrammar keeps those for the end: vLLM's own 500.
        for key in ("min_tokens", "allowed_token_ids", "bad_words", "stop_token_ids"):
            body.pop(key, None)
    return path, body


def post(server, path, body):
    """Status, and the error that a stream carried, if any."""
    request = urllib.request.Request(
        server.root + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=180) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    if body["stream"]:
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]
        errors = [event for event in events if "error" in json.loads(event)]
        assert text.rstrip().endswith("data: [DONE]"), text[-300:]
        # Refused behind our admission, by vLLM alone: its streams say so in an event.
        return (json.loads(errors[0])["error"]["code"], errors[0]) if errors else (200, "")
    return 200, ""


def hammer(server, count, seed, chance=0.02):
    rng = random.Random(seed)
    requests = [build(rng, chance) for _ in range(count)]
    began = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: post(server, *request), requests))
    # A grammar that the model does not obey in as many attempts as the client allows is a result of its own, and so is
    # an answer that is too long for the judge.
    fine = {(200, False), (400, False), (200, True), (400, True), (422, True)}
    unusual = [not {"asap", "cards", "bon"}.isdisjoint(body["vllm_xargs"]) for _, body in requests]
    wrong = [(r, a) for r, a, u in zip(requests, answers, unusual, strict=True) if (a[0], u) not in fine]
    statuses = Counter(status for status, _ in answers)
    reasons = Counter(answer[:60] for status, answer in answers if status == 400)
    print(f"{count} requests in {time.monotonic() - began:.0f} s: {dict(statuses)}, {len(reasons)} kinds of refusal")
    assert not wrong, f"{len(wrong)} of {count}, first: {wrong[0]}"
    assert server.process.poll() is None
    assert server.get("/health")[0] == 200
    # Neither all refused nor all let through: the sets are worth something.
    assert (0.15 if chance < 0.05 else 0.03) * count < statuses[200] < 0.95 * count
    server.wait_idle()
    assert server.complete(max_tokens=4).usage.completion_tokens == 4


def test_a_thousand_random_requests_get_200_or_400(server):
    hammer(server, 1000, seed=1)


@pytest.mark.slow
def test_ten_thousand_random_requests_get_200_or_400(server):
    hammer(server, 10_000, seed=2)


@pytest.mark.slow
def test_ninety_thousand_requests_that_are_mostly_wrong_get_200_or_400(server):
    hammer(server, 90_000, seed=3, chance=0.08)


def test_a_plain_request_with_top_k_does_not_end_the_engine(server):
    server.wait_idle()  # alone: its first step has no draft tokens
    response = server.complete(temperature=0.7, max_tokens=4, extra_body={"top_k": 5, "ignore_eos": True})
    assert response.usage.completion_tokens == 4
