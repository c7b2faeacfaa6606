"""A bigram language model that is a given table (`bench.asap_table` writes it as stock weights), and its laws."""

import torch

from vllm_align_spec.bench import asap_table
from vllm_align_spec.bench.asap_table import BOS_ID, CONTROL_IDS, END_ID, NEVER, WORDS, ZERO_ID


class Table:
    """A random bigram law, and what follows from it by enumeration.

    Args:
        seed: of the table.
        spread: standard deviation of the logits.
    """

    def __init__(self, seed, spread=1.5):
        size = len(WORDS)
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(size, size, generator=generator) * spread
        self.logits[:, [*CONTROL_IDS, BOS_ID]] = NEVER

    def write(self, folder):
        return asap_table.write(folder, self.logits.double().numpy())

    def ids(self, text):
        """Token ids of a text whose words are single characters."""
        return [WORDS.index(character) for character in text]

    def text(self, token_ids):
        return "".join(WORDS[i] for i in token_ids if i >= ZERO_ID)

    def log_p(self, token_ids, temperature=1.0, after=BOS_ID):
        """log P of tokens and the end after them."""
        rows = (self.logits / temperature).double().log_softmax(-1)
        total = 0.0
        for token in [*token_ids, END_ID]:
            total += float(rows[after, token])
            after = token
        return total

    def conditional(self, sentences, temperature=1.0):
        """Law of the sentences (lists of token ids) given that one of them is drawn, and the mass of them all."""
        logs = torch.tensor([self.log_p(s, temperature) for s in sentences], dtype=torch.float64)
        return (logs - logs.logsumexp(0)).exp(), float(logs.logsumexp(0).exp())

    def masked(self, sentences, temperature=1.0):
        """Law of the sentences under a mask alone: each token renormalised over those that keep to a sentence."""
        rows = (self.logits / temperature).double().softmax(-1)
        law = []
        for sentence in sentences:
            p, after = 1.0, BOS_ID
            whole = [*sentence, END_ID]
            for i, token in enumerate(whole):
                legal = {[*s, END_ID][i] for s in sentences if s[:i] == sentence[:i]}
                p *= float(rows[after, token] / sum(rows[after, t] for t in legal))
                after = token
            law.append(p)
        return torch.tensor(law, dtype=torch.float64)
