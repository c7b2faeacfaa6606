"""Training: data, masks, losses, and steps that are the same however they are cut up or interrupted."""

import contextlib
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_align_spec import cli, lab
from vllm_align_spec.drafters.config import read as read_drafter
from vllm_align_spec.train import acceptance, data, features, losses
from vllm_align_spec.train.answers import prompt as asking
from vllm_align_spec.train.config import TrainConfig
from vllm_align_spec.train.loop import DivergedError, _Run, train
from vllm_align_spec.train.target import Target

unhurried = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(lab.model_path("base"))


# Data ------------------------------------------------------------------------------------------------------------


def test_both_layouts_are_the_same_conversation():
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 7}
    assert data.messages_of(json.dumps(openai)) == data.messages_of(json.dumps(sharegpt)) == openai["messages"]


BAD = [
    "{",
    "[]",
    '{"text": "x"}',
    '{"messages": [{"role": "user", "content": "nobody answers"}]}',
    '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "x"}]}',
    '{"messages": [{"role": "assistant", "content": 5}]}',
    '{"messages": "no list"}',
    '{"conversations": [{"from": "gpt"}]}',
    '{"messages": null}',
    '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
]


def test_bad_lines_are_counted_and_named_and_do_no_harm(tmp_path):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join([good, *BAD, "", good]) + "\n")
    complaints = data.Complaints()
    assert len(list(data.read([file], complaints))) == 2
    assert complaints.count == len(BAD)
    assert complaints.first[0].startswith(f"{file}:2: no JSON")


@unhurried
@given(
    line=st.text(max_size=60)
    | st.recursive(
        st.none() | st.text(max_size=5),
        lambda x: (
            st.lists(x)
            | st.dictionaries(st.sampled_from(["messages", "role", "content", "conversations", "from", "value"]), x)
        ),
    ).map(json.dumps)
)
def test_whatever_stands_in_a_line_is_a_conversation_or_a_complaint(line):
    with contextlib.suppress(data.BadLineError):
        found = data.messages_of(line)
        assert any(m["role"] == "assistant" for m in found)
        json.dumps(found, ensure_ascii=False).encode()


words = st.text(st.sampled_from("ab c\n<|>é"), min_size=1, max_size=20)


@unhurried
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_the_mask_is_what_the_assistant_said_and_its_end(turns):
    words = AutoTokenizer.from_pretrained(lab.model_path("base"))
    messages = [
        m for ask, say in turns for m in ({"role": "user", "content": ask}, {"role": "assistant", "content": say})
    ]
    example = data.encode(messages, words, 4096)
    said = "".join(f"{say}{words.eos_token}" for _, say in turns)
    assert words.decode(example.ids[example.spoken], skip_special_tokens=False) == said
    whole = words.apply_chat_template(messages, return_dict=False)
    assert example.ids.tolist() == whole


def test_a_conversation_that_is_cut_before_anybody_answers_is_left_out(tokenizer):
    messages = [{"role": "user", "content": "long " * 50}, {"role": "assistant", "content": "b"}]
    with pytest.raises(data.BadLineError, match="nothing of the assistant"):
        data.encode(messages, tokenizer, 20)


def test_what_cannot_be_answered_is_a_bad_line_and_not_the_end(tokenizer):
    user = [{"role": "user", "content": "a b c"}]
    ids = asking(user, tokenizer, 100)
    assert ids == tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert asking(user, tokenizer, len(ids) + 1) == ids
    with pytest.raises(data.BadLineError, match=f"{len(ids)} tokens, and the target's context {len(ids)}"):
        asking(user, tokenizer, len(ids))
    with pytest.raises(data.BadLineError, match="begins with an answer"):
        asking([], tokenizer, 100)
    with pytest.raises(data.BadLineError, match="template refuses"):
        asking([{"role": "user"}], tokenizer, 100)


