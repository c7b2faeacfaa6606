"""The documentation builds without a warning, and every command in it is one that the command line takes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vllm_align_spec import cli
from vllm_align_spec.options import METHODS, parse_engine, parse_request

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\b[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            yield page.name, match[1]


def commands(text):
    """Words of each command of a shell script without control structures."""
    # A comment would swallow the end of its line.
    text = re.sub(r"(^|\s)#[^\n]*", r"\1", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n;&|")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    for token in [*lexer, "\n"]:
        if set(token) <= set("\n;&|"):
            if words:
                yield words
            words = []
        else:
            words.append(token)


OURS = [
    (page, words[words.index("vllm-align-spec") + 1 :])
    for page, text in blocks("bash")
    for words in commands(text)
    if "vllm-align-spec" in words
]


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "asap" / "index.html").exists()


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page} {' '.join(words)[:40]}" for page, words in OURS])
def test_a_command_is_one_that_the_command_line_takes(page, words):
    if words[0] in ("serve", "vllm"):
        if words[0] == "vllm" and words[1] != "serve":
            return  # vLLM's own
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        arguments = words[1:] if words[0] == "serve" else words[2:]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        parse_engine(parsed.additional_config)
        return
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            cli._parser().parse_args(words)
    except SystemExit as end:
        pytest.fail(f"exit status {end.code}: {errors.getvalue()}")


def test_there_are_commands_to_look_at():
    assert {words[0] for _, words in OURS} > {"serve", "bench", "lab", "doctor", "calibrate", "train", "cluster"}


def test_options_of_requests_in_the_docs_are_accepted():
    found = 0
    for page, text in blocks("python"):
        compile(text, page, "exec")
        for match in re.finditer(r'"vllm_xargs": (\{[^{}]*\})', text):
            options = json.loads(match[1].replace("True", "true"))
            assert parse_request(options), page
            found += 1
    assert found >= len(METHODS) // 2


def test_configurations_of_ray_in_the_docs_are_accepted():
    from ray.serve.schema import ServeDeploySchema

    from vllm_align_spec.cluster.cli import _check

    config, share = (yaml.safe_load(text) for page, text in blocks("yaml") if page == "cluster.md")
    assert parse_engine(share["additional_config"]).asap.share is not None
    for application in ServeDeploySchema.model_validate(config).applications:
        _check(application.import_path, application.args)
