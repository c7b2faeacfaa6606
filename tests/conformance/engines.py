"""Engines, one a configuration, and references computed by transformers."""

import hashlib
import json
import os
import subprocess
import sys
import uuid
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from vllm_align_spec import lab
from vllm_align_spec.strategies.guided import digests

DRAFTS = 5
COMPANIONS = {
    "judge": {"model": str(lab.model_path("judge")), "role": "reward"},
    "judge-other": {"model": str(lab.model_path("judge-other")), "role": "reward"},
    "pilot": {"model": str(lab.model_path("pilot")), "role": "lm"},
}
HERE = Path(__file__).parent


class Engine:
    """A client of `engine_process`."""

    def __init__(self, runner, env=None, end_id=2, control_ids=(6, 7, 8), **config):
        self.runner = runner
        self.end_id, self.control_ids = end_id, control_ids
        settings = {
            "runner": runner,
            "model": str(lab.model_path("base")),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "block_size": 32,
            "gpu_memory_utilization": 0.1,
            "speculative_config": {
                "method": "draft_model",
                "model": str(lab.model_path("pilot")),
                "num_speculative_tokens": DRAFTS,
            },
            # They have the tokens of the lab's base model.
            "additional_config": {} if "model" in config else {"align_spec": {"companions": COMPANIONS}},
            **config,
        }
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            **(env or {}),
        }
        self._log = open(f"/tmp/align_spec_engine_{os.getpid()}_{uuid.uuid4().hex[:6]}.log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_process.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=HERE,
        )
        self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError("the engine died:\n" + self._log.read()[-6000:])
        return json.loads(line)

    def _ask(self, **command):
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def passes(self, file):
        """The drafter's passes since the last call, if the engine records them: one dict of tensors a pass."""
        self._ask(save_drafts=str(file))
        found = {}
        for name, tensor in load_file(file).items():
            number, _, name = name.partition(".")
            found.setdefault(int(number), {})[name] = tensor
        return [found[number] for number in sorted(found)]

    def patches(self):
        return self._ask(patches=True)

    def exchange(self, news=(), step=0):
        """Gives the workers news of ASAp's tries, now or before this step of the next batch; their own, if now."""
        return self._ask(exchange=list(news), step=step)

    def tries(self):
        """Of each rank, a digest and the number of the nodes of ASAp's tries."""
        return [tuple(one) for one in self._ask(tries=True)]

    def generate(self, requests):
        """Runs requests in one batch. Those of a method are prepared as admission and strategy prepare them."""
        return self.collect(self.start(requests), requests)

    def start(self, requests):
        prompts, params = [], []
        for request in requests:
            spec = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **request.get("params", {})}
            prompt = request["prompt"]
            if "wsd" in request:
                request["id"] = uuid.uuid4().hex
                spec["max_tokens"] += 1
                spec["extra_args"] = {
                    "wsd": "shared",
                    "wsd_gamma": 0.8,
                    "wsd_window": 6,
                    "wsd_max_draft": 512,
                    **request["wsd"],
                    "align_spec_id": request["id"],
                    "align_spec_first_token": prompt[-1],
                    "align_spec_stop_ids": [stop_id()],
                }
                prompt = prompt[:-1]
            if "asap" in request:
                request["id"] = uuid.uuid4().hex
                spec["ignore_eos"] = False
                spec["stop_token_ids"] = list(self.control_ids)
                spec["extra_args"] = {
                    "align_spec_trie": hashlib.sha256(str(request.get("trie", "one")).encode()).hexdigest(),
                    "align_spec_seed": request["seed"],
                    "align_spec_length": spec["max_tokens"],
                    "align_spec_min_tokens": 0,
                    "align_spec_temperature": spec["temperature"],
                    "align_spec_stop_ids": [self.end_id],
                    "align_spec_control_ids": list(self.control_ids),
                    "align_spec_id": request["id"],
                    "asap": request["asap"],
                    **request.get("arguments", {}),
                }
                if request["seed"] % 2:  # the front end sends it so on a CPU, and with its temperature on a GPU
                    spec["temperature"] = 0.0
            if "guided" in request:
                request["id"] = uuid.uuid4().hex
                method, companions, arguments = request["guided"]
                own = request.get("own_prompt")
                spec["extra_args"] = {
                    method: "on",
                    "align_spec_companions": {
                        name: {"prefix": digests(own or prompt, ""), **({"prompt": own} if own else {})}
                        for name in companions
                    },
                    "align_spec_id": request["id"],
                    **arguments,
                }
            if "cards" in request:
                request["id"] = uuid.uuid4().hex
                spec["stop_token_ids"] = list(request["control_ids"])
                spec["extra_args"] = {
                    "cards": "on",
                    "cards_entropy": request["cards"],
                    "align_spec_control_ids": list(request["control_ids"]),
                    "align_spec_id": request["id"],
                }
            prompts.append(prompt)
            params.append(spec)
        return self._ask(prompts=prompts, params=params)

    def collect(self, outputs, requests):
        assert isinstance(outputs, list), outputs
        ids = [r["id"] for r in requests if "id" in r]
        reports = self._ask(reports=ids) if ids else {}
        for request, output in zip(requests, outputs, strict=True):
            if not {"asap", "guided", "cards"}.isdisjoint(request):
                output["report"] = reports[request["id"]]
            if "wsd" in request:
                assert output["tokens"][0] == request["prompt"][-1], "the held-back prompt token comes first"
                output["tokens"] = output["tokens"][1:]
                output["logprobs"] = output["logprobs"][1:]
                output["report"] = reports[request["id"]]
        return outputs

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()
        os.unlink(self._log.name)


@cache
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(lab.model_path("base"))


@cache
def stop_id():
    return tokenizer().eos_token_id


@cache
def reference(name):
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(lab.model_path(name), dtype=torch.float32).eval()


@cache
def judge(name):
    torch.set_num_threads(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(lab.model_path(name), dtype=torch.float32)
    return model.eval()


@cache
def prompts():
    return [
        tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in lab.heldout_prompts("chat")
    ]


@torch.no_grad()
def log_probabilities(name, prompt, tokens):
    """[len(tokens), V] untempered log-probabilities of an independent forward pass, one row a token."""
    logits = reference(name)(torch.tensor([prompt + tokens])).logits[0].float()
    return logits[len(prompt) - 1 : len(prompt) + len(tokens) - 1].log_softmax(-1)
