"""One engine in a process of its own: reads a JSON command a line, answers a JSON line.

The runner is chosen by the environment before vLLM is imported, so two runners need two processes.
"""

import json
import os
import sys


def tries_of(worker):
    """Digest and number of the nodes of ASAp's tries of this rank."""
    from vllm_align_spec.engine.facade import _facades
    from vllm_align_spec.processors.asap import AsapProcessor

    (processor,) = (one for facade in _facades for one in facade.processors if isinstance(one, AsapProcessor))
    processor._settle()
    (news,) = processor._tries.news(0, {})
    header = json.loads(news[8 : 8 + int.from_bytes(news[:8], "little")])  # of a safetensors file
    return header["__metadata__"]["sha256"], processor._tries.nodes_used


def exchange_at(llm, step, news):
    """Gives news of tries to the workers before this step of the next batch; returns what they answer, later."""
    took, seen = llm.llm_engine.step, []

    def take():
        seen.append(None)
        if len(seen) == step:
            found.append(llm.collective_rpc("align_spec_call", args=("tries", [0], news)))
        return took()

    found = []
    llm.llm_engine.step = take
    return found


def main() -> None:
    config = json.loads(sys.argv[1])
    if config.pop("runner") == "v2":
        import v2_on_cpu  # noqa: F401
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout

    if config.pop("async_scheduling", False):
        # The CPU platform forces asynchronous scheduling off; a GPU has it on.
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config.__func__

        def check_and_stay_async(cls, vllm_config):
            check(cls, vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = classmethod(check_and_stay_async)

    import vllm.v1.engine.async_llm  # noqa: F401 - so that the front end's patch is in force
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    passes = []
    if config.pop("record_drafts", False):
        from vllm_align_spec.drafters.served import EagleFspadForCausalLM

        forward = EagleFspadForCausalLM.forward

        def forward_and_note(self, input_ids, positions, hidden_states, inputs_embeds=None):
            inputs = [x.clone() for x in (input_ids, positions, hidden_states)]
            outputs = forward(self, input_ids, positions, hidden_states, inputs_embeds)
            passes.append([*inputs, *(x.clone() for x in outputs)])
            return outputs

        EagleFspadForCausalLM.forward = forward_and_note

    broken = config.pop("broken_processor", False)
    llm = LLM(**config)
    if broken:
        from vllm_align_spec.processors.wsd import WsdProcessor

        healthy = WsdProcessor.apply

        def apply(self, rows):
            if (self._constants[rows.entry, 3] == 77).any():  # wsd_max_draft=77 asks for the failure
                raise RuntimeError("broken on purpose")
            return healthy(self, rows)

        WsdProcessor.apply = apply

        from vllm_align_spec.processors.asap import AsapProcessor

        drawn = AsapProcessor.apply

        def apply_asap(self, rows):
            if (self._attempt["seed"][rows.entry_np] == 77).any() and (rows.host().position >= 2).any():
                raise RuntimeError("broken on purpose")
            return drawn(self, rows)

        AsapProcessor.apply = apply_asap

    def params(spec):
        if "grammar" in spec:
            spec["structured_outputs"] = StructuredOutputsParams(**spec.pop("grammar"))
        return SamplingParams(detokenize=False, **spec)

    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "reports" in command:
            of_ranks = llm.collective_rpc("align_spec_call", args=("reports", command["reports"]))
            (answer,) = (one for one in of_ranks if one is not None)
        elif "exchange" in command:
            news = [bytes.fromhex(one) for one in command["exchange"]]
            if command["step"]:
                exchanged = exchange_at(llm, command["step"], news)
                answer = True
            else:
                exchanged = [llm.collective_rpc("align_spec_call", args=("tries", [0], news))]
                (((pieces, _), *others),) = exchanged
                assert others == [None] * (len(others))
                answer = [one.hex() for one in pieces]
        elif "tries" in command:
            answer = llm.collective_rpc(tries_of)
        elif "save_drafts" in command:
            from safetensors.torch import save_file

            names = ("input_ids", "positions", "hidden_states", "predict", "regress")
            save_file(
                {f"{i:04}.{n}": x.contiguous() for i, xs in enumerate(passes) for n, x in zip(names, xs, strict=True)},
                command["save_drafts"],
            )
            passes.clear()
            answer = len(passes)
        elif "patches" in command:
            from vllm_align_spec.patches import STATE

            answer = STATE
        else:
            try:
                outputs = llm.generate(
                    [{"prompt_token_ids": p} for p in command["prompts"]],
                    [params(s) for s in command["params"]],
                    use_tqdm=False,
                )
                answer = [
                    {
                        "tokens": list(o.outputs[0].token_ids),
                        "accepted": list(getattr(o.outputs[0].spec_decode_metrics, "histogram", None) or []),
                        "choices": [list(choice.token_ids) for choice in o.outputs],
                        "finish": o.outputs[0].finish_reason,
                        "stop": o.outputs[0].stop_reason,
                        "logprobs": [
                            {str(k): v.logprob for k, v in position.items()} for position in o.outputs[0].logprobs or []
                        ],
                    }
                    for o in outputs
                ]
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
