"""A Transformer beside the target that follows the same requests.

Each request has a slot of the cache, whose column c holds keys and values of the companion's c-th token.
A step feeds what the target was fed, the *chain* (last accepted token, then this step's drafts), and behind it
any number of *candidates* for each row::

    column    0 ..... n-1 | n  n+1 .. n+L-1 | n+L ...................... n+L+L*k-1
    holds     prefix      | chain           | k candidates of row 0, of row 1, ...
    sees      itself and what is before     | prefix, chain up to its row, itself

All of it is one forward pass for all requests. Nothing is ever taken out of the cache: a chain token that was rejected
and a candidate that was not chosen stand behind the prefix, where the next step writes over them. So an accepted draft
needs no second pass, and a step that is run again gives the same numbers.

The model is transformers' own. It differs from a plain forward pass in its attention function and its cache, and a
companion compares the two with each other before it serves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_align_spec.options import CompanionOptions, OptionError
from vllm_align_spec.processors.rows import send

logger = logging.getLogger("vllm.align_spec")

ATTENTION = "align_spec_companion"
CHUNK = 256
"""Prompt tokens of one line in one forward pass."""
SPAN = 64
"""Columns that a step looks at are a multiple of this."""
BLOCK = 32
"""Prompt tokens that one digest stands for; see `Companion.enter`."""
RECORDED_TOKENS = 1024
"""Most tokens of a recorded pass, padding included. With more of them a GPU is busy enough without."""
RECORDED_SPAN = 256
"""The shortest span of recorded passes; the others are twice as long, each than the one before."""
COMMON_CANDIDATES = 10
"""Passes are recorded for so many candidates of a row, which is ARGS' default, and for the most that may be asked."""


