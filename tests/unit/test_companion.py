"""The companion says what a plain forward pass over the whole sequence says, whatever happened to its requests."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from vllm_align_spec import lab
from vllm_align_spec.companion.model import BLOCK, Companion
from vllm_align_spec.options import CompanionOptions, OptionError
from vllm_align_spec.processors.args import ArgsProcessor
from vllm_align_spec.processors.dera import DeraProcessor
from vllm_align_spec.processors.rows import Layout, Rows
from vllm_align_spec.strategies.guided import digests

ROWS, SLOTS, VOCAB, K = 4, 6, 4096, 5
TOLERANCE = 2e-4


def companion(role="reward", model=None, **more):
    settings = {"slots": SLOTS, "rows": ROWS, "entries": 64, "max_len": 320, **more}
    limits = {key: settings.pop(key) for key in ("max_slots", "max_candidates") if key in settings}
    model = model or str(lab.model_path("judge" if role == "reward" else "pilot"))
    options = CompanionOptions(model=model, role=role, dtype="float32", **{"max_candidates": K, **limits})
    return Companion("c", options, device=torch.device("cpu"), dtype=torch.float32, **settings)


@pytest.fixture(scope="module")
def judge():
    return companion()


@pytest.fixture(scope="module")
def pilot():
    return companion("lm")


def recorded(second):
    second.record(ROWS)
    return second


@pytest.fixture(scope="module")
def recorded_judge():
    return recorded(companion())


@pytest.fixture(scope="module")
def recorded_pilot():
    return recorded(companion("lm"))


@pytest.fixture(scope="module")
def plain_judge():
    path = lab.model_path("judge")
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain_pilot():
    return AutoModelForCausalLM.from_pretrained(lab.model_path("pilot"), dtype=torch.float32).eval()


@torch.inference_mode()
def reward(model, tokens):
    """At the last token itself, be it the padding token or not."""
    return model.score(model.model(input_ids=torch.tensor([tokens])).last_hidden_state)[0, -1, 0].item()


@torch.inference_mode()
def next_logits(model, tokens):
    return model(input_ids=torch.tensor([tokens])).logits[0, -1]


class Followed:
    """One request, as an engine would drive it."""

    def __init__(self, entry, prompt, shift=0):
        self.entry, self.sequence, self.shift, self.prompt = entry, list(prompt), shift, list(prompt)

    def enter(self, second):
        """``shift`` tokens more stand before what the target knows."""
        n = len(self.prompt)
        known = torch.tensor(self.sequence)
        second.enter(self.entry, known[:n], known[n:], n - self.shift, digests(self.prompt, ""))


def step(second, requests, drafts, candidates):
    """Rewards [S, L, k], or logits [S, L, V'], of each request's chain."""
    width = max(map(len, drafts)) + 1
    chain = torch.zeros(len(requests), width, dtype=torch.int64)
    for line, (request, drafted) in enumerate(zip(requests, drafts, strict=True)):
        chain[line, : 1 + len(drafted)] = torch.tensor([request.sequence[-1], *drafted])
    entry = np.array([r.entry for r in requests])
    position = torch.tensor([len(r.sequence) - 1 - r.shift for r in requests])
    count = torch.tensor([1 + len(d) for d in drafts])
    if candidates is None:
        return second.logits(entry, position, count, chain)
    return second.rewards(entry, position, count, chain, torch.tensor(candidates)[:, :width])


def empty(second):
    for entry in range(64):
        second.leave(entry)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_a_plain_forward_over_the_whole_sequence(seed, judge, pilot, plain_judge, plain_pilot):
    """Ragged batches, speculation with rejected drafts, requests that come, go, and come again elsewhere."""
    follow_a_plain_forward(seed, judge, pilot, plain_judge, plain_pilot)


def test_passes_of_fixed_shapes_say_the_same(recorded_judge, recorded_pilot, plain_judge, plain_pilot):
    """What a GPU replays as graphs: the same steps, padded. (The graphs themselves need a GPU.)"""
    with torch.inference_mode():
        for second in (recorded_judge, recorded_pilot):
            second._hidden.zero_()

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**32 - 1))
    def follow(seed):
        follow_a_plain_forward(seed, recorded_judge, recorded_pilot, plain_judge, plain_pilot)

    follow()
    # Not every seed has a pass that fits.
    assert recorded_judge._hidden.any()
    assert recorded_pilot._hidden.any()


class NothingWaits(TorchDispatchMode):
    """Refuses what a graph cannot hold: values that the host looks at, and sizes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        assert not by_mask, f"{name} by a mask cannot be recorded"
        assert name not in self.FORBIDDEN, f"{name} cannot be recorded"
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_recorded_pass_waits_for_the_device(recorded_judge, recorded_pilot):
    with pytest.raises(AssertionError, match="cannot be recorded"), NothingWaits():
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    for second in (recorded_judge, recorded_pilot):
        shapes = sorted(second._recorded)
        assert len({lines for lines, _, _ in shapes}) == 4  # 1, 2, 4, 6
        for shape in (shapes[0], shapes[-1]):
            with torch.inference_mode(), NothingWaits():
                second._fixed(*shape)


def follow_a_plain_forward(seed, judge, pilot, plain_judge, plain_pilot):
    rng = np.random.default_rng(seed)

    def tokens(least, most):
        return rng.integers(VOCAB, size=rng.integers(least, most + 1)).tolist()

    live, entries = [], iter(range(64))
    for second in (judge, pilot):
        empty(second)
    shared = tokens(40, 70)
    for _ in range(rng.integers(2, 6)):
        for _ in range(rng.integers(0 if live else 1, SLOTS - len(live) + 1)):
            request = Followed(next(entries), shared[: rng.integers(len(shared) + 1)] + tokens(1, 50))
            live.append(request)
            request.enter(judge)
            request.enter(pilot)
        for request in live:
            if rng.random() < 0.2:  # preempted and resumed
                for second in (judge, pilot):
                    second.leave(request.entry)
                    request.enter(second)
        judge.prepare()
        pilot.prepare()
        batch = [live[i] for i in rng.permutation(len(live))[: rng.integers(1, len(live) + 1)]]
        width = rng.integers(1, ROWS + 1)
        drafts = [tokens(0, width - 1) for _ in batch]
        k = rng.integers(1, K + 1)
        candidates = rng.integers(VOCAB, size=(len(batch), ROWS, k)).tolist()
        said = step(judge, batch, drafts, candidates)
        logits = step(pilot, batch, drafts, None)
        for line, (request, drafted) in enumerate(zip(batch, drafts, strict=True)):
            r, j = rng.integers(len(drafted) + 1), rng.integers(k)
            prefix = request.sequence + drafted[:r]
            expected = reward(plain_judge, [*prefix, candidates[line][r][j]])
            assert said[line, r, j].item() == pytest.approx(expected, abs=TOLERANCE)
            assert torch.allclose(logits[line, r], next_logits(plain_pilot, prefix), atol=5e-3)
            # Lines beyond a request's own repeat its last one.
            last = said[line, len(drafted)]
            assert torch.equal(said[line, len(drafted) :], last.expand_as(said[line, len(drafted) :]))
            request.sequence += [*drafted[: rng.integers(len(drafted) + 1)], int(rng.integers(VOCAB))]
        live = [request for request in live if len(request.sequence) < 200]


def test_a_longer_prompt_of_its_own(pilot, plain_pilot):
    empty(pilot)
    persona, prompt = [5, 6, 7, 8, 9], [100, 200, 300]
    request = Followed(40, persona + prompt, shift=len(persona))
    request.enter(pilot)
    pilot.prepare()
    for drafted in ([], [11, 12], [13]):
        logits = step(pilot, [request], [drafted], None)
        expected = next_logits(plain_pilot, request.sequence + drafted)
        assert torch.allclose(logits[0, len(drafted)], expected, atol=5e-3)
        request.sequence += [*drafted, 400]
    pilot.leave(40)


def test_long_prompts_are_read_in_chunks(judge, plain_judge):
    empty(judge)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (300, 5, 270)]
    requests = [Followed(entry, prompt) for entry, prompt in enumerate(prompts)]
    for request in requests:
        request.enter(judge)
    judge.prepare()
    said = step(judge, requests, [[], [], []], [[[9]], [[9]], [[9]]])
    for line, prompt in enumerate(prompts):
        assert said[line, 0, 0].item() == pytest.approx(reward(plain_judge, [*prompt, 9]), abs=TOLERANCE)
        judge.leave(line)


