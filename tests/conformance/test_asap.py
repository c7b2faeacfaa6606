"""Grammar-aligned sampling inside the real engine, on both runners, against laws found by enumeration."""

import itertools
import math

import numpy as np
import pytest
from laws import greedy
from table_model import BOS_ID, CONTROL_IDS, END_ID, Table

GRAMMAR = 'root ::= "00000" | "1" [01] [01] [01] [01]'
SENTENCES = ["00000", *("1" + "".join(bits) for bits in itertools.product("01", repeat=4))]
DRAFTS = 3
RUNNERS = ["v1", "v2"]
SLOW_ON_V2 = pytest.mark.parametrize(
    "runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True, scope="session"
)


@pytest.fixture(params=RUNNERS, scope="session")
def runner(request):
    return request.param


@pytest.fixture(scope="session")
def table():
    return Table(0)


@pytest.fixture(scope="session")
def models(tmp_path_factory, table):
    """The table and, for drafting, another one, which is often wrong but keeps to the grammar's letters."""
    drafter = Table(5)
    drafter.logits[:, drafter.ids("01")] += 20
    return {
        "target": table.write(tmp_path_factory.mktemp("target")),
        "drafter": drafter.write(tmp_path_factory.mktemp("drafter")),
    }


@pytest.fixture(scope="session")
def start(engines, models):
    def start(runner, speculation=False, **config):
        drafter = {"method": "draft_model", "model": models["drafter"], "num_speculative_tokens": DRAFTS}
        settings = {"model": models["target"], "max_model_len": 128, "max_num_seqs": 32, **config}
        return engines(
            runner,
            end_id=END_ID,
            control_ids=CONTROL_IDS,
            speculative_config=drafter if speculation else None,
            **settings,
        )

    return start


def asap(mode, seed, *, grammar=GRAMMAR, temperature=1.0, max_tokens=12, trie="one", **more):
    params = {"temperature": temperature, "max_tokens": max_tokens, "grammar": {"grammar": grammar}}
    return {"prompt": [BOS_ID], "asap": mode, "seed": seed, "trie": trie, "params": params, **more}


def attempts(engine, mode, count, **kwargs):
    """Outputs of attempts launched together, in launch order."""
    first = kwargs.pop("first_seed", 1)
    requests = [asap(mode, first + i, **kwargs) for i in range(count)]
    # A worker remembers so many requests until it is asked for their reports.
    return [o for i in range(0, count, 500) for o in engine.generate(requests[i : i + 500])]


def state(output):
    return output["report"]["asap"]["state"]


def texts(table, outputs):
    """What the completed attempts wrote, in launch order."""
    found = []
    for output in outputs:
        if state(output) == "completed":
            assert output["tokens"][-1] == END_ID, output
            assert output["stop"] is None
            found.append(table.text(output["tokens"]))
        else:
            assert output["tokens"][-1] == output["stop"] == CONTROL_IDS[0], output
        assert not set(output["tokens"][:-1]) & {END_ID, *CONTROL_IDS}
    return found


def total_variation(found, law, sentences=SENTENCES):
    counts = np.array([found.count(s) for s in sentences], dtype=float)
    assert counts.sum() == len(found), set(found) - set(sentences)
    return 0.5 * np.abs(counts / len(found) - np.asarray(law)).sum()


def quantile(law, size, q=0.999):
    """Of the total variation between the law and samples of this size from it."""
    law = np.asarray(law)
    counts = np.random.default_rng(0).multinomial(size, law / law.sum(), size=4000)
    return np.quantile(0.5 * np.abs(counts / size - law).sum(1), q)


def test_every_patch_of_the_runner_is_in_force(start, runner):
    applied = start(runner).patches()
    needed = {"grammar_control", "worker_calls", "worker_shutdown"}
    needed |= {"v1": {"v1_grammar_mask"}, "v2": {"v2_grammar_mask", "v2_inputs"}}[runner]
    assert {name for name in needed if applied.get(name) == "applied"} == needed


@SLOW_ON_V2
def test_exact_attempts_side_by_side_follow_the_conditional_law(start, runner, table):
    found = texts(table, attempts(start(runner), "exact", 1500, trie="side by side"))
    law, _ = table.conditional([table.ids(s) for s in SENTENCES])
    assert len(found) >= 400
    assert total_variation(found[:400], law) < quantile(law, 400)
    # What masking alone would give is far off: the test can tell.
    masked = table.masked([table.ids(s) for s in SENTENCES])
    assert 0.5 * float((masked - law).abs().sum()) > 3 * quantile(law, 400)