class Companion:
    """One companion of a worker.

    Args:
        name: as the operator calls it.
        options: what to load.
        device: where it runs.
        dtype: of weights and cache unless the options name one.
        slots: requests that the engine runs at once.
        rows: L, the most tokens that a request is fed in one step.
        entries: E, as in `processors.rows.Layout`.
        max_len: longest sequence of the engine, in tokens. ``options`` may name another: with a tokenizer of its own
            a companion may need more.
        graphs: whether to `record` the passes of decoding as CUDA graphs, on a device that has them.

    Raises:
        OptionError: the model cannot be a companion, or does not fit into memory.
    """

    def __init__(
        self,
        name: str,
        options: CompanionOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        rows: int,
        entries: int,
        max_len: int,
        graphs: bool = False,
    ) -> None:
        self.name, self.role, self.device = name, options.role, device
        where = f"additional_config.align_spec.companions.{name}"
        dtype = dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        config = load_config(name, options)
        text = config.get_text_config()
        self.max_len = min(options.max_len or max_len, text.max_position_embeddings)
        self.max_candidates = options.max_candidates if options.role == "reward" else 0
        self.slots = min(slots, options.max_slots or slots)
        # The last column takes what must not be seen.
        self.columns = self.max_len + rows * (1 + self.max_candidates) + 1
        heads = text.num_key_value_heads if hasattr(text, "num_key_value_heads") else text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (text.num_hidden_layers, self.slots, self.columns, heads, dim)
        self.cache_bytes = 2 * math.prod(shape) * dtype.itemsize
        self._fits(where, config, dtype)

        kind = AutoModelForSequenceClassification if options.role == "reward" else AutoModelForCausalLM
        self._model, loaded = kind.from_pretrained(
            options.model,
            revision=options.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation="sdpa",
        )
        missing = sorted(loaded["missing_keys"])
        if missing or loaded["mismatched_keys"]:
            raise OptionError(
                f"{where}.model={options.model!r} is no {options.role} model: its files lack {missing[:3] or 'no'} "
                f"weights and misshape {sorted(loaded['mismatched_keys'])[:3] or 'none'}; accepted: a checkpoint of "
                f"{kind.__name__[len('AutoModelFor') :]}"
            )
        self._model.to(device).eval().requires_grad_(False)
        self._body = getattr(self._model, self._model.base_model_prefix)
        self._head = self._find_head(where)
        self._cache = _Cache(shape, dtype, device)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self._grid = torch.arange(rows * max(self.max_candidates, 1), device=device)

        self._slot = np.full(entries, -1)  # of an entry
        self._shift = np.zeros(entries, dtype=np.int64)  # column of a token minus its position in the target's sequence
        self._owner = np.full(self.slots, -1)  # entry in a slot; -1 for none
        self._free = list(range(self.slots - 1, -1, -1))  # lowest last
        self._digests: list[Sequence[int]] = [()] * self.slots  # of what a slot's first columns hold
        self._bound = np.zeros(self.slots, dtype=np.int64)  # columns that may be in use
        self._stepped = np.zeros(self.slots, dtype=np.int64)  # when it was last fed
        self._ticks = 0
        self._waiting: dict[int, tuple[torch.Tensor, int]] = {}  # entry -> its tokens, and how many are cached already
        self._recorded: dict[tuple[int, int, int], torch.cuda.CUDAGraph | None] = {}
        self._check(where)
        if graphs and device.type == "cuda":
            self.record(rows)
            try:
                self._check(where)
            except OptionError as error:
                self._recorded.clear()
                logger.warning("Companion %s runs without CUDA graphs, which say something else: %s", name, error)
        logger.info(
            "Companion %s: %s, %d slots of %d tokens, %.1f MiB of weights, %.1f MiB of cache",
            *(name, options.model, self.slots, self.max_len, self.weight_bytes / 2**20, self.cache_bytes / 2**20),
        )

    def _fits(self, where: str, config: Any, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            blank = AutoModelForCausalLM.from_config(config, dtype=dtype)
        weights = sum(p.numel() for p in blank.parameters()) * dtype.itemsize
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        if weights + self.cache_bytes > free:
            raise OptionError(
                f"{where} needs {weights / 2**30:.2f} GiB of weights and {self.cache_bytes / 2**30:.2f} GiB of cache "
                f"({self.slots} slots of {self.columns} columns), and {self.device} has {free / 2**30:.2f} GiB to spare"
                "; accepted: a smaller max_slots, max_len, max_candidates or --max-num-seqs, or a smaller model"
            )

    def _find_head(self, where: str) -> Any:
        if self.role == "lm":
            return self._model.get_output_embeddings()
        head = getattr(self._model, "score", None)
        if head is None or self._model.config.num_labels != 1:
            raise OptionError(
                f"{where}.model has {self._model.config.num_labels} labels; accepted: a sequence classifier with one "
                "label and a linear head over each token (its `score`)"
            )
        return head

    # Requests --------------------------------------------------------------------------------------------------

    def enter(
        self, entry: int, prompt: torch.Tensor, response: torch.Tensor, prompt_len: int, digests: Sequence[int]
    ) -> None:
        """A request enters the engine's batch, for the first time or again; `prepare` does the work.

        Args:
            entry: the request's.
            prompt: [p] int64, as the companion reads it; p >= 1.
            response: [n] int64, tokens so far. The last one of all is fed with the next step and not before.
            prompt_len: tokens of the prompt as the target reads it.
            digests: one for each whole block of `BLOCK` tokens of ``prompt``; equal ones stand for equal beginnings.

        Raises:
            RuntimeError: more requests than slots, or a sequence that is too long.
        """
        self.read(entry, torch.cat([prompt, response])[:-1], len(prompt) - prompt_len, digests)

    def read(self, entry: int, tokens: torch.Tensor, shift: int, digests: Sequence[int]) -> None:
        """Gives a request a slot and has `prepare` bring ``tokens`` into it; see `enter`.

        Args:
            entry: the request's.
            tokens: [n] int64, everything before the next step's chain.
            shift: columns minus positions of the tokens to come.
            digests: as for `enter`.
        """
        if len(tokens) >= self.max_len:
            raise RuntimeError(f"{len(tokens) + 1} tokens exceed the {self.max_len} of companion {self.name}")
        slot = int(self._slot[entry])
        if slot < 0:
            slot = self._claim()
            self._owner[slot] = entry
            self._slot[entry] = slot
        cached = self._reuse(slot, digests, len(tokens))
        self._digests[slot] = tuple(digests)
        self._shift[entry] = shift
        self._bound[slot] = len(tokens)
        self._stepped[slot] = self._ticks
        self._waiting[entry] = (tokens, cached)

    def _claim(self) -> int:
        if self._free:
            return self._free.pop()
        # Runner V2 does not say that a request has left. One that was not fed in the last step is not there any more.
        slot = int(self._stepped.argmin())
        if self._stepped[slot] >= self._ticks:
            raise RuntimeError(f"all {self.slots} slots of companion {self.name} are taken")
        self.leave(int(self._owner[slot]))
        return self._free.pop()

    def _reuse(self, slot: int, digests: Sequence[int], most: int) -> int:
        """Brings the longest known beginning into a slot; how many of its columns are right then."""
        best, source = 0, slot
        for other, known in enumerate(self._digests):
            same = 0
            for mine, theirs in zip(digests, known, strict=False):
                if mine != theirs:
                    break
                same += 1
            # A neighbour that waits itself has not computed what its digests promise.
            if same > best and int(self._owner[other]) not in self._waiting:
                best, source = same, other
        known_columns = min(best * BLOCK, most)
        if known_columns and source != slot:
            self._cache.copy(source, slot, known_columns)
        return known_columns

    def leave(self, entry: int) -> None:
        """The request has left the batch. What its slot holds is kept until another one needs it."""
        slot = int(self._slot[entry])
        if slot >= 0:
            self._slot[entry] = -1
            self._owner[slot] = -1
            if self._waiting.pop(entry, None) is not None:
                self._digests[slot] = ()  # it does not hold what they promise
            self._free.append(slot)
            self._free.sort(reverse=True)

    def knows(self, entries: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """[S] which requests have a slot."""
        known: np.ndarray[Any, np.dtype[np.bool_]] = self._slot[entries] >= 0
        return known

    def prepare(self) -> None:
        """Begins a step: reads what requests that entered since the last one bring, in chunks of `CHUNK` tokens."""
        self._ticks += 1
        while self._waiting:
            chunks = {e: tokens[done : done + CHUNK] for e, (tokens, done) in self._waiting.items()}
            entries = [e for e, chunk in chunks.items() if len(chunk)]
            if entries:
                width = max(len(chunks[e]) for e in entries)
                tokens = torch.zeros(len(entries), width, dtype=torch.int64, device=self.device)
                done = np.array([self._waiting[e][1] for e in entries])
                size = np.array([len(chunks[e]) for e in entries])
                for line, e in enumerate(entries):
                    tokens[line, : size[line]] = chunks[e]
                place = np.arange(width)
                column = np.where(place < size[:, None], done[:, None] + place, self.columns - 1)
                columns = send(column, self.device)
                limit = send(np.minimum(done[:, None] + place, column), self.device)
                slots = self._slot[entries]
                self._forward(slots, tokens, columns, limit, limit, int((done + size).max()))
            for e, chunk in chunks.items():
                whole, done_before = self._waiting[e]
                if done_before + len(chunk) >= len(whole):
                    del self._waiting[e]
                else:
                    self._waiting[e] = (whole, done_before + len(chunk))

    # Steps -----------------------------------------------------------------------------------------------------

    def rewards(
        self,
        entry: np.ndarray[Any, Any],
        position: torch.Tensor,
        count: torch.Tensor,
        chain: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """What the reward model says of each candidate, behind everything before it. Advances the requests.

        Args:
            entry: [S], on the host.
            position: [S] int64, as in `processors.rows.Rows`.
            count: [S] int64, as there.
            chain: [S, L] int64, what is fed at each row.
            candidates: [S, L, k] int64, tokens that may come after each row; k may be 0.

        Returns:
            [S, L, k] float32; rows beyond ``count`` repeat the last one.
        """
        after = self._grid[: chain.shape[1]].expand_as(chain)
        return repeat_last(self.score(entry, position, count, chain, after, candidates[..., None])[..., 0], count)

    def score(
        self,
        entry: np.ndarray[Any, Any],
        position: torch.Tensor,
        count: torch.Tensor,
        chain: torch.Tensor,
        after: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        """As `rewards`, for candidates of several tokens and not behind every token of the chain.

        Args:
            entry: [S], on the host.
            position: [S] int64, of the chain's first token.
            count: [S] int64, tokens of the chain that are real.
            chain: [S, C] int64.
            after: [S, G] int64, the token of the chain behind which a group of candidates stands.
            candidates: [S, G, k, m] int64.

        Returns:
            [S, G, k, m] float32, the reward at each token of each candidate.
        """
        hidden = self._step(entry, position, count, chain, after, candidates)[:, chain.shape[1] :]
        rewards: torch.Tensor = self._head(hidden).float().view(candidates.shape)
        return rewards

    def logits(
        self, entry: np.ndarray[Any, Any], position: torch.Tensor, count: torch.Tensor, chain: torch.Tensor
    ) -> torch.Tensor:
        """The language model's own next-token logits at each row. Advances the requests.

        Args:
            entry: [S], on the host.
            position: [S] int64, as in `processors.rows.Rows`.
            count: [S] int64, as there.
            chain: [S, L] int64, what is fed at each row.

        Returns:
            [S, L, V'] float32, V' the companion's vocabulary; rows beyond ``count`` repeat the last one.
        """
        nothing = chain.new_empty(*chain.shape, 0, 1)
        hidden = repeat_last(self._step(entry, position, count, chain, chain, nothing), count)
        logits: torch.Tensor = self._head(hidden).float()
        return logits

    def _step(
        self,
        entry: np.ndarray[Any, Any],
        position: torch.Tensor,
        count: torch.Tensor,
        chain: torch.Tensor,
        after: torch.Tensor,
        candidates: torch.Tensor,
    ) -> torch.Tensor:
        requests, rows = chain.shape
        _, groups, k, pieces = candidates.shape
        slots = self._slot[entry]
        self._stepped[slots] = self._ticks
        bound = np.minimum(self._bound[slots] + rows, self.max_len)
        if self.device.type == "cpu" and requests:
            # The host may look: exactly what is in use, also under speculation.
            bound = np.minimum(position.numpy() + self._shift[entry] + rows, self.max_len)
        self._bound[slots] = bound
        trash = self.columns - 1
        r = self._grid[:rows]
        base = (position + send(self._shift[entry], self.device))[:, None]
        row = base + r
        seen = (r < count[:, None]) & (row < self.max_len)
        column = torch.where(seen, row, trash)
        limit = torch.where(seen, row, 0)
        tokens, place, start = chain, limit, column
        if k:
            own = base + rows + self._grid[: groups * k * pieces]
            behind = limit.gather(1, after).repeat_interleave(k * pieces, 1)
            real = seen.gather(1, after).repeat_interleave(k * pieces, 1)
            piece = (self._grid[:pieces]).repeat(groups * k)
            tokens = torch.cat([chain, candidates.reshape(requests, -1)], 1)
            column = torch.cat([column, torch.where(real, own, trash)], 1)
            start = torch.cat([start, torch.where(real, own - piece, trash)], 1)
            place = torch.cat([limit, torch.where(real, behind + 1 + piece, 0)], 1)
            limit = torch.cat([limit, behind], 1)
        span = int(bound.max(initial=0)) + groups * k * pieces
        return self._forward(slots, tokens, column, limit, place, span, start if pieces > 1 else None)

    @torch.inference_mode()
    def _forward(
        self,
        slots: np.ndarray[Any, Any],
        tokens: torch.Tensor,
        column: torch.Tensor,
        limit: torch.Tensor,
        place: torch.Tensor,
        span: int,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One pass over some lines.

        Args:
            slots: [B], on the host; distinct.
            tokens: [B, Q] int64.
            column: [B, Q] int64, where each token's keys go.
            limit: [B, Q] int64, the last column that it sees besides its own.
            place: [B, Q] int64, its position for the model.
            span: columns that anything here sees.
            start: [B, Q] int64, the first column of the candidate that a token belongs to; None if its own is.

        Returns:
            [B, Q, H], after the model's final norm.
        """
        wide = int(slots.max(initial=-1)) + 1
        if shape := self._shape_of(wide, len(slots), tokens.shape[1], span):
            return self._replay(shape, slots, [tokens, column, limit, place, column if start is None else start])
        span = min(-(-span // SPAN) * SPAN, self.columns - 1)
        in_order = bool((slots == np.arange(len(slots))).all())
        line = None if in_order else send(slots, self.device)
        here: slice | torch.Tensor
        dense = line is not None and wide <= 2 * len(slots)
        if line is not None and dense:
            # All slots up to the highest, so that keys need no copy; those without a request do nothing that counts.
            def spread(values: torch.Tensor, rest: int) -> torch.Tensor:
                return torch.full((wide, values.shape[1]), rest, device=self.device).index_copy_(0, line, values)

            trash = self.columns - 1
            tokens, column, limit, place = (
                spread(values, rest) for values, rest in ((tokens, 0), (column, trash), (limit, 0), (place, 0))
            )
            start = None if start is None else spread(start, trash)
            at, here = torch.arange(wide, device=self.device), slice(wide)
        else:
            at = torch.arange(len(slots), device=self.device) if line is None else line
            here = slice(len(slots)) if line is None else line
        hidden = self._pass(tokens, column, limit, place, start, at, here, span)
        return hidden[line] if dense else hidden

    def _pass(
        self,
        tokens: torch.Tensor,
        column: torch.Tensor,
        limit: torch.Tensor,
        place: torch.Tensor,
        start: torch.Tensor | None,
        at: torch.Tensor,
        here: slice | torch.Tensor,
        span: int,
    ) -> torch.Tensor:
        """What of `_forward` happens on the device: ``at`` [B] and ``here`` both name the slots. Of fixed sizes, and
        nothing in it waits for the device, so it can be recorded."""
        seen = torch.arange(span, device=self.device)
        itself = seen == column[..., None]
        if start is not None:
            itself = (seen >= start[..., None]) & (seen <= column[..., None])
        sees = (seen <= limit[..., None]) | itself
        group = self._cache.group(self._model.config)
        mask = torch.zeros(sees.shape, dtype=self._cache.dtype, device=self.device).masked_fill_(~sees, -torch.inf)
        self._cache.point((at[:, None] * self._cache.columns + column).reshape(-1), here, span)
        hidden: torch.Tensor = self._body(
            input_ids=tokens,
            position_ids=place,
            past_key_values=self._cache,
            use_cache=False,
            companion_mask=mask[:, None].repeat(1, 1, group, 1),
        ).last_hidden_state
        return hidden

    # Recorded passes -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def record(self, rows: int) -> None:
        """Makes the passes of decoding such that a CUDA device launches each as one graph.

        Their shapes are fixed: numbers of lines, each twice the one before; tokens of a line, with drafts and without;
        columns that are seen. Steps in between are padded, and what fits no shape runs as it is. Where something in the
        model cannot be recorded, nothing is. A CPU has no graphs; there this only fixes the shapes.

        Args:
            rows: L, as for the constructor.
        """
        candidates = {min(COMMON_CANDIDATES, self.max_candidates), self.max_candidates}
        lines = _doubling(1, self.slots)
        queries = sorted({row * (1 + k) for row in (1, rows) for k in candidates})
        spans = _doubling(RECORDED_SPAN, self.columns - 1)
        size = max((a * b for a in lines for b in queries if a * b <= RECORDED_TOKENS), default=0)
        rest = [0, self.columns - 1, 0, 0, self.columns - 1]
        self._rest = torch.tensor(rest, device=self.device).view(5, 1, 1)
        self._inputs = self._rest.view(5, 1).repeat(1, size)
        width = self._model.config.get_text_config().hidden_size
        self._hidden = torch.zeros(size, width, dtype=self._cache.dtype, device=self.device)
        shapes = [(a, b, c) for c in reversed(spans) for b in queries for a in reversed(lines) if a * b <= size]
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        try:
            for shape in tqdm(shapes, f"companion {self.name}: passes", disable=pool is None):
                graph = None
                if pool is not None:
                    self._fixed(*shape)  # allocates and chooses kernels, which a capture cannot
                    torch.cuda.synchronize(self.device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                        self._fixed(*shape)
                self._recorded[shape] = graph
        except RuntimeError as error:
            self._recorded.clear()
            logger.warning("Companion %s runs without CUDA graphs: %s", self.name, error)
        self._ladders = lines, queries, spans

    def _shape_of(self, wide: int, requests: int, queries: int, span: int) -> tuple[int, int, int] | None:
        """The recorded shape for a pass over slots below ``wide``, or None."""
        if not self._recorded or wide > 2 * requests:
            return None
        wanted = (wide, queries, span)
        fits = [next((one for one in ladder if one >= n), 0) for n, ladder in zip(wanted, self._ladders, strict=True)]
        shape = (fits[0], fits[1], fits[2])
        return shape if shape in self._recorded else None

    def _replay(
        self, shape: tuple[int, int, int], slots: np.ndarray[Any, Any], values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        lines, queries, _ = shape
        used, line = values[0].shape[1], send(slots, self.device)
        inputs = self._inputs[:, : lines * queries].view(5, lines, queries)
        inputs.copy_(self._rest)
        inputs[:, :, :used].index_copy_(1, line, torch.stack(list(values)))
        graph = self._recorded[shape]
        if graph is None:
            self._fixed(*shape)
        else:
            graph.replay()
        return self._hidden[: lines * queries].view(lines, queries, -1)[line, :used]

    def _fixed(self, lines: int, queries: int, span: int) -> None:
        """A pass over the first slots, from `_inputs` to `_hidden`."""
        tokens, column, limit, place, start = self._inputs[:, : lines * queries].view(5, lines, queries)
        at = torch.arange(lines, device=self.device)
        hidden = self._pass(tokens, column, limit, place, start, at, slice(lines), span)
        self._hidden[: lines * queries].copy_(hidden.flatten(0, 1))

    def _check(self, where: str) -> None:
        """Refuses an architecture that this file does not compute as transformers does."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self._model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (1, min(24, self.max_len - 2)), generator=generator).to(self.device)
        n, candidates = tokens.shape[1] - 3, min(1, self.max_candidates)
        expected = self._model.config.name_or_path
        with torch.inference_mode():
            plain = self._body(input_ids=tokens, use_cache=False).last_hidden_state
            self._model.set_attn_implementation(ATTENTION)
            self.read(0, tokens[0, :n], 0, ())
            self.prepare()
            one = np.zeros(1, dtype=np.int64)
            ours = self._step(
                one, torch.full((1,), n, device=self.device), torch.ones_like(tokens[0, :1]), tokens[:, n : n + 1],
                torch.zeros_like(tokens[:, :1]), tokens[:, n + 1 : n + 1 + candidates].view(1, 1, candidates, 1),
            )  # fmt: skip
        self.leave(0)
        self._bound[:] = 0
        self._digests = [()] * self.slots
        reference = plain[:, n : n + 1 + candidates].float()
        error = (ours.float() - reference).abs().max().item()
        if not error <= 0.05 * (1 + reference.abs().max().item()):
            raise OptionError(
                f"{where}.model={expected!r} is of an architecture ({self._model.config.model_type}) whose attention "
                f"this plugin does not reproduce (hidden states differ by {error:.3g}); accepted: decoder-only models "
                "with plain causal attention in every layer, as Llama, Mistral, Qwen2 and Qwen3 have it"
            )


class _Cache:
    """Keys and values of all slots, as transformers' attention layers expect a cache."""

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.columns, self.dtype, self._heads = shape[2], dtype, shape[3]
        self._layers = [torch.zeros(2, *shape[1:], dtype=dtype, device=device) for _ in range(shape[0])]
        self._flat = [(layer[0].flatten(0, 1), layer[1].flatten(0, 1)) for layer in self._layers]

    def group(self, config: Any) -> int:
        """Query heads that share keys."""
        return int(config.get_text_config().num_attention_heads) // self._heads

    def point(self, write: torch.Tensor, lines: slice | torch.Tensor, span: int) -> None:
        """Says where the next pass writes ([B * Q] lines of slots times columns) and what it reads."""
        self._write, self._lines, self._span = write, lines, span

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one layer's new keys and values, [B, heads, Q, D] each; gives all that may be seen."""
        seen = []
        for new, flat, whole in zip((keys, values), self._flat[layer], self._layers[layer], strict=True):
            flat.index_copy_(0, self._write, new.transpose(1, 2).flatten(0, 1))
            seen.append(whole[self._lines, : self._span].transpose(1, 2))
        return seen[0], seen[1]

    def copy(self, source: int, target: int, columns: int) -> None:
        """Copies the first columns of a slot into another one."""
        for layer in self._layers:
            layer[:, target, :columns] = layer[:, source, :columns]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    companion_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    lines, heads, queries, dim = query.shape
    # Query heads that share keys stand together: as more queries of one head they need no copies of its keys.
    folded = query.reshape(lines, key.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=companion_mask, scale=scaling)
    return out.reshape(lines, heads, queries, dim).transpose(1, 2), None


def _doubling(first: int, last: int) -> list[int]:
    """``first``, twice that, and so on, and ``last``."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]


def repeat_last(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[S, L, X] with the last row that counts in place of those behind it: lines that stand for one row agree."""
    rows = values.shape[1]
    if rows == 1:
        return values
    r = torch.minimum(torch.arange(rows, device=values.device), (count[:, None] - 1).clamp(min=0))
    return values.gather(1, r[..., None].expand(-1, -1, values.shape[2]))


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


def load_config(name: str, options: CompanionOptions) -> Any:
    """The configuration of a companion, without its weights.

    Raises:
        OptionError: there is none, or it needs code of its own.
    """
    try:
        return AutoConfig.from_pretrained(options.model, revision=options.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"additional_config.align_spec.companions.{name}.model={options.model!r} cannot be loaded: {error}; "
            "accepted: a folder or repository with config.json and safetensors"
        ) from None
