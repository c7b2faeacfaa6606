"""What must hold for every response of weak-to-strong decoding, whatever happened to its request."""

import math

from engines import log_probabilities, stop_id

from vllm_align_spec.processors.wsd import switch_index

MARGIN = 1e-3
"""Where the reference's best two log-probabilities are closer, batch shape may decide; such positions are counted."""


def greedy(name, prompt, tokens, start, end):
    """Checks that tokens[start:end] are a model's greedy choices given what came before; returns the close calls."""
    close = 0
    rows = log_probabilities(name, prompt, tokens)[start:end]
    for offset, row in enumerate(rows):
        best = row.topk(2)
        token = tokens[start + offset]
        if token != int(best.indices[0]):
            assert float(best.values[0] - row[token]) < MARGIN, (
                f"token {start + offset} is {token}, {name} alone says {int(best.indices[0])} "
                f"({float(best.values[0]):.4f} against {float(row[token]):.4f})"
            )
            close += 1
    return close


def assert_wsd(prompt, output, options, *, temperature=0.0):
    """Opening, switch and continuation of one response; returns its number of close calls."""
    tokens, report = output["tokens"], output["report"]["wsd"]
    assert "error" not in output["report"], output["report"]
    gamma, window = options.get("wsd_gamma", 0.8), options.get("wsd_window", 6)
    bound = options.get("wsd_max_draft", 512)
    kept = min(report["kept"], len(tokens))

    close = greedy("pilot", prompt, tokens, 0, kept)
    assert stop_id() not in tokens[:kept]
    if temperature == 0.0:
        close += greedy("base", prompt, tokens, kept, len(tokens))

    rows = log_probabilities("base", prompt, tokens[:kept]) if kept else []
    p = [math.exp(float(row[token])) for row, token in zip(rows, tokens[:kept], strict=True)]
    reason = report["reason"]
    if p:
        logs = [math.log(x) for x in p]
        means = [sum(logs[i - window + 1 : i + 1]) / window for i in range(window - 1, kept)]
        undecided = any(abs(m - math.log(gamma)) < 1e-4 for m in means)
        if not undecided:
            found = switch_index(p, gamma=gamma, window=window)
            passed = bool(means) and max(means) >= math.log(gamma)
            assert found == kept - 1, f"the rule switches at {found}, the engine at {kept - 1} ({reason})"
            if reason == "switched":
                assert passed
            if reason in ("pilot_end", "interrupted", "drafting"):
                assert not passed
    if reason == "max_draft":
        assert kept == bound
    assert kept <= bound
    if reason == "pilot_end":
        row = log_probabilities("pilot", prompt, [*tokens[:kept], 0])[-1]
        assert float(row.max() - row[stop_id()]) < MARGIN, "the pilot did not want to stop there"
    starts = report["starts"]
    assert starts == sorted(starts)
    assert starts[:1] == [0]
    return close
