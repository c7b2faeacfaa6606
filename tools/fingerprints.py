"""Prints the fingerprint of every patched symbol in a tree of vLLM sources (installed, or unpacked from a wheel).

Usage: python tools/fingerprints.py PATH_TO_SITE_PACKAGES [...]
"""

import ast
import sys
from pathlib import Path

from vllm_align_spec.patches import ABSENT, fingerprint_node
from vllm_align_spec.patches.ledger import LEDGER


def find(tree: ast.Module, path: list[str], root: Path) -> ast.AST | None:
    """The definition of a dotted symbol, following one import if the module only re-exports it."""
    scope: ast.AST | None = tree
    for part in path:
        assert scope is not None
        body = getattr(scope, "body", [])
        definition = next((n for n in body if getattr(n, "name", None) == part), None)
        if definition is None:
            for node in body:
                if isinstance(node, ast.ImportFrom) and any(a.name == part for a in node.names):
                    file = root / (str(node.module).replace(".", "/") + ".py")
                    file = file if file.exists() else file.with_suffix("") / "__init__.py"
                    return find(ast.parse(file.read_text()), path, root)
        scope = definition
        if scope is None:
            return None
    return scope


for root in map(Path, sys.argv[1:]):
    print(root)
    for patch in LEDGER:
        file = root / (patch.module.replace(".", "/") + ".py")
        file = file if file.exists() else file.with_suffix("") / "__init__.py"
        node = find(ast.parse(file.read_text()), patch.symbol.split("."), root)
        print(f"  {patch.name:18} {ABSENT if node is None else fingerprint_node(node)}  {patch.module}.{patch.symbol}")
