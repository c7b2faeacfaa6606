"""The generated pages say what the code says."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_align_spec.options import METHODS, OptionError, parse_engine

ROOT = Path(__file__).parents[2]


def test_options_and_metrics_pages_are_what_the_code_would_write():
    told = subprocess.run([sys.executable, "tools/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_option_of_every_method_is_on_the_page():
    page = (ROOT / "docs/options.md").read_text()
    assert all(f"| `{name}` |" in page for cls in METHODS for name in cls.model_fields)


def test_a_wrong_type_for_the_control_ids_is_told_with_what_would_be_accepted():
    with pytest.raises(OptionError, match="control_ids='x' is not accepted; accepted: a list of 3, each of it an int"):
        parse_engine({"align_spec": {"control_ids": "x"}})