def test_known_beginnings_are_not_read_again(plain_judge):
    judge = companion()
    seen = []
    forward = judge._forward
    judge._forward = lambda slots, tokens, *rest: seen.append(tokens.numel()) or forward(slots, tokens, *rest)
    prompt = list(range(50, 50 + 3 * BLOCK))
    first, second = Followed(0, [*prompt, 1, 2]), Followed(1, [*prompt, 3, 4])
    first.enter(judge)
    judge.prepare()
    second.enter(judge)
    judge.prepare()
    assert seen == [3 * BLOCK + 1, 1]
    said = step(judge, [first, second], [[], []], [[[9]], [[9]]])
    for line, request in enumerate((first, second)):
        expected = reward(plain_judge, [*request.sequence, 9])
        assert said[line, 0, 0].item() == pytest.approx(expected, abs=TOLERANCE)
    # Another tenant's equal prompt is read for itself.
    third = Followed(2, first.sequence)
    judge.read(2, torch.tensor(third.sequence[:-1]), 0, digests(third.prompt, "salt"))
    judge.prepare()
    assert seen[-1] == 3 * BLOCK + 1


def test_a_request_that_left_unnoticed_gives_its_slot():
    judge = companion(max_slots=2)
    requests = [Followed(entry, [1, 2, 3]) for entry in range(4)]
    for request in requests[:2]:
        request.enter(judge)
    judge.prepare()
    for _ in range(3):
        judge.prepare()
        step(judge, requests[1:2], [[]], [[[9]]])
    requests[2].enter(judge)
    judge.prepare()
    assert judge.knows(np.arange(4)).tolist() == [False, True, True, False]
    step(judge, requests[1:3], [[], []], [[[9]], [[9]]])
    with pytest.raises(RuntimeError, match="all 2 slots"):
        requests[3].enter(judge)


