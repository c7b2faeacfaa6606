"""Tries as bytes: what `trie` writes to a file, and what it tells other replicas of its news.

Both are safetensors with a header of what the tries depend on and a checksum over all tensors. Whoever can write such
bytes can write the checksum too, so what is read is checked until it can only be tries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

Tensors = dict[str, np.ndarray[Any, Any]]

MAX_KEY_BYTES = 64
"""Keys are digests."""

_COMMON: dict[str, type[np.generic]] = {
    "keys": np.uint8,  # of all tries, one after the other
    "key_bytes": np.int32,  # [tries]
    "trie_nodes": np.int32,  # [tries]
    # [nodes] trie after trie, its root first, parents before their children
    "parent": np.int32,
    "token": np.int32,
    "log_p": np.float64,
}
FILE = "vllm-align-spec tries 2"
"""Whole tries, from the least to the most recently used."""
NEWS = "vllm-align-spec news 1"
"""New nodes and their ancestors; ``legal`` is the log mass of all legal tokens, visited or not."""
_TENSORS: dict[str, dict[str, type[np.generic]]] = {
    FILE: {**_COMMON, "log_c": np.float64, "unvisited": np.float64},
    NEWS: {**_COMMON, "legal": np.float64},
}


class TrieFileError(ValueError):
    """Bytes that are not what they should be; the message names where they came from and the mismatch."""


def pack(kind: str, tensors: Tensors, header: Mapping[str, str]) -> bytes:
    """The bytes of some tries.

    Args:
        kind: `FILE` or `NEWS`.
        tensors: what the kind asks for.
        header: what the tries depend on (model, revision, dtype, ...); `unpack` wants the same.
    """
    metadata = {"format": kind, "sha256": checksum(tensors)}
    data: bytes = save(tensors, metadata | {f"header.{name}": value for name, value in header.items()})
    return data


def unpack(source: str, kind: str, data: bytes, header: Mapping[str, str], vocab_size: int) -> Tensors:
    """The tensors, which describe tries whose tokens lie below ``vocab_size``.

    Raises:
        TrieFileError: the bytes are not of this kind, not for this header, or damaged.
    """
    try:
        tensors: Tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrieFileError(f"{source}: not a safetensors file: {error}") from error
    if metadata.get("format") != kind:
        raise TrieFileError(f"{source}: format is {metadata.get('format')!r}, not {kind!r}")
    found = {name.removeprefix("header."): metadata[name] for name in metadata if name.startswith("header.")}
    for name in sorted(found.keys() | header.keys()):
        if found.get(name) != header.get(name):
            raise TrieFileError(f"{source}: {name} is {found.get(name)!r}, not {header.get(name)!r}")
    kinds = {name: tensor.dtype.name for name, tensor in sorted(tensors.items())}
    wanted = {name: np.dtype(dtype).name for name, dtype in sorted(_TENSORS[kind].items())}
    if kinds != wanted:
        raise TrieFileError(f"{source}: tensors are {kinds}, not {wanted}")
    if metadata.get("sha256") != checksum(tensors):
        raise TrieFileError(f"{source}: sha256 is {checksum(tensors)}, not {metadata.get('sha256')} as it says")
    _check(source, tensors, vocab_size)
    return tensors


def split_keys(tensors: Tensors) -> list[bytes]:
    """The key of each trie."""
    joined = tensors["keys"].tobytes()
    ends = np.cumsum(tensors["key_bytes"], dtype=np.int64).tolist()
    return [joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def checksum(tensors: Tensors) -> str:
    """SHA-256 of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _check(source: str, tensors: Tensors, vocab_size: int) -> None:
    def demand(condition: Any, what: str) -> None:
        if not np.all(condition):
            raise TrieFileError(f"{source}: malformed: {what}")

    demand([tensor.ndim == 1 for tensor in tensors.values()], "a tensor with more or less than one dimension")
    sizes, key_bytes, parent, token = (tensors[name] for name in ("trie_nodes", "key_bytes", "parent", "token"))
    values = {name: tensor for name, tensor in tensors.items() if tensor.dtype == np.float64}
    demand([len(tensor) == len(parent) for tensor in (token, *values.values())], "node counts")
    demand(sizes >= 1, "a trie without nodes")
    demand(sizes.sum(dtype=np.int64) == len(parent), "trie_nodes do not add up to the number of nodes")
    demand(len(key_bytes) == len(sizes), "not one key a trie")
    demand((key_bytes >= 0) & (key_bytes <= MAX_KEY_BYTES), f"a key of more than {MAX_KEY_BYTES} bytes")
    demand(key_bytes.sum(dtype=np.int64) == len(tensors["keys"]), "key_bytes do not add up to the size of keys")
    demand(len(set(split_keys(tensors))) == len(sizes), "two tries with one key")
    start = np.repeat(np.cumsum(sizes, dtype=np.int64) - sizes, sizes)
    place = np.arange(len(parent))
    is_root = place == start
    demand(np.where(is_root, parent == -1, (start <= parent) & (parent < place)), "a parent that does not come before")
    demand(np.where(is_root, token == -1, (token >= 0) & (token < vocab_size)), "a token outside the vocabulary")
    edges = (parent.astype(np.int64) << 32 | token)[~is_root]
    demand(len(np.unique(edges)) == len(edges), "two children with one token")
    for name, tensor in values.items():
        demand(tensor <= 0.0, f"{name} above 0")
