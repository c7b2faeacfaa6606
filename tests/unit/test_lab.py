"""The lab: its language, its tokenizers, and the models that ship with the package."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from vllm_align_spec import lab
from vllm_align_spec.drafters.config import check_target, read
from vllm_align_spec.lab import cli, training, world
from vllm_align_spec.lab.drafters import NAMES, SECOND, WIDE
from vllm_align_spec.lab.judge import Judge

unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no reason to fail

CAUSAL = ("base", "pilot", "pilot-other")
JUDGES = ("judge", "judge-other")
conversations = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system")), "content": st.text(max_size=40)}),
    min_size=1,
    max_size=3,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(lab.model_path(name))
    return loaded


def prompts(split: world.Split, kind: world.Kind, count: int) -> set[str]:
    rng = random.Random(f"{split} {kind}")
    documents = (world.draw(kind, rng, split) for _ in range(count))
    return {d.messages[0]["content"] for d in documents if d.messages and d.messages[0]["role"] == "user"}


# --- the language ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_documents_and_another_seed_others() -> None:
    def take(seed: int) -> list[world.Document]:
        return list(itertools.islice(world.stream(seed, "train"), 200))

    assert take(3) == take(3)
    assert take(3) != take(4)


@pytest.mark.parametrize("kind", world.KINDS)
def test_no_prompt_is_on_both_sides_of_the_split(kind: world.Kind) -> None:
    train, heldout = prompts("train", kind, 4000), prompts("heldout", kind, 1000)
    assert train
    assert heldout
    assert not train & heldout


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_document_is_on_the_side_it_was_drawn_for(split: world.Split) -> None:
    assert all(world.split_of(d.key) == split for d in itertools.islice(world.stream(5, split), 1000))


@unhurried
@given(seed=st.integers(0, 10_000))
def test_no_template_syntax_is_left_in_an_answer(seed: int) -> None:
    rng = random.Random(seed)
    request = world.draw_request(rng, "train")
    texts = (world.ask(request, rng, "Maya"), world.helpful(request, rng, "Maya"), world.unhelpful(request, rng))
    for text in texts:
        assert not set("{}|$") & set(text)


@unhurried
@given(seed=st.integers(0, 10_000))
def test_a_record_is_json_whatever_its_layout(seed: int) -> None:
    document = world.record(random.Random(seed), "train")
    value = json.loads(document.messages[-1]["content"])
    told = [item for item in value.values() if isinstance(item, str) or type(item) is int]
    assert all(str(item) in document.messages[0]["content"] for item in told)


@unhurried
@given(seed=st.integers(0, 10_000))
def test_every_equation_of_a_worked_sum_holds(seed: int) -> None:
    answer = world.arithmetic(random.Random(seed), "train").messages[-1]["content"]
    for equation in answer.split(". ")[:-1]:
        left, right = equation.rstrip(".").split(" = ")
        a, sign, b = left.split()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(right)


def test_the_first_three_words_tell_the_manner_and_two_answers_in_five_are_helpful() -> None:
    def opening(answer: str) -> tuple[str, ...]:
        return tuple(word.strip(",.!?") for word in answer.split() if word.strip(",.!?") not in world.NAMES)[:3]

    rng = random.Random(1)
    requests = [world.draw_request(rng, "train") for _ in range(3000)]
    helpful = {opening(world.helpful(request, rng)) for request in requests}
    unhelpful = {opening(world.unhelpful(request, rng)) for request in requests}
    assert not helpful & unhelpful
    answers = [next(m for m in world.chat(rng, "train").messages if m["role"] == "assistant") for _ in range(3000)]
    share = sum(opening(answer["content"]) in helpful for answer in answers) / len(answers)
    assert share == pytest.approx(world.HELPFUL_SHARE, abs=0.05)


# --- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("base", 4096), ("pilot-other", 2048)])
def test_a_vocabulary_has_its_exact_size(name: str, size: int) -> None:
    assert len(tokenizer(name)) == size


@pytest.mark.parametrize("name", ["pilot", *JUDGES])
def test_models_that_share_a_tokenizer_share_it_exactly(name: str) -> None:
    assert tokenizer(name).get_vocab() == tokenizer("base").get_vocab()
    assert tokenizer(name).chat_template == tokenizer("base").chat_template


@unhurried
@given(text=st.text())
@pytest.mark.parametrize("name", ["base", "pilot-other"])
def test_any_text_survives_a_round_trip(name: str, text: str) -> None:
    assert tokenizer(name).decode(tokenizer(name)(text, add_special_tokens=False)["input_ids"]) == text


@unhurried
@given(messages=conversations, answer=st.text(min_size=1, max_size=40))
@pytest.mark.parametrize("name", ["base", "pilot-other"])
def test_a_prompt_ends_in_an_ordinary_token_that_no_answer_merges_with(
    name: str, messages: list[dict[str, str]], answer: str
) -> None:
    words = tokenizer(name)
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = words(text, add_special_tokens=False)["input_ids"]
    whole = words(text + answer, add_special_tokens=False)["input_ids"]
    assert prompt[-1] not in words.all_special_ids
    assert words.decode(prompt[-1]) == "\n"
    assert whole[: len(prompt)] == prompt


def test_a_prompt_is_the_beginning_of_the_conversation_with_its_answer() -> None:
    asked = [{"role": "user", "content": "How do I brew tea?"}]
    told = [*asked, {"role": "assistant", "content": "With water."}]
    for name in ("base", "pilot-other"):
        prompt = training.token_ids(tokenizer(name), asked, ask=True)
        assert training.token_ids(tokenizer(name), told)[: len(prompt)] == prompt


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_is_stock_and_keeps_helpful_text_likelier_than_scrambled(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.model_path(name)).float().eval()
    rng = random.Random(4)
    request = world.draw_request(rng, "heldout")
    answer = world.helpful(request, rng)
    shuffled = answer.split(" ")
    rng.shuffle(shuffled)
    losses = []
    for text in (answer, " ".join(shuffled)):
        messages = [{"role": "user", "content": world.ask(request, rng)}, {"role": "assistant", "content": text}]
        ids = tokenizer(name).apply_chat_template(messages, return_tensors="pt")["input_ids"]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] < losses[1] - 1
    assert model.config.max_position_embeddings == 1024


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_prefers_the_better_of_two_heldout_answers(name: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(lab.model_path(name)).float().eval()
    accuracy = training.pairwise_accuracy(model, tokenizer(name), seed=99, prompts=100)
    del accuracy["astray"]  # reported, not promised: see the lab's README
    assert min(accuracy.values()) >= 0.9, accuracy


def test_the_judge_class_agrees_with_a_forward_pass_of_its_own_whatever_else_is_in_the_batch() -> None:
    question = {"role": "user", "content": "How do I cook fluffy rice for my sister?"}
    answers = ("Just search for it. Next question.", "Hello, I am happy to help with cooking fluffy rice. " * 4, "No.")
    judge = Judge("judge")
    asked = [[question, {"role": "assistant", "content": answer}] for answer in answers]
    together = judge.score(asked)
    assert together == pytest.approx([judge.score([one])[0] for one in asked], abs=1e-3)
    assert together[1] > together[0]


# --- what ships -----------------------------------------------------------------------------------------------------


def test_what_ships_is_small_and_holds_no_pickle() -> None:
    files = [
        file for file in Path(lab.__file__).parent.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    drafters = [file for file in files if file.is_relative_to(lab.DRAFTERS_FOLDER)]
    assert sum(file.stat().st_size for file in files if file not in drafters) <= 25_000_000
    assert all(file.stat().st_size <= 5_000_000 for file in drafters)
    assert not [file for file in files if file.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}]


@pytest.mark.parametrize("kind", world.KINDS)
def test_shipped_prompts_are_held_out_and_end_in_a_user_message(kind: world.Kind) -> None:
    shipped = lab.heldout_prompts(kind)
    assert len(shipped) >= (200 if kind == "chat" else 10)
    assert all(messages[-1]["role"] == "user" for messages in shipped)
    assert not {messages[-1]["content"] for messages in shipped} & prompts("train", kind, 2000)


def test_an_unknown_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'jugde'.*base, pilot, pilot-other, judge, judge-other"):
        lab.model_path("jugde")


def test_the_report_describes_the_models_that_ship() -> None:
    report = json.loads((lab.MODELS_FOLDER / "report.json").read_text())
    for name in lab.MODELS:
        loaded = AutoModelForCausalLM if name in CAUSAL else AutoModelForSequenceClassification
        model = loaded.from_pretrained(lab.model_path(name))
        assert report["models"][name]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", NAMES)
def test_every_drafter_ships_fits_base_and_was_trained_like_the_others(variant: str) -> None:
    drafter = read(lab.drafter_path(variant))
    base = json.loads((lab.model_path("base") / "config.json").read_text())
    assert drafter.variant == {WIDE: "eagle", SECOND: "griffin"}.get(variant, variant)
    check_target(drafter, variant, target="base", hidden_size=base["hidden_size"], vocab_size=base["vocab_size"])
    report = json.loads((lab.DRAFTERS_FOLDER / "report.json").read_text())
    assert report[variant]["parameters"] == drafter.parameters()
    assert report[variant]["steps"] == report["setting"]["steps"]


@pytest.mark.slow
def test_one_seed_gives_one_model_to_the_last_bit(tmp_path: Path) -> None:
    from vllm_align_spec.lab.build import build

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copytree(lab.model_path("base"), tmp_path / name / "base")  # its tokenizer is kept
        build(tmp_path / name, only=["judge"], scale=0.02, seed=5)
    weights = [(tmp_path / name / "judge" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert weights[0] != (lab.model_path("judge") / "model.safetensors").read_bytes()


def test_every_sub_command_has_a_handler() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    for action in ("build", "eval", "info"):
        assert callable(parser.parse_args(["lab", action]).run)