def test_refusals(tmp_path):
    with pytest.raises(OptionError, match=r"reward model.*lack.*score"):
        companion(model=str(lab.model_path("pilot")))
    with pytest.raises(OptionError, match="GiB of cache"):
        companion(slots=10**7)
    with pytest.raises(OptionError, match="cannot be loaded"):
        companion(model=str(tmp_path))
    with pytest.raises(RuntimeError, match="exceed the 320"):
        companion().read(0, torch.zeros(320, dtype=torch.int64), 0, ())


def test_another_architecture(tmp_path):
    """Qwen3: norms on queries and keys, a head of its own size, tied embeddings."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    second = companion("lm", str(tmp_path))
    request = Followed(0, [3, 5, 7, 9, 11])
    request.enter(second)
    second.prepare()
    logits = step(second, [request], [[1, 2]], None)
    assert torch.allclose(logits[0, 2], next_logits(model, [*request.sequence, 1, 2]), atol=1e-4)


def test_an_architecture_that_attends_otherwise_is_refused(tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, use_sliding_window=True, sliding_window=4, max_window_layers=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"qwen3.*does not reproduce"):
        companion("lm", str(tmp_path))


def rows_of(logits, position, fed):
    requests = len(logits)
    return Rows(
        logits=logits, index=torch.arange(requests)[:, None], count=torch.ones(requests, dtype=torch.int64),
        position=torch.tensor(position), fed=lambda: torch.tensor(fed), draft=torch.full((requests, 1), -1),
        entry_np=np.arange(requests),
    )  # fmt: skip


def test_a_reward_that_is_no_number_is_left_out_and_reported():
    second = companion(rows=1)
    processor = ArgsProcessor(Layout(torch.device("cpu"), 64, 1, VOCAB, companions={"judge": second}))
    arguments = {
        "args_weight": [1.0], "args_top_k": 3, "args_entropy_gate": 0.0,
        "align_spec_companions": {"judge": {"prefix": []}},
    }  # fmt: skip
    for entry in range(2):
        processor.admit(entry, arguments, 3)
        processor.enter(entry, torch.tensor([1, 2, 3]))
    processor.flush()
    head, calls = second._head, []
    second._head = lambda hidden: calls.append(1) or head(hidden) * torch.tensor([1.0, torch.nan]).view(2, 1, 1)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    bent = logits.clone()
    processor.apply(rows_of(bent, [2, 2], [3, 3]))
    assert calls
    top = logits.topk(3)
    assert bent.isfinite().sum(1).tolist() == [3, 3]
    assert torch.equal(bent[1].gather(0, top.indices[1]), top.values[1])
    assert not torch.equal(bent[0].gather(0, top.indices[0]), top.values[0])
    good, bad = processor.reports([0, 1])
    assert (good["rows"], good["unanswered"], "error" in good) == (1, 0, False)
    assert (bad["rows"], bad["unanswered"], "error" in bad) == (0, 1, True)


def test_a_request_that_its_companion_lost_decodes_plainly():
    second = companion("lm", rows=1)
    processor = DeraProcessor(Layout(torch.device("cpu"), 64, 1, VOCAB, companions={"pilot": second}))
    arguments = {"dera_lambda": 0.5, "align_spec_companions": {"pilot": {"prefix": []}}}
    processor.admit(0, arguments, 3)
    processor.enter(0, torch.tensor([1, 2, 3]))
    processor.flush()
    assert processor.active(np.array([0])).all()
    second.leave(0)
    assert not processor.active(np.array([0])).any()
    (report,) = processor.reports([0])
    assert "lost" in report["error"]


def test_a_server_without_companions_does_not_load_them():
    code = (
        "import sys; from vllm_align_spec.engine import companions; from vllm_align_spec.options import parse_engine; "
        "assert companions.facts(None, parse_engine({})) == {}; "
        "assert companions.load(None, parse_engine({}), None, 1, 1) == {}; "
        "assert 'vllm_align_spec.companion.model' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