@pytest.mark.slow
def test_the_target_answers_what_can_be_answered(tmp_path):
    def chat(*turns):
        roles = ("user", "assistant")
        return json.dumps({"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]})

    lines = [
        chat("Say something.", "x", "And more?", "y", "Nobody answers this."),
        json.dumps({"conversations": [{"from": "gpt", "value": "I begin."}, {"from": "human", "value": "?"}]}),
        chat("word " * 3000, "x"),
        chat("Say something.", "x", "word " * 3000, "y"),
        "{",
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "vllm_align_spec.cli", "train", "answers", "--target", str(lab.model_path("base"))]
    command += ["--data", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "new" / "o.jsonl")]
    done = subprocess.run([*command, "--max-tokens", "200"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 conversations, 3 lines left out" in done.stdout
    for told in ("begins with an answer", "tokens, and the target's context 1024", "no JSON"):
        assert told in done.stderr
    written = [json.loads(line)["messages"] for line in (tmp_path / "new" / "o.jsonl").read_text().splitlines()]
    roles = sorted([message["role"] for message in messages] for messages in written)
    assert roles == [["user", "assistant"], ["user", "assistant"] * 2]
    assert all(message["content"] not in "xy" for messages in written for message in messages)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["o.jsonl"]


def test_the_last_row_has_no_next_token_and_padding_no_row(tokenizer):
    pairs = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": t}] for t in ("b", "b c d e")]
    examples = [data.encode(p, tokenizer, 99) for p in pairs]
    batch = data.collate(examples, range(2))
    for b, example in enumerate(examples):
        length = len(example.ids)
        assert batch.mask[b, : length - 1].tolist() == example.spoken[:-1].tolist()
        assert not batch.mask[b, length - 1 :].any()
        assert batch.length[b] == length


@unhurried
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 5),
    world=st.integers(1, 3),
    pool=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_an_epoch_uses_a_conversation_at_most_once_and_begins_anew_each_time(count, size, world, pool, epoch):
    lengths = [(7 * i) % 13 + 1 for i in range(count)]
    options = {"batch_size": size, "world": world, "pool": pool, "seed": 1}
    batches = data.order(lengths, epoch=epoch, **options)
    flat = [i for batch in batches for i in batch]
    assert len(flat) == len(set(flat)) == size * world * (count // (size * world))
    assert batches == data.order(lengths, epoch=epoch, **options)


def test_what_is_held_out_does_not_depend_on_the_rest():
    chats = [[{"role": "assistant", "content": str(i)}] for i in range(2000)]
    held = [data.is_held_out(chat, 0.05) for chat in chats]
    assert held == [data.is_held_out(chat, 0.05) for chat in reversed(chats)][::-1]
    assert 60 < sum(held) < 140


# Losses ----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_papers():
    """Written out anew, with loops, for one batch."""
    torch.manual_seed(0)
    p, r, f = (torch.randn(2, 5, 8, dtype=torch.float64) * 2 for _ in range(3))
    w = torch.randn(30, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    regress = predict = best = 0.0
    for b, t in mask.nonzero().tolist():
        distance = (r[b, t] - f[b, t]).abs()
        regress += float(torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean())
        target = (w @ f[b, t]).softmax(0)
        draft = (w @ p[b, t]).softmax(0)
        predict -= sum(float(a) * math.log(float(c)) for a, c in zip(target, draft, strict=True))
        top = sorted(range(30), key=lambda x: -float(target[x]))[:10]
        best -= sum(float(target[x]) * math.log(float(draft[x])) for x in top)
    found = losses.terms(p, r, f, mask, lambda x: x @ w.T, top_k=True)
    assert [float(x) for x in (found.regress, found.predict, found.top_k)] == pytest.approx(
        [regress, predict, best], rel=1e-4
    )
    total = found.loss(losses.Weights(1.0, 0.1, 0.5), 4)
    assert float(total) == pytest.approx((regress + 0.1 * predict + 0.5 * best) / (4 + 1e-5), rel=1e-4)


def test_a_later_pass_keeps_the_chains_that_could_have_come_there():
    #      chain from row 0 misses, from row 2 hits; row 4 is not the assistant's
    first = torch.tensor([[1, 1, 1, 1, 0, 1]]).bool()
    hit = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    second = losses.next_mask(first, hit, first)
    assert second.tolist() == [[False, False, True, True, False, False]]
    third = losses.next_mask(second, hit, first)
    assert third.tolist() == [[False, False, False, True, False, False]]
    assert losses.next_mask(first, None, first).tolist() == [[False, True, True, True, False, False]]


def test_hits_compare_with_the_token_after_the_fed_one():
    ids = torch.tensor([[3, 1, 2, 0]])
    p = torch.nn.functional.one_hot(torch.tensor([[2, 2, 0, 0]]), 4).float()
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    assert losses.hits(p, ids, everywhere, lambda x: x, 1).tolist() == [[True, False, False, False]]
    assert losses.hits(p, ids, ~everywhere, lambda x: x, 1).tolist() == [[False] * 4]


# Acceptance ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A target of two layers and a little data."""
    folder = tmp_path_factory.mktemp("target")
    words = AutoTokenizer.from_pretrained(lab.model_path("base"))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{i} is {i * i}, and {i}"},
            ]
        }
        for i in range(80)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno JSON\n")
    return folder


def config(trained, out, **changes):
    return TrainConfig(
        **{
            "target": str(trained), "data": (trained / "data.jsonl",), "out": out, "batch_size": 4, "max_steps": 6,
            "learning_rate": 1e-3, "warmup_steps": 2, "schedule_steps": 10, "precision": "float32", "device": "cpu",
            "evaluate_every": 3, "checkpoint_every": 3, "evaluate_prompts": 2, "evaluate_tokens": 6, "log_every": 1,
            "held_out": 0.1, "target_dtype": "float32", **changes,
        }
    )  # fmt: skip


def test_offline_acceptance_is_what_drafting_step_by_step_accepts(trained, tmp_path):
    """Against a loop that drafts chains token by token, as an engine does. What the target says next is made a function
    of the latest token alone, and what the drafter says that function, somewhat blurred: some drafts are right."""
    run = _Run(config(trained, tmp_path / "o", evaluate_tokens=12, evaluate_prompts=6), console=_silent())
    drafter, target, drafts = run.drafter.eval(), run.target, 3
    for name, parameter in (*drafter.named_parameters(), *target.model.named_parameters()):
        if "down_proj" in name or "o_proj" in name:
            parameter.data.zero_()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        blur = torch.randn(32, 32, generator=generator) * 0.03
        drafter.fc.fc.weight.copy_(torch.cat([torch.eye(32) + blur, torch.zeros(32, 32)], 1))
        drafter.fc.fc.bias.zero_()
    told = run._continuations()
    found = acceptance.measure(drafter, target, told, drafts)

    steps, produced = [], 0
    for sequence, prompt in zip(told.sequences, told.prompt_lengths, strict=True):
        ids = torch.tensor([sequence])
        f = target.features(ids)
        at = prompt - 1  # the row of the last token whose feature is known; the next token is known too
        produced += len(sequence) - prompt - 1
        while at + 2 < len(sequence):
            e_rows, f_rows = target.embedding(ids[:, 1 : at + 2]), f[:, : at + 1]
            accepted = 0
            for _ in range(drafts):
                with torch.no_grad():
                    p, r = drafter(e_rows, f_rows)
                draft = int(target.logits(p[0, -1:]).argmax())
                place = at + 2 + accepted
                if place >= len(sequence) or draft != sequence[place]:
                    break
                accepted += 1
                e_rows = torch.cat([e_rows, target.embedding(torch.tensor([[draft]]))], 1)
                f_rows = torch.cat([f_rows, r[:, -1:]], 1)
            steps.append(accepted)
            at += accepted + 1
    assert 0 < sum(steps) < drafts * len(steps)
    assert found.forwards == len(steps)
    assert found.tokens == produced
    assert found.accepted == pytest.approx([sum(n > j for n in steps) / len(steps) for j in range(drafts)])


def test_a_walk_jumps_over_what_was_accepted():
    assert acceptance.walk([2, 9, 9, 0, 1, 9, 0, 0, 0], 0, 9) == [2, 0, 1, 0]
    hit = torch.tensor([[[1, 0, 1, 1]], [[0, 1, 1, 1]], [[1, 1, 0, 1]]]).bool()
    assert acceptance.runs(hit).tolist() == [[2, 0, 2, 1]]


# Steps -----------------------------------------------------------------------------------------------------------


def _silent():
    from rich.console import Console

    return Console(quiet=True)


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def assert_same(one, two, atol=0.0):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=atol, rtol=0)


CACHED = {"feature_cache": True, "max_steps": 24, "schedule_steps": 30}  # into the second epoch


@pytest.mark.parametrize("changes", [{}, {"variant": "griffin", "passes": 3, "accumulation": 2}, CACHED])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(trained, tmp_path, changes):
    def run(name, **more):
        cache = {"feature_cache": tmp_path / f"features of {name}"} if "feature_cache" in changes else {}
        return train(config(trained, tmp_path / name, **{**changes, **cache, **more}), console=_silent())

    whole = run("whole")
    run("cut", max_steps=3)
    resumed = run("cut", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert whole.state == resumed.state


def logged(folder, key):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [record[key] for record in records if key in record]


def test_features_that_are_read_are_those_that_were_computed(trained, tmp_path):
    long = {"max_steps": 30, "schedule_steps": 30, "evaluate_every": 30}  # 18 steps an epoch
    train(config(trained, tmp_path / "computed", **long), console=_silent())
    shared = {**long, "feature_cache": tmp_path / "features"}
    train(config(trained, tmp_path / "read", **shared), console=_silent())
    # Computed in other company, a row's last bits may differ.
    assert_same(weights(tmp_path / "computed"), weights(tmp_path / "read"), atol=1e-5)
    found = logged(tmp_path / "read", "features_read")
    epoch = found.count(0)
    assert epoch > 12
    assert found[:epoch] == [0] * epoch
    # An epoch's last, incomplete batch was left out: these come later for the first time.
    assert 4 * (30 - epoch) - 4 < sum(found) <= 4 * (30 - epoch)
    train(config(trained, tmp_path / "again", variant="griffin", **shared), console=_silent())
    assert set(logged(tmp_path / "again", "features_read")) == {4}


def test_features_take_no_more_disk_than_they_may(trained, tmp_path):
    folder = tmp_path / "features"
    options = {"feature_cache": folder, "feature_cache_gb": 20e-6, "max_steps": 30, "evaluate_every": 30}
    train(config(trained, tmp_path / "run", **options), console=_silent())
    assert 10_000 < sum(shard.stat().st_size for shard in folder.glob("*.safetensors")) < 24_000  # headers on top
    assert 0 < sum(logged(tmp_path / "run", "features_read")) < 4 * 12


def test_a_full_disk_ends_caching_and_not_training(trained, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    result = train(config(trained, tmp_path / "run", feature_cache=tmp_path / "features"), console=_silent())
    assert result.state.step == 6
    assert "No more features are cached: No space left on device" in caplog.text
    assert not list((tmp_path / "features").glob("*.safetensors"))


def test_features_leave_checkpoints_the_room_they_need(trained, tmp_path, monkeypatch, caplog):
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    train(config(trained, tmp_path / "run", feature_cache=tmp_path / "features"), console=_silent())
    assert "No more features are cached: 100,000 bytes are free" in caplog.text
    assert not list((tmp_path / "features").glob("*.safetensors"))


def test_a_target_that_differs_in_one_layer_has_features_of_its_own(trained):
    model = LlamaForCausalLM.from_pretrained(trained)
    before = features.identity(model, "float32", [])
    assert features.identity(model, "float32", []) == before
    model.model.layers[0].self_attn.q_proj.weight.data += 1e-3
    assert features.identity(model, "float32", [])["target"] != before["target"]


def test_features_of_something_else_are_refused_by_name(trained, tmp_path):
    options = {"feature_cache": tmp_path / "features", "max_steps": 1}
    train(config(trained, tmp_path / "one", **options), console=_silent())
    with pytest.raises(ValueError, match=r"features of another run \(conversations differ\)"):
        train(config(trained, tmp_path / "two", max_length=24, **options), console=_silent())


def test_a_run_that_was_begun_otherwise_is_not_resumed(trained, tmp_path):
    train(config(trained, tmp_path, max_steps=3), console=_silent())
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is 0\.002"):
        train(config(trained, tmp_path, resume=True, learning_rate=2e-3), console=_silent())
    with pytest.raises(ValueError, match="--resume"):
        train(config(trained, tmp_path), console=_silent())


def test_a_run_is_resumed_with_its_own_data_and_workers(trained, tmp_path):
    files = tmp_path / "data.jsonl", tmp_path / "out"
    lines = (trained / "data.jsonl").read_text().splitlines(keepends=True)
    files[0].write_text("".join(lines))
    options = config(trained, files[1], max_steps=3, data=(files[0],))
    train(options, console=_silent())
    files[0].write_text("".join(lines + lines[:20]))
    again = options.model_copy(update={"resume": True})
    with pytest.raises(ValueError, match="do not have the conversations"):
        train(again, console=_silent())
    files[0].write_text("".join(lines))
    state = files[1] / "last" / "state.json"
    told = json.loads(state.read_text())
    state.write_text(json.dumps({**told, "workers": 2}))
    with pytest.raises(ValueError, match="2 workers began the run"):
        train(again, console=_silent())


def test_training_goes_on_from_a_published_checkpoint(trained, tmp_path):
    options = {"variant": "griffin", "max_steps": 1}
    train(config(trained, tmp_path / "one", **options), console=_silent())
    file = tmp_path / "one" / "model.safetensors"
    sizes = read_drafter(tmp_path / "one")
    extra = {
        "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(sizes.head_dim // 2),
        "embed_tokens.weight": torch.zeros(sizes.vocab_size, sizes.hidden_size),
    }
    save_file({**load_file(file), **extra}, file)
    train(config(trained, tmp_path / "two", start_from=tmp_path / "one", **options), console=_silent())
    assert weights(tmp_path / "two").keys() == sizes.tensors().keys()


def test_what_was_logged_after_the_checkpoint_is_logged_once(trained, tmp_path):
    train(config(trained, tmp_path, max_steps=3), console=_silent())
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # and then the machine stopped
    train(config(trained, tmp_path, resume=True), console=_silent())
    assert len(logged(tmp_path, "loss")) == 6


def test_an_answer_ends_where_an_engine_would_end_it(trained):
    """Also at the ids of the generation config, of which the tokenizer knows but one."""
    target = Target(str(trained), "float32", torch.device("cpu"))
    prompt = target.tokenizer("one two")["input_ids"]
    (whole,) = target.greedy([prompt], 12)
    assert len(whole) == len(prompt) + 12
    end = whole[len(prompt) + 3]
    target.model.generation_config.eos_token_id = [end, target.tokenizer.eos_token_id]
    (ended,) = target.greedy([prompt], 12)
    assert ended == whole[: whole.index(end, len(prompt)) + 1]


def test_accumulated_batches_are_one_batch(trained, tmp_path):
    """Each share divides by the mask of all: shares of different length, noise off since it is drawn per share."""
    options = {"max_steps": 2, "noise": 0.0, "passes": 2, "variant": "griffin"}
    train(config(trained, tmp_path / "one", batch_size=8, **options), console=_silent())
    train(config(trained, tmp_path / "two", batch_size=4, accumulation=2, **options), console=_silent())
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", "ray"])
def test_two_workers_are_one(trained, tmp_path, engine):
    options = {"max_steps": 2, "noise": 0.0}
    train(config(trained, tmp_path / "one", batch_size=8, **options), console=_silent())
    given = json.loads(config(trained, tmp_path / "two", batch_size=4, **options).model_dump_json(exclude_none=True))
    flags = [
        x
        for k, v in given.items()
        if v is not False
        for x in ([f"--{k.replace('_', '-')}", *(map(str, v) if isinstance(v, list) else [str(v)])])
    ]
    if engine == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561"]
    else:
        command = [sys.executable]
        flags += ["--ray-workers", "2"]
    done = subprocess.run(
        [*command, "-m", "vllm_align_spec.cli", "train", "fspad", *flags], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if engine == "ray":
        assert "2 steps in 2 workers" in done.stdout
        flags[flags.index("--learning-rate") + 1] = "1e9"
        flags[flags.index("--out") + 1] = str(tmp_path / "three")
        flags[flags.index("--max-steps") + 1] = "100"
        again = subprocess.run(
            [*command, "-m", "vllm_align_spec.cli", "train", "fspad", *flags, "--epochs", "99"],
            capture_output=True,
            text=True,
        )
        assert again.returncode == 1
        assert "vllm-align-spec: " in again.stderr
        assert "loss" in again.stderr.splitlines()[-1]
    losses = {
        name: [
            record["loss"]
            for record in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            if "loss" in record
        ]
        for name in ("one", "two")
    }
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=2e-5)


def test_training_lowers_the_loss_and_leaves_what_vllm_serves(trained, tmp_path):
    result = train(config(trained, tmp_path, max_steps=40, epochs=9, schedule_steps=60), console=_silent())
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    loss = [r["loss"] for r in records if "loss" in r]
    assert sum(loss[-5:]) < 0.96 * sum(loss[:5])  # most of it is the entropy of an untrained target
    assert [r["step"] for r in records if "tokens_per_forward" in r] == [*range(3, 41, 3), 40]
    assert read_drafter(tmp_path).variant == "fspad"
    assert json.loads((tmp_path / "training.json").read_text())["learning_rate"] == 1e-3
    assert result.complaints.count == 1
    assert result.state.step == 40
    assert (tmp_path / "curves.png").exists()


def test_the_log_is_what_tensorboard_shows(trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(trained, tmp_path, max_steps=3), console=_silent())
    train(config(trained, tmp_path, max_steps=6, resume=True), console=_silent())
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in shown.Scalars("loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in losses] == pytest.approx(logged(tmp_path, "loss"))
    assert [event.value for event in shown.Scalars("accepted/1")] == pytest.approx(
        [shares[0] for shares in logged(tmp_path, "accepted")]
    )


def test_a_later_stage_goes_on_from_an_earlier_one(trained, tmp_path):
    train(config(trained, tmp_path / "first", max_steps=3, variant="griffin"), console=_silent())
    options = {"start_from": tmp_path / "first", "max_steps": 1, "passes": 2}
    train(config(trained, tmp_path / "second", variant="griffin", **options), console=_silent())
    one, two = load_file(tmp_path / "first/model.safetensors"), weights(tmp_path / "second")
    assert all((one[name] - two[name]).abs().max() < 5e-3 for name in one)
    with pytest.raises(ValueError, match="griffin drafter"):
        train(config(trained, tmp_path / "third", variant="fspad", **options), console=_silent())


def test_a_run_that_diverges_stops_and_names_its_checkpoint(trained, tmp_path):
    wild = config(trained, tmp_path, learning_rate=30.0, warmup_steps=0, max_steps=60, epochs=9, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"step \d+: the (smoothed )?loss .* the last good checkpoint is"):
        train(wild, console=_silent())


def test_the_schedule_rises_and_falls_linearly(trained, tmp_path):
    c = config(trained, tmp_path, learning_rate=1.0, warmup_steps=4, schedule_steps=12)
    assert [round(c.rate(s), 4) for s in (0, 1, 3, 4, 8, 12, 20)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    published = TrainConfig(target="t", data=(trained,), out=tmp_path)
    assert (published.learning_rate, published.beta1, published.beta2, published.clip) == (5e-5, 0.9, 0.95, 0.5)
    assert (published.warmup_steps, published.schedule_steps, published.noise) == (2000, 800_000, 0.2)
    assert (published.regress_weight, published.predict_weight, published.top_k_share) == (1.0, 0.1, 0.0)
    assert TrainConfig(target="t", data=(trained,), out=tmp_path, passes=2).top_k_share == 0.5


def test_noise_has_the_published_width(trained, tmp_path):
    run = _Run(config(trained, tmp_path), console=_silent())
    batch = data.collate(run.data.train[:4], range(4))
    micro = run._micro(batch, 0)
    for b, length in enumerate(batch.length.tolist()):
        noise = (micro.noisy - micro.features)[b].flatten()
        width = 0.2 * 512 / length
        assert noise.abs().max() <= width / 2 + 1e-4
        assert float(noise.std()) == pytest.approx(width / 12**0.5, rel=0.1)


def test_the_command_line_names_what_it_does_not_accept(capsys, trained, tmp_path):
    assert cli.main(["train", "fspad", "--target", "t", "--data", "d", "--out", "o", "--variant", "medusa"]) == 2
    assert "--variant 'medusa' is not accepted" in capsys.readouterr().err
    arguments = ["train", "fspad", "--target", str(trained), "--data", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "none" in capsys.readouterr().err
