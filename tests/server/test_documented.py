"""The documentation's commands are run as they stand there, with the lab's models for the placeholders."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import test_docs
import yaml
from rich.console import Console
from serving import MESSAGES, MODELS

from vllm_align_spec.bench.server import Server

pytestmark = pytest.mark.slow

MODEL_NAMES = {
    **dict.fromkeys(("BASE", "MODEL", "TARGET"), "base"),
    **dict.fromkeys(("PILOT", "ALIGNED_MODEL"), "pilot"),
    "REWARD_MODEL": "judge",
    "DRAFTER": "drafters/fspad",
}
SMALL = ["--max-model-len", "512", "--max-num-seqs", "8"]
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
ELSEWHERE = {
    "GPUs": lambda words: {"--gpus", "--ray-gpus"} & set(words),
    "tests/cluster/test_command.py": lambda words: words[:2] == ["cluster", "serve"] and "--check" not in words,
    "half an hour each": lambda words: words[0] == "bench" or words[:2] in (["lab", "build"], ["lab", "drafters"]),
}
"""Why a command is not run here."""


def filled(word):
    """A word of a command with the lab's models in it."""
    word = word.replace("$LAB", str(MODELS))
    for name, model in MODEL_NAMES.items():
        word = re.sub(rf"(?<![\w/]){name}(?![\w.])", str(MODELS / model), word)
    return word


ACCEPTED = set()
SERVERS, OTHERS = {}, []  # SERVERS: the pages that show each
for page, words in test_docs.OURS:
    if any(why(words) for why in ELSEWHERE.values()):
        continue
    if words[0] == "serve":
        SERVERS.setdefault(tuple(map(filled, words)), []).append(page)
    else:
        OTHERS.append((page, words))


def run(folder, *words, timeout=300):
    done = subprocess.run(
        ["vllm-align-spec", *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def requests_of(page):
    """The options that a page's Python examples send."""
    for name, text in test_docs.blocks("python"):
        if name == page:
            for match in re.finditer(r'"vllm_xargs": (\{[^{}]*\})', text):
                yield json.loads(match[1].replace("True", "true"))


def refused(client, model, kwargs):
    try:
        client.chat.completions.create(model=model, messages=MESSAGES, **kwargs)
    except openai.BadRequestError as error:
        return str(error)
    return None


@pytest.mark.parametrize("words", SERVERS, ids=[f"{pages[0]} {i}" for i, pages in enumerate(SERVERS.values())])
def test_a_server_of_the_docs_starts_and_serves_what_its_page_asks(tmp_path, words):
    pages = SERVERS[words]
    assert words[:2] == ("serve", str(MODELS / "base"))
    with Server([*words[2:], *SMALL], tmp_path / "log") as server:
        server.wait(Console(quiet=True))
        client = openai.OpenAI(base_url=f"{server.root}/v1", api_key="none", max_retries=0, timeout=120)
        model = client.models.list().data[0].id
        for page, xargs in [(pages[0], {}), *((one, xargs) for one in pages for xargs in requests_of(one))]:
            kwargs = {"temperature": 1.0, "max_tokens": 16, "extra_body": {"vllm_xargs": xargs}}
            if "asap" in xargs:  # the model must be likely to obey
                kwargs["max_tokens"] = 256
                kwargs["extra_body"]["structured_outputs"] = {"regex": r"[\s\S]*"}
            if "deal" in xargs:
                kwargs["temperature"] = 0
            refusal = refused(client, model, kwargs)
            if refusal is None:
                ACCEPTED.add(json.dumps([page, xargs]))
            # A page may show more than one server; this one may lack what an example needs, and says so.
            assert refusal is None or any(key in refusal for key in xargs), refusal
        for page_of, others in OTHERS:
            if page_of in pages and others[0] == "calibrate":
                (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
                out = run(tmp_path, *others, "--url", f"{server.root}/v1", "--n", "2", "--max-tokens", "16")
                assert "cards_threshold" in out
        if "asap.md" in pages:
            batch = next(words for page_of, words in OTHERS if page_of == "cluster.md" and words[0] == "batch")
            line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
            line["body"] = {"model": model, "messages": MESSAGES, "max_tokens": 4}
            (tmp_path / "requests.jsonl").write_text(json.dumps(line) + "\n")
            run(tmp_path, *[server.root if word.startswith("http://") else word for word in batch])
            assert json.loads((tmp_path / "answers.jsonl").read_text())["response"]["status_code"] == 200


def test_training_as_the_docs_do_it(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"Begin with {i}."}]}
        for i in range(100)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    done = 0
    for page, words in OTHERS:
        if page != "fspad.md" or words[0] != "train":
            continue
        given = [str(MODELS / "base") if word == "TARGET" else word for word in words]
        few = ["--max-tokens", "16"] if words[1] == "answers" else ["--max-steps", "2", "--evaluate-every", "2"]
        run(tmp_path, *given, *few, timeout=600)
        out = words[words.index("--out") + 1]
        assert (tmp_path / out).exists()
        done += 1
    assert done == 4


def test_the_commands_that_need_no_server(tmp_path):
    config = next(text for page, text in test_docs.blocks("yaml") if page == "cluster.md" and "applications" in text)
    config = yaml.safe_load(config)
    config["applications"] = [
        json.loads(re.sub(r'"(MODEL|PILOT|REWARD_MODEL)"', lambda name: f'"{filled(name[1])}"', json.dumps(one)))
        for one in config["applications"]
    ]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    for _, words in OTHERS:
        if words[0] in ("train", "calibrate", "batch"):
            continue
        if words[:2] == ["lab", "eval"]:
            words = [*words, "--prompts", "4", "--out", str(tmp_path)]
        assert run(tmp_path, *map(filled, words), timeout=600)


def test_every_example_was_served_by_a_server_of_its_page():
    pages = {page for pages in SERVERS.values() for page in pages}
    assert {json.dumps([page, xargs]) for page in pages for xargs in requests_of(page)} <= ACCEPTED


def test_every_command_is_run_somewhere_or_for_a_reason():
    ran = {words[0] for _, words in OTHERS} | {"serve"}
    assert ran == {"serve", "doctor", "calibrate", "cluster", "batch", "train", "lab"}
    assert len(SERVERS) >= 8
    assert shutil.which("vllm-align-spec", path=ENVIRONMENT["PATH"])
