"""Byte-level BPE tokenizers that stock transformers load, and the two chat formats of the lab."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Format:
    """A vocabulary's size, its special tokens, and how it writes a conversation."""

    vocab_size: int
    pad: str
    bos: str
    end: str
    other_specials: tuple[str, ...]
    chat_template: str

    @property
    def specials(self) -> tuple[str, ...]:
        """All special tokens, in the order of their ids."""
        return (self.pad, self.bos, self.end, *self.other_specials)


# In both formats the last token before an answer is a plain newline: no special token, and never a stop token.
MAIN = Format(
    vocab_size=4096,
    pad="<|pad|>",
    bos="<|bos|>",
    end="<|end|>",
    other_specials=("<|system|>", "<|user|>", "<|assistant|>", *(f"<|reserved_{i}|>" for i in range(8))),
    chat_template=(
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}"
        "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
)
OTHER = Format(
    vocab_size=2048,
    pad="[PAD]",
    bos="[BOS]",
    end="[EOS]",
    other_specials=(),
    chat_template=(
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ '### Reply\n' + message['content'] + eos_token + '\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Request\n' + message['content'] + '\n' }}"
        "{% else %}"
        "{{ '### Setting\n' + message['content'] + '\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Reply\n' }}{% endif %}"
    ),
)


def train(texts: Iterable[str], form: Format) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of exactly ``form.vocab_size`` tokens.

    A newline and a digit are always tokens of their own: so an answer's first token never merges into the prompt's
    last, and sums are spelled digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n|[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=form.vocab_size,
        special_tokens=list(form.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != form.vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, {form.vocab_size} were wanted")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=form.pad,
        bos_token=form.bos,
        eos_token=form.end,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    fast.chat_template = form.chat_template
    return fast