@pytest.mark.slow
def test_exact_attempts_one_after_the_other_follow_it_too_at_another_temperature(start, table):
    engine = start("v1")
    found = []
    for i in range(200):
        found += texts(table, attempts(engine, "exact", 1, first_seed=9000 + i, temperature=1.7, trie="alone"))
    law, _ = table.conditional([table.ids(s) for s in SENTENCES], temperature=1.7)
    assert len(found) >= 60
    assert total_variation(found[:60], law) < quantile(law, 60)


def test_the_temperature_is_the_requests_own_whatever_vllm_is_told(start, runner):
    """Told 0 for odd seeds, as by the front end on a CPU (`engines`)."""
    requests = [asap("weighted", seed, temperature=1.7, trie=f"told {seed}") for seed in (1, 2)]
    outputs = start(runner).generate([*requests, asap("weighted", 2, trie="told 1.0")])
    told_zero, told_it, another = (output["report"]["asap"]["log_h0"] for output in outputs)
    assert told_zero == pytest.approx(told_it, abs=1e-5)
    assert abs(told_it - another) > 0.01


def test_the_first_sample_on_a_fresh_trie_is_that_of_a_mask_alone(start, table):
    outputs = start("v1").generate([asap("adaptive", 1 + i, trie=f"fresh {i}") for i in range(600)])
    law = table.masked([table.ids(s) for s in SENTENCES])
    assert total_variation(texts(table, outputs), law) < quantile(law, 600)


def test_the_adaptive_bound_on_the_mass_falls_to_the_mass(start, table):
    outputs = attempts(start("v1"), "adaptive", 600, trie="falls")
    bounds = [o["report"]["asap"]["log_mass_at_root"] for o in outputs]
    _, mass = table.conditional([table.ids(s) for s in SENTENCES])
    assert mass * (1 - 1e-6) < math.exp(bounds[-1]) < mass * 1.01
    assert len(texts(table, outputs)) == 600


