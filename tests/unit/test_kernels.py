"""The Triton kernels equal the plain formulation, and a GPU's compiler takes them; no test here needs a GPU."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
import triton

INF = float("inf")


def in_a_process(*, interpreted):
    """Triton reads TRITON_INTERPRET while it is imported: a test that needs a value has a process of its own."""

    def decorate(check):
        @functools.wraps(check)
        def test():
            out = subprocess.run(
                [sys.executable, __file__, check.__name__],
                capture_output=True,
                text=True,
                env={**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"},
            )
            assert out.returncode == 0, out.stderr[-4000:]
            assert out.stdout.strip() == "passed"

        return test

    return decorate


def assert_close(found, expected, tolerance, name=""):
    # torch.testing.assert_close takes seconds to import what it does not need here.
    assert found.shape == expected.shape, name
    assert torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance), (name, found, expected)


@in_a_process(interpreted=True)
def test_kernels_equal_the_plain_formulation():
    from vllm_align_spec.processors import kernels, rows

    torch.manual_seed(0)
    for vocab_size in (7, 4096, 5000):
        logits = torch.randn(9, vocab_size) * 5
        logits[2, : vocab_size // 2] = -INF
        logits[3, 1] = -INF
        index = torch.tensor([[0, 1, 2], [3, 4, 4], [8, 7, 6]])
        tokens = torch.tensor([[0, vocab_size - 1, 3], [1, 2, -1], [5, 5, 5]])
        expected = rows.token_logprobs(logits, index, tokens)
        assert_close(kernels.token_logprobs(logits, index, tokens), expected, 1e-5)
        assert expected[1, 0] == -INF
        assert expected[1, 2] == -INF

        where = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
        a, b = logits.clone(), logits.clone()
        rows.force(a, index, where, tokens.clamp(min=0))
        kernels.force(b, index, where, tokens.clamp(min=0))
        assert torch.equal(a, b)
        untouched = [1, 3, 5, 7, 8]
        assert torch.equal(a[untouched], logits[untouched])
        assert (a[0] == 0).nonzero().tolist() == [[0]]


@in_a_process(interpreted=True)
def test_row_logsumexp_equals_torch():
    from vllm_align_spec.processors import kernels, rows

    torch.manual_seed(0)
    for vocab_size in (7, 4096, 9000):
        logits = torch.randn(5, vocab_size) * 5
        logits[1, : vocab_size - 2] = -INF
        logits[2, 1:] = -INF
        logits[3] = -INF
        line = torch.tensor([4, 0, 1, 2, 3, 0])
        scale = torch.tensor([1.0, 0.5, 3.0, 0.1, 1.0, 8.0])
        expected = (logits[line].double() * scale[:, None]).logsumexp(-1).float()
        found = kernels.row_logsumexp(logits, line, scale)
        assert_close(found, expected, 1e-5)
        assert_close(rows.row_logsumexp(logits, line, scale), expected, 1e-5)
        assert found[4] == -INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_logsumexp_reads_what_models_make(dtype):
    """Half precision, and rows that are a part of longer ones (a padded vocabulary)."""
    from vllm_align_spec.processors import rows

    torch.manual_seed(0)
    logits = (torch.randn(5, 700) * 20).to(dtype)[:, :613]
    line, scale = torch.tensor([4, 4, 0, 2]), torch.tensor([1.0, 0.01, 2.0, 30.0])
    before = logits.clone()
    expected = (logits[line].double() * scale[:, None]).logsumexp(-1)
    assert_close(rows.row_logsumexp(logits, line, scale), expected, 2e-6)
    assert torch.equal(logits, before)


def test_compiled_weights_are_exponentials():
    """Of everything from the largest entry to where float32 ends, in rows that fill no whole block or vector."""
    import numpy as np

    from vllm_align_spec.processors import loops

    rng = np.random.default_rng(0)
    for n in (1, 2, 15, 17, 100, 255, 256):
        for scale in (0.05, 1.0, 7.0):
            x = np.concatenate([rng.uniform(-86 / scale, 0, n), [0.0]]).astype(np.float32)[-n:] + np.float32(3.0)
            x[rng.random(n) < 0.2] = -np.inf
            weights = np.full(n, np.nan, np.float32)
            top = np.float32(loops._top(x))
            assert top == (x.max() if np.isfinite(x).any() else np.finfo(np.float32).min)
            total = loops._weigh(x, top, np.float32(scale), weights)
            # What float32 makes of the exponent is not the function's.
            exponent = (x - top) * (np.float32(scale) * np.float32(1 / np.log(2)))
            expected = np.exp2(exponent.astype(np.float64))
            assert np.all(weights[np.isneginf(x)] == 0)
            assert np.abs(weights - expected).max() <= 5e-7
            assert np.all(np.abs(weights - expected) <= 5e-7 * expected)
            assert abs(total - expected.sum()) <= 1e-6 * expected.sum()
    deep = np.array([0, -88, -126 * np.log(2) - 0.4, -1e4, -np.inf], np.float32)
    weights = np.empty(5, np.float32)
    loops._weigh(deep, np.float32(0), np.float32(1), weights)
    assert weights[0] == 1
    assert weights[1:].tolist() == [0, 0, 0, 0]


def test_thinning_is_the_same_on_both_devices():
    from asap_laws import thinned

    from vllm_align_spec.processors import kernels

    torch.manual_seed(0)
    for s, width in ((1, 1), (64, 1), (40, 5)):
        log_h = -torch.rand(s, width, dtype=torch.float64) * 3
        log_h[torch.rand(s, width) < 0.2] = -INF
        log_used = log_h + torch.rand(s, width, dtype=torch.float64) - 0.2
        log_used[log_h == -INF] = -1.0
        first, log_bank = torch.rand(s) < 0.3, torch.rand(s, dtype=torch.float64) * (torch.rand(s) < 0.3)
        log_coin = torch.rand(s, width, dtype=torch.float64).log()
        log_coin[torch.rand(s, width) < 0.2] = torch.finfo(torch.float64).min
        log_coin[torch.rand(s, width) < 0.2] = INF
        given = (log_h, log_used, first, log_bank, log_coin)
        for found, expected in zip(thinned(*given), kernels.thin(*given), strict=True):
            assert torch.equal(found, expected)


def test_a_nan_in_a_row_is_a_dead_end_and_no_certainty():
    """Also where the grammar masks it after the normaliser was taken; and what failed survives nothing."""
    from asap_laws import known_rows, thinned

    from vllm_align_spec.processors import asap, kernels, rows

    logits = torch.zeros(2, 300)
    logits[:, 7] = float("nan")
    unmasked = rows.row_logsumexp(logits, torch.arange(2), torch.ones(2))
    logits[0, 7] = -INF
    none = torch.full((2, 1), -1)
    numbers = asap.decide(
        logits, torch.arange(2)[:, None], unmasked[:, None], none, torch.arange(3), known_rows(2, 1)
    )  # fmt: skip
    assert (numbers[0] <= 1e-6).all()
    assert not logits.isnan().any()
    for log_h in (-1.0, INF):
        given = torch.full((1, 1), log_h).double(), torch.zeros(1, 1).double(), none[0] > 0, torch.zeros(1).double()
        for thin in (thinned, kernels.thin):
            assert not thin(*given, torch.full((1, 1), INF).double())[0].any()


@in_a_process(interpreted=True)
def test_row_entropy_equals_torch():
    from vllm_align_spec.processors import kernels, rows

    torch.manual_seed(0)
    for vocab_size in (7, 4096, 9000):
        logits = torch.randn(6, vocab_size) * torch.tensor([0.0, 1.0, 5.0, 30.0, 1.0, 1.0])[:, None]
        logits[4, : vocab_size - 2] = -INF
        logits[5] = -INF
        logits[5, 3] = 0.0
        index = torch.tensor([[0, 1, 2], [3, 4, 5], [5, 5, 0]])
        p = logits[index].double().softmax(-1)
        expected = torch.special.entr(p).sum(-1)
        assert_close(kernels.row_entropy(logits, index), expected, 2e-5)
        assert_close(rows.row_entropy(logits, index), expected, 2e-5)
        assert_close(kernels.row_entropy(logits, index)[0, 0], torch.tensor(vocab_size).log(), 1e-5)


def random_step(vocab_size):
    """Arguments of `kernels.asap_draw`: all kinds of masks, ends, temperatures, drafts, children, and shared lines."""
    s, width, lines = 4, 4, 9
    logits = 4 * torch.randn(lines, vocab_size)
    inverse_temperature = torch.tensor([1.0, 0.4, 3.0, 1.7], dtype=torch.float64)
    # request 1 has one row and repeats it; requests 2 and 3 read the same lines with different children
    index = torch.tensor([[0, 1, 2, 3], [4, 4, 4, 4], [5, 6, 7, 8], [8, 7, 6, 5]])
    unmasked = (logits[index].double() * inverse_temperature[:, None, None]).logsumexp(-1)
    for line, share in enumerate((1.0, 0.5, 0.1, 0.0, 0.5, 0.9, 1.0, 0.02, 0.5)):
        logits[line, torch.rand(vocab_size) >= share] = -INF
    logits[2, vocab_size - vocab_size // 3 :] = -INF
    if torch.rand(()) < 0.5:
        unmasked = unmasked.float()
    ends = torch.tensor([[2, -1, -1], [vocab_size - 1, 0, 3], [-1, -1, -1], [1, 4, vocab_size // 2]])
    flags = torch.randint(4, (s, width))
    children = []
    for i in range(s * width):
        legal = torch.nonzero(logits[index.reshape(-1)[i]] > -INF)[:, 0]
        number = (0, 0, 1, 3, vocab_size // 2, vocab_size)[int(torch.randint(6, ()))]
        if number < vocab_size:
            children.append(torch.randperm(vocab_size)[:number])
        else:
            children.append(legal[torch.randperm(len(legal))])
    children[5:8] = [children[5][:0]] * 3  # repeated rows bring no children
    child = torch.cat(children)
    child_log_c = -torch.rand(len(child), dtype=torch.float64) * 4
    child_log_c[torch.rand(len(child)) < 0.2] = -INF
    child_log_c[torch.rand(len(child)) < 0.2] = 0.0
    return {
        "logits": logits,
        "index": index,
        "unmasked": unmasked,
        "inverse_temperature": inverse_temperature,
        "uniform": torch.rand(s, width, dtype=torch.float64),
        "draft": torch.randint(-1, vocab_size, (s, width)),
        "ends": ends,
        "only_ends": flags == 1,
        "no_ends": flags == 2,
        "offsets": torch.tensor([0, *(len(c) for c in children)]).cumsum(0),
        "child": child,
        "child_log_c": child_log_c,
    }


def law(step):
    """[S * L, V] float64 each: log P of the legal tokens, log h. Written out, token by token."""
    s, width = step["index"].shape
    vocab_size = step["logits"].shape[1]
    log_p = torch.full((s * width, vocab_size), -INF, dtype=torch.float64)
    log_h = torch.zeros_like(log_p)
    for i in range(s * width):
        at = i // width, i % width
        ends = set(step["ends"][at[0]].tolist())
        for a in range(vocab_size):
            if (a not in ends and step["only_ends"][at]) or (a in ends and step["no_ends"][at]):
                continue
            logit = step["logits"][step["index"][at], a].double()
            log_p[i, a] = logit * step["inverse_temperature"][at[0]] - step["unmasked"][at]
        mine = slice(step["offsets"][i], step["offsets"][i + 1])
        log_h[i, step["child"][mine]] = step["child_log_c"][mine]
    return log_p, log_h


def known_of(step, count, **fields):
    """The same as `asap.Known`."""
    import numpy as np
    from asap_laws import known_rows

    s, width = step["index"].shape
    lowest, nothing = np.full((s, width), np.finfo(np.float64).min), np.zeros((s, width))
    given = {
        "offsets": step["offsets"].numpy(),
        "child": step["child"].numpy(),
        "child_log_c": step["child_log_c"].numpy(),
        "of_rows": np.stack([step["uniform"].numpy(), lowest, nothing]),
        "of_requests": np.stack([step["inverse_temperature"].numpy(), np.zeros(s), np.ones(s)]),
        "limits": torch.stack([step["only_ends"], step["no_ends"]]).numpy(),
        "ends": step["ends"].numpy(),
        "rows": count,
    }
    return known_rows(s, width, **given | fields)


def on_a_cpu(step):
    """What `asap.decide` says of it, each row in a line of its own."""
    import numpy as np

    from vllm_align_spec.processors import asap

    s, width = step["index"].shape
    logits = step["logits"][step["index"].reshape(-1)]
    index, known = torch.arange(s * width).view(s, width), known_of(step, np.full(s, width))
    control = logits.shape[1] + torch.arange(3)
    logits = torch.nn.functional.pad(logits, (0, 3), value=1.0)
    numbers = asap.decide(logits, index, step["unmasked"], step["draft"], control, known)
    alive = numbers[6].reshape(-1) > 0
    assert torch.equal(alive, numbers[0].reshape(-1) > -INF)
    expected = torch.where(alive, numbers[2].reshape(-1).long(), control[0])
    assert torch.equal(logits, torch.full_like(logits, -INF).scatter(1, expected[:, None], 0.0))
    return SimpleNamespace(**dict(zip(asap.NUMBERS, numbers, strict=True)))


def check_draw(step):
    """The kernels say what `asap.decide` says of a step on the CPU, up to the token, which has to be a legal one."""
    from vllm_align_spec.processors import asap, kernels

    before = step["logits"].clone()
    found = SimpleNamespace(**dict(zip(asap.NUMBERS, kernels.asap_draw(**step), strict=False)))
    assert torch.equal(step["logits"], before)
    expected = on_a_cpu(step)
    for name, value in vars(found).items():
        assert value.shape == step["index"].shape, name
        assert not value.isnan().any(), name
    for name in ("log_h", "log_unvisited", "draft_log_p"):
        assert_close(getattr(found, name), getattr(expected, name), 1e-4, name)
    assert found.token.dtype == torch.int64
    token = found.token.reshape(-1, 1)
    assert ((token >= 0) & (token < before.shape[1])).all()
    alive = expected.log_h.reshape(-1) > -INF
    log_p, log_h = (x.gather(1, token)[alive, 0] for x in law(step))
    assert (log_p + log_h > -INF).all()
    assert_close(found.token_log_p.reshape(-1)[alive], log_p, 1e-4, "token_log_p")
    assert_close(found.token_log_h.reshape(-1)[alive], log_h, 0, "token_log_h")
    return found


@in_a_process(interpreted=True)
def test_asap_draw_equals_the_cpu_path_on_random_rows():
    from vllm_align_spec.processors import kernels

    torch.manual_seed(0)
    dead = 0
    # smaller than a block, several blocks and a rest, the block size that is used, no rest
    for vocab_size, block, times in ((23, 64, 2), (201, 32, 3), (4500, 4096, 1), (256, 64, 1)):
        kernels._BLOCK, kernels._CHILDREN = block, max(block // 8, 8)
        for turn in range(times):
            step = random_step(vocab_size)
            if turn == 1:
                step["uniform"][:, ::2] = 2.0**-54
                step["uniform"][:, 1::2] = 1 - 2.0**-53
            if turn == 2:  # the first step of all
                step["offsets"] = torch.zeros_like(step["offsets"])
                step["child"], step["child_log_c"] = step["child"][:0], step["child_log_c"][:0]
            found = check_draw(step)
            dead += int((found.log_h == -INF).sum())
    assert dead > 8  # they were among the rows


@in_a_process(interpreted=True)
def test_asap_draw_leaves_out_visited_children_exactly():
    from vllm_align_spec.processors import kernels

    kernels._BLOCK = 32
    vocab_size = 100
    logits = torch.zeros(1, vocab_size)
    logits[0, 40] = 60.0  # all but e^-55 of the mass
    logits[0, 90:] = -INF
    rows = 4
    children = [[40], list(range(90)), [], [c for c in range(90) if c != 40]]
    step = {
        "logits": logits,
        "index": torch.zeros(2, 2, dtype=torch.int64),
        "unmasked": logits.logsumexp(1).expand(2, 2),
        "inverse_temperature": torch.ones(2, dtype=torch.float64),
        "uniform": torch.ones(2, 2, dtype=torch.float64),  # what a float32 would make of a number near 1
        "draft": torch.tensor([[40, 95], [-1, 3]]),
        "ends": torch.full((2, 1), -1),
        "only_ends": torch.zeros(2, 2, dtype=torch.bool),
        "no_ends": torch.zeros(2, 2, dtype=torch.bool),
        "offsets": torch.tensor([0, *map(len, children)]).cumsum(0),
        "child": torch.tensor([c for of_row in children for c in of_row]),
        "child_log_c": torch.cat([torch.zeros(1), torch.full((90,), -INF), torch.zeros(89)]).double(),
    }
    found = check_draw(step)
    assert abs(float(found.log_unvisited[0, 0]) - (torch.tensor(89.0).log() - 60)) < 1e-4
    assert found.log_unvisited[0, 1] == found.log_h[0, 1] == -INF
    # The child is as good as unreachable (h = e^-200), but nothing else is legal.
    step["child"] = torch.tensor([7] * rows)
    step["child_log_c"] = torch.full((rows,), -200.0, dtype=torch.float64)
    step["offsets"] = torch.arange(rows + 1)
    step["ends"][:] = 7
    step["only_ends"][:] = True
    found = check_draw(step)
    assert (found.token == 7).all()
    assert_close(found.log_h, torch.full((2, 2), -260.0), 1e-4)


def test_end_tokens_outside_of_the_vocabulary_touch_nothing():
    step = random_step(16)
    step |= {"ends": torch.full((4, 2), 16 + 2**20), "no_ends": torch.zeros(4, 4, dtype=torch.bool)}
    step["only_ends"] = ~step["no_ends"]
    assert (on_a_cpu(step).log_h == -INF).all()
    step |= {"only_ends": step["no_ends"], "no_ends": step["only_ends"]}
    with_ends = on_a_cpu(step)
    step["no_ends"] = step["only_ends"]
    assert torch.equal(on_a_cpu(step).log_h, with_ends.log_h)


@in_a_process(interpreted=True)
def test_deciding_forces_and_tells_the_same_on_both_devices():
    """Requests with fewer rows than the widest, with none, and rows that do not survive."""
    import numpy as np

    from vllm_align_spec.processors import kernels, loops

    torch.manual_seed(2)
    step = random_step(300)
    # Each row has a line of its own, as long as it counts.
    step["logits"] = step["logits"][step["index"].reshape(-1)]
    count, control = np.array([4, 1, 0, 3]), torch.tensor([3, 200, 7])
    step["index"] = torch.arange(16).view(4, 4)[:, :1] + torch.arange(4).minimum(
        torch.tensor(count - 1)[:, None].clamp(min=0)
    )
    coins = np.where(np.arange(16).reshape(4, 4) % 3 == 1, np.inf, np.finfo(np.float64).min)
    known = known_of(
        step,
        count,
        of_rows=np.stack([step["uniform"].numpy(), coins, np.full((4, 4), -0.5)]),
        of_requests=np.stack([step["inverse_temperature"].numpy(), np.full(4, 0.25), np.array([1.0, 0.0, 0.0, 0.0])]),
        otherwise=np.array([0, 1, 2, 1]),
    )
    before = step["logits"].clone()
    decided = {}
    for name, decide in (("gpu", kernels.asap_decide), ("cpu", loops.asap_decide)):
        logits = before.clone()
        numbers = decide(logits, step["index"], step["unmasked"], step["draft"], control, known)
        assert numbers.dtype == torch.float64
        decided[name] = logits, numbers
    counts = torch.arange(4) < torch.tensor(count)[:, None]
    (_, found), (_, expected) = decided["gpu"], decided["cpu"]
    assert found.shape == expected.shape == (9, 4, 4)
    for which in (0, 1, 5, 6, 7, 8):
        assert_close(found[which][counts], expected[which][counts], 1e-4, which)
    alive = expected[6] > 0
    assert 0 < alive[counts].sum() < counts.sum()
    for logits, numbers in decided.values():
        token = torch.where(alive, numbers[2].long(), control[torch.tensor(known.otherwise)][:, None])
        expected = before.clone()
        expected[step["index"][counts]] = -INF
        expected[step["index"][counts], token[counts]] = 0.0
        for rows in (logits, expected):  # a row that is not decided is nobody's: control ids may be illegal there
            rows[step["index"][count == 0][:, :, None], control] = -INF
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deciding_writes_where_the_logits_are(dtype):
    """Also in a part of longer lines (a padded vocabulary), which other methods see next."""
    import numpy as np

    from vllm_align_spec.processors import loops

    step = random_step(100)
    own = step["logits"][step["index"].reshape(-1)]
    index, given = torch.arange(16).view(4, 4), (step["unmasked"], step["draft"], torch.arange(3))
    known = known_of(step, np.full(4, 4))
    expected = own.clone()
    numbers = loops.asap_decide(expected, index, *given, known)
    padded = torch.full((16, 130), 5.0, dtype=dtype)
    padded[:, :100] = own
    assert torch.equal(loops.asap_decide(padded[:, :100], index, *given, known), numbers)
    assert torch.equal(padded[:, :100], expected.to(dtype))
    assert (padded[:, 100:] == 5).all()


@in_a_process(interpreted=True)
def test_asap_draw_takes_a_row_of_minus_infinity_alone():
    from vllm_align_spec.processors import kernels

    step = random_step(50)
    step["logits"][:] = -INF
    step["unmasked"][:] = -INF  # nothing was masked: the model's own row is empty
    for value in kernels.asap_draw(**step):
        assert not value.isnan().any()
    log_h, log_unvisited, *_, draft_log_p = kernels.asap_draw(**step)
    assert ((log_h == -INF) & (log_unvisited == -INF) & (draft_log_p == -INF)).all()


@in_a_process(interpreted=True)
@pytest.mark.slow
def test_asap_draw_follows_its_law_on_a_grid_of_uniform_numbers():
    from vllm_align_spec.processors import kernels

    torch.manual_seed(1)
    kernels._BLOCK, kernels._CHILDREN = 32, 4
    vocab_size, n = 40, 70
    for children in (1, 11, 40):
        logits = 1.5 * torch.randn(1, vocab_size)
        logits[0, torch.randperm(vocab_size)[:9]] = -INF
        child = torch.randperm(vocab_size)[:children]
        step = {
            "logits": logits,
            "index": torch.zeros(1, n, dtype=torch.int64),
            "unmasked": (2 * logits).logsumexp(1).expand(1, n) + 0.5,
            "inverse_temperature": torch.full((1,), 2.0, dtype=torch.float64),
            "uniform": ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[None],
            "draft": torch.full((1, n), -1),
            "ends": torch.tensor([[1, 5, -1]]),
            "only_ends": torch.zeros(1, n, dtype=torch.bool),
            "no_ends": torch.full((1, n), children == 11),
            "offsets": children * torch.arange(n + 1),
            "child": child.repeat(n),
            "child_log_c": -torch.rand(children, dtype=torch.float64).repeat(n),
        }
        token = kernels.asap_draw(**step)[2]
        one = {name: step[name][:, :1] for name in ("index", "unmasked", "only_ends", "no_ends")}
        log_p, log_h = law(step | one)
        expected = n * (log_p + log_h)[0].softmax(0)
        # A token's share of (0, 1) is one interval, so that the grid counts it to within one.
        assert ((token[0].bincount(minlength=vocab_size) - expected).abs() < 1.01).all(), children


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}


class Compiles:
    """Stands in for a kernel: compiles it for a GPU with the types it is called with, and runs nothing."""

    def __init__(self, kernel):
        self.kernel, self.times = kernel, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **constants):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
        signature = dict(zip(self.kernel.arg_names, types + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
        self.times += 1


@in_a_process(interpreted=False)
def test_a_gpus_compiler_takes_every_kernel_as_it_is_called():
    from vllm_align_spec.processors import kernels

    found = [name for name in vars(kernels) if name.endswith("_kernel")]
    assert len(found) == 7
    for name in found:
        setattr(kernels, name, Compiles(getattr(kernels, name)))
    step = random_step(5000)
    kernels.asap_draw(**step)
    kernels.token_logprobs(step["logits"], step["index"], step["draft"])
    kernels.row_logsumexp(step["logits"], step["index"], step["unmasked"].float())
    kernels.force(step["logits"], step["index"], step["only_ends"], step["draft"])
    kernels.row_entropy(step["logits"], step["index"])
    assert all(getattr(kernels, name).times == 1 for name in found)


if __name__ == "__main__":
    globals()[sys.argv[1]].__wrapped__()
    print("passed")
