"""Offline inference through Ray Data: every line is answered as a server answers it, once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vllm_align_spec import lab
from vllm_align_spec.cluster.batch import answered, read

BODY = {"model": "base", "max_tokens": 12, "temperature": 0.0}
MESSAGES = [{"role": "user", "content": "How do I repair a bicycle with 20 euros?"}]


def line(number, **body):
    body = {**BODY, "messages": MESSAGES, **body}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path, lines):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))


def test_lines_that_are_no_requests_are_named(tmp_path):
    file = tmp_path / "in.jsonl"
    others = [
        "{",
        {**line(1), "custom_id": 1},
        line(0),
        {**line(2), "url": "/v1/embeddings"},
        {**line(3), "body": 1},
        line(4, stream=True),
    ]
    write(file, [line(0), *others, "", line(5)])
    lines, wrong = read(file)
    assert [one["custom_id"] for one in lines] == ["r0", "r5"]
    assert [one.partition(":")[0] for one in wrong] == [f"line {n}" for n in range(2, 8)]
    for told, says in zip(
        wrong, ("no JSON", "custom_id", "occurs before", "embeddings", "no body", "stream"), strict=True
    ):
        assert says in told


def test_what_a_killed_run_had_answered_is_known_and_its_half_line_is_gone(tmp_path):
    file = tmp_path / "out.jsonl"
    write(file, [{"custom_id": "a", "error": None}, {"custom_id": "b", "error": {"code": "failed"}}])
    whole = file.read_text()
    file.write_text(whole + '{"custom_id": "c", "err')
    assert answered(file) == {"a"}
    assert file.read_text() == whole
    assert answered(tmp_path / "none") == set()


@pytest.mark.slow
def test_two_servers_answer_a_file_and_a_second_run_only_what_is_left(tmp_path):
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wsd = {"vllm_xargs": {"wsd": "shared", "wsd_gamma": 1.0, "wsd_max_draft": 8}}
    lines = [line(i, **(wsd if i % 2 else {})) for i in range(12)]
    lines += [line(12, vllm_xargs={"wsd": "shared", "wsd_gamma": 2}), "no request"]
    write(requests, lines)
    speculation = {"method": "draft_model", "model": str(lab.model_path("pilot")), "num_speculative_tokens": 5}
    command = [sys.executable, "-m", "vllm_align_spec.cli", "batch", "--input", str(requests), "--output", str(output)]
    command += [
        "--servers",
        "2",
        "--in-flight",
        "2",
        "--tries",
        "1",
        "--",
        str(lab.model_path("base")),
        "--dtype",
        "float32",
    ]
    command += ["--served-model-name", "base", "--max-model-len", "512", "--block-size", "32", "--enforce-eager"]
    command += ["--speculative-config", json.dumps(speculation)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert "12 answered, 1 failed, 1 lines were no requests" in done.stdout
    found = {one["custom_id"]: one for one in map(json.loads, output.read_text().splitlines())}
    assert len(found) == 13
    texts = {bool(i % 2): set() for i in range(2)}
    for i in range(12):
        answer = found[f"r{i}"]
        texts[bool(i % 2)].add(answer["response"]["body"]["choices"][0]["message"]["content"])
        assert (answer["report"] is not None) == bool(i % 2)
    assert len(texts[False]) == len(texts[True]) == 1
    assert found["r1"]["report"]["choices"][0]["draft_tokens_kept"] == 8
    assert found["r12"]["response"]["status_code"] == 400
    assert "wsd_gamma=2" in found["r12"]["error"]["message"]

    before = output.read_text()
    write(requests, lines[:12])
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "12 requests, 12 of them answered before" in again.stdout
    assert output.read_text() == before
