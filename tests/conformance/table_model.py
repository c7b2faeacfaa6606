"""A language model whose next-token law is a given table, as stock Llama weights: engines and transformers load it.

The law depends on the latest token. One layer that adds nothing lets the embedding, a unit vector a token, through to
the final norm; the head is the table.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"
SPECIAL = [END, "<reserved_0>", "<reserved_1>", "<reserved_2>", "<bos>"]
END_ID, CONTROL_IDS, BOS_ID = 0, (1, 2, 3), 4
HIDDEN = 64
NEVER = -30.0
"""Logit of tokens that no text contains."""


def write(folder, words, logits):
    """Writes model and tokenizer.

    Args:
        folder: where to.
        words: texts of the ordinary tokens; their ids follow those of ``SPECIAL``.
        logits: [V, V] logits of the next token (column) after each token (row).
    """
    vocabulary = [*SPECIAL, *words]
    size = len(vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, HIDDEN))
        norm = (1 / HIDDEN + config.rms_norm_eps) ** -0.5
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = torch.as_tensor(logits, dtype=torch.float32).T / norm
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=END))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        bos_token="<bos>",
        extra_special_tokens=SPECIAL[1:4],
    )
    tokenizer.save_pretrained(folder)
    return folder


class Table:
    """A bigram law over words, and what follows from it by enumeration.

    Args:
        seed: of the table.
        words: texts of the tokens, in the order of their ids.
        spread: standard deviation of the logits.
    """

    def __init__(self, seed, words=("0", "1", "a", "b"), spread=1.5):
        self.words = list(words)
        size = len(SPECIAL) + len(self.words)
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(size, size, generator=generator) * spread
        self.logits[:, [*CONTROL_IDS, BOS_ID]] = NEVER

    def write(self, folder):
        return str(write(folder, self.words, self.logits))

    def ids(self, text):
        """Token ids of a text whose words are single characters."""
        return [len(SPECIAL) + self.words.index(character) for character in text]

    def text(self, token_ids):
        return "".join(self.words[i - len(SPECIAL)] for i in token_ids if i >= len(SPECIAL))

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