def test_weights_estimate_the_mass_of_the_language(start, table):
    outputs = attempts(start("v1"), "weighted", 400, trie="weights")
    v = np.array([math.exp(w) if (w := o["report"]["asap"]["log_v"]) is not None else 0.0 for o in outputs])
    _, mass = table.conditional([table.ids(s) for s in SENTENCES])
    assert abs(v.mean() - mass) < 4 * v.std(ddof=1) / math.sqrt(len(v))
    # Weighted, the samples follow the conditional law.
    law, _ = table.conditional([table.ids(s) for s in SENTENCES])
    found = texts(table, outputs)
    weighted = np.array([sum(x for x, s in zip(v, found, strict=True) if s == one) for one in SENTENCES]) / v.sum()
    assert 0.5 * np.abs(weighted - law.numpy()).sum() < 2 * quantile(law, int(v.sum() ** 2 / (v**2).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("speculation", [False, True])
def test_both_runners_draw_the_same_attempts(start, speculation):
    """The same seeds, launched together: every token and every weight.

    With drafts each attempt has a trie of its own: the runners draft at different steps, so what an attempt finds of
    the others is not the same.
    """

    def told(runner):
        tries = [f"both {i if speculation else 0}" for i in range(16)]
        exact = [asap("exact", 1 + i, trie=trie) for i, trie in enumerate(tries)]
        weighted = [asap("weighted", 50 + i, trie=trie, temperature=0.8) for i, trie in enumerate(tries[:8])]
        outputs = start(runner, speculation).generate(exact) + start(runner, speculation).generate(weighted)
        return [
            (o["tokens"], o["stop"], state(o), o["report"]["asap"]["log_h0"], o["report"]["asap"]["log_v"])
            for o in outputs
        ]

    for one, two in zip(told("v1"), told("v2"), strict=True):
        assert one[:3] == two[:3]
        assert one[3:] == pytest.approx(two[3:], abs=1e-4)


def test_with_drafts_the_law_stays_the_same(start, table):
    engine = start("v1", speculation=True)
    found = texts(table, attempts(engine, "exact", 1500, trie="drafts"))
    law, _ = table.conditional([table.ids(s) for s in SENTENCES])
    assert len(found) >= 400
    assert total_variation(found[:400], law) < quantile(law, 400)


def test_drafts_add_nodes_whether_accepted_or_not(start):
    settings = {"grammar": "root ::= [01]{8,8}", "trie": "nodes"}
    more = attempts(start("v1", speculation=True), "adaptive", 1, **settings)[0]["report"]["asap"]
    fewer = attempts(start("v1"), "adaptive", 1, **settings)[0]["report"]["asap"]
    assert fewer["nodes_added"] == fewer["rows"] == more["rows"] == 9
    assert more["nodes_added"] > 9


def test_a_dead_end_abandons_the_attempt_and_is_learnt(start, runner, table):
    # After "a" the bound leaves no room for the rest: a dead end that the mask does not know.
    grammar = 'root ::= "0" | "a" "b" "b" "b"'
    outputs = [
        attempts(start(runner), "adaptive", 1, grammar=grammar, max_tokens=3, trie="dead", first_seed=i)[0]
        for i in range(12)
    ]
    states = [state(o) for o in outputs]
    assert set(states) <= {"completed", "dead_end"}
    assert states.count("dead_end") <= 1
    assert set(texts(table, outputs)) == {"0"}


def test_a_language_that_does_not_fit_has_no_sample(start, runner):
    outputs = attempts(start(runner), "exact", 3, grammar='root ::= "0" "0" "0" "0"', max_tokens=3, trie="long")
    assert {state(o) for o in outputs} <= {"dead_end", "rejected"}
    attempts(start(runner), "adaptive", 1, grammar='root ::= "0" "0" "0" "0"', max_tokens=3, trie="long")
    again = attempts(start(runner), "exact", 1, grammar='root ::= "0" "0" "0" "0"', max_tokens=3, trie="long")[0]
    assert again["report"]["asap"]["log_mass_at_root"] is None  # the log of 0
    assert len(again["tokens"]) == 1  # given up at the first row


def test_a_language_of_the_empty_string_ends_at_once(start, runner):
    outputs = attempts(start(runner), "exact", 2, grammar='root ::= ""', trie="empty")
    assert [o["tokens"] for o in outputs] == [[END_ID]] * 2


def test_a_response_may_be_as_long_as_the_bound_and_no_longer(start, table):
    outputs = attempts(start("v1"), "exact", 400, grammar="root ::= [01]+", max_tokens=4, trie="bound")
    found = texts(table, outputs)
    sentences = ["".join(bits) for n in (1, 2, 3) for bits in itertools.product("01", repeat=n)]
    law, _ = table.conditional([table.ids(s) for s in sentences])
    assert len(found) >= 100
    assert total_variation(found[:100], law, sentences) < quantile(law, 100)


def test_a_shortest_length_holds(start, table):
    outputs = attempts(
        start("v1"), "adaptive", 50, grammar="root ::= [01]+", max_tokens=6, trie="short",
        arguments={"align_spec_min_tokens": 4},
    )  # fmt: skip
    assert min(len(text) for text in texts(table, outputs)) == 4


def test_two_tries_of_one_grammar_share_nothing(start):
    first = attempts(start("v1"), "adaptive", 30, trie="tenant a")[-1]
    other = attempts(start("v1"), "adaptive", 1, trie="tenant b")[0]
    assert first["report"]["asap"]["log_mass_at_root"] < other["report"]["asap"]["log_mass_at_root"] - 1


def test_neighbours_are_served_as_ever(start, runner):
    engine = start(runner)
    plain = {"prompt": [BOS_ID, 5, 6], "params": {"max_tokens": 8}}
    masked = {
        "prompt": [BOS_ID],
        "params": {"max_tokens": 12, "temperature": 1.0, "seed": 3, "grammar": {"grammar": GRAMMAR}},
    }
    masked["params"]["ignore_eos"] = False
    alone = [o["tokens"] for o in engine.generate([plain, masked])]
    mixed = engine.generate([asap("exact", 5), plain, asap("adaptive", 6), masked])
    assert [mixed[1]["tokens"], mixed[3]["tokens"]] == alone


@pytest.mark.slow
def test_preempted_attempts_keep_to_the_law(start, table):
    # So few blocks of 32 tokens cannot hold what the attempts need together.
    engine = start("v1", num_gpu_blocks_override=12, enable_prefix_caching=False, max_num_seqs=8, max_model_len=128)
    grammar = "root ::= [01] [01] [01] [01ab]{40,40}"
    outputs = engine.generate([asap("weighted", i, grammar=grammar, max_tokens=60, trie="preempt") for i in range(8)])
    assert all(len(o["tokens"]) == 44 for o in outputs)
    for output in outputs:  # each weight is what the rows' own laws say: P(w) over what it was drawn with
        assert output["report"]["asap"]["rows"] == 44


@pytest.mark.slow
def test_under_eviction_pressure_attempts_stay_exact(start, table):
    options = {"align_spec": {"asap": {"max_bytes": 65536}}}
    engine = start("v1", additional_config=options)
    found, evictions = [], 0
    for turn in range(6):
        noise = [
            asap("adaptive", 100 * turn + i, grammar="root ::= [01ab]{30,30}", max_tokens=40, trie=f"noise {turn} {i}")
            for i in range(12)
        ]
        outputs = engine.generate([*(asap("exact", 1000 * turn + i, trie="pressed") for i in range(150)), *noise])
        found += texts(table, outputs[:150])
        evictions = outputs[-1]["report"]["asap"]["store"]["evictions"]
        assert outputs[-1]["report"]["asap"]["store"]["bytes"] <= 65536
    law, _ = table.conditional([table.ids(s) for s in SENTENCES])
    assert evictions > 0
    assert len(found) >= 250
    assert total_variation(found[:250], law) < quantile(law, 250)


@pytest.mark.slow
def test_a_processor_that_raises_ends_its_request_as_failed_and_nothing_else(start, runner, engines):
    engine = start(runner, broken_processor=True)
    outputs = engine.generate([asap("weighted", 77), {"prompt": [BOS_ID, 5], "params": {"max_tokens": 8}}])
    assert outputs[0]["stop"] == CONTROL_IDS[2]
    assert state(outputs[0]) == "failed"
    assert "broken on purpose" in outputs[0]["report"]["error"]
    assert len(outputs[1]["tokens"]) == 8
    assert state(attempts(engine, "weighted", 1, first_seed=5)[0]) == "completed"


@pytest.mark.slow
def test_asynchronous_scheduling_changes_nothing(start, runner, table):
    engine = start(runner, async_scheduling=True)
    found = texts(table, attempts(engine, "exact", 1500, trie="async"))
    law, _ = table.conditional([table.ids(s) for s in SENTENCES])
    assert len(found) >= 400
    assert total_variation(found[:400], law) < quantile(law, 400)


@pytest.mark.slow
def test_the_labs_model_keeps_neighbours_under_speculation(engines):
    """Real weights, a real drafter: greedy neighbours of attempts are the base model's own."""
    from engines import prompts

    engine = engines("v1")
    grammar = {"json": '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'}
    params = {"temperature": 1.0, "max_tokens": 40, "grammar": grammar}
    requests = [{"prompt": prompts()[i], "asap": "adaptive", "seed": i, "params": dict(params)} for i in range(4)]
    plain = {"prompt": prompts()[5], "params": {"max_tokens": 24}}
    outputs = engine.generate([*requests, plain])
    assert greedy("base", plain["prompt"], outputs[-1]["tokens"], 0, 24) <= 1
    assert {state(o) for o in outputs[:4]} <= {"completed", "dead_end"}


@pytest.mark.slow
def test_ranks_hold_the_same_tries_and_take_in_a_delta_at_the_same_step(engines):
    """A rank that took it a step later, or in other numbers, would draw other tokens and record other nodes."""
    share = {"additional_config": {"align_spec": {"asap": {"share": {}}}}}
    config = {"tensor_parallel_size": 2, "speculative_config": None, **share}
    requests = [
        {"prompt": [1, 9], "asap": "adaptive", "seed": seed, "params": {"temperature": 1.0, "max_tokens": 12}}
        for seed in range(24)
    ]
    for request in requests:
        request["params"]["grammar"] = {"regex": "[01]{6}"}
    teacher = engines("v1", {"ALIGN_SPEC_TEST": "teacher"}, **config)
    assert all(state(o) == "completed" for o in teacher.generate(requests[:12]))
    one, other = teacher.tries()
    assert one == other
    (news,) = teacher.exchange()
    pupil = engines("v1", {"ALIGN_SPEC_TEST": "pupil"}, **config)
    pupil.exchange([news], step=4)
    assert all(state(o) == "completed" for o in pupil.generate(requests[12:]))
    learnt, same = pupil.tries()
    assert learnt == same
    assert learnt[1] > one[1]
    alone = engines("v1", {"ALIGN_SPEC_TEST": "alone"}, **config)
    alone.generate(requests[12:])
    assert alone.tries()[0][1] < learnt[1]
