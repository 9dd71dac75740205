"""Serves adapters by vLLM on a CPU: `python served_worker.py BASE OUT ADAPTER...`.

Writes what the engine answers to OUT, as JSON: by the base alone under "", and for each adapter its
answer, or the text of the error by which the engine refuses it. SERVED_OPTIONS has options of the
engine, and whether it only loads adapters. `test_served.py` runs it.
"""

import contextlib
import json
import os
import pathlib
import sys
from typing import Any

PROMPT, STEPS = [1, 5, 9, 33, 70], 8
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
Answer = dict[str, list[float]]


def start(base: str, **options: Any) -> Any:
    """The engine."""
    from vllm import LLM

    return LLM(
        model=base,
        skip_tokenizer_init=True,
        max_lora_rank=16,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=2,
        enforce_eager=True,
        seed=0,
        **{"enable_lora": True} | options,
    )


def leave_out_kernels() -> None:
    """Lets the engine load adapters of experts, which it has no kernels to run on a CPU."""
    from torch import device, nn
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    def init(self: Any, layer: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.moe_config = layer, layer.moe_config
        self._shared_experts = layer._shared_experts
        parallel = layer.moe_config.moe_parallel_config
        self.tp_size, self.tp_rank, self.device = parallel.tp_size, parallel.tp_rank, device("cpu")
        self._w13_slices = 2 if layer.moe_config.is_act_and_mul else 1
        self.enable_moe_shared_loras = False
        self.n_slices = self.local_num_experts * (self._w13_slices + 1)

    FusedMoEWithLoRA.__init__ = init
    FusedMoEWithLoRA.set_mapping = BaseLayerWithLoRA.set_mapping


def read_experts(model: Any) -> Answer:
    """B·A of each expert of the first layer, as the engine has loaded them: gate, up, down."""
    import torch

    layers = model.lora_manager.modules
    x = next(layer for name, layer in layers.items() if name.endswith(".experts"))
    a = [*x.w13_lora_a_stacked, *x.w2_lora_a_stacked]
    b = [*x.w13_lora_b_stacked, *x.w2_lora_b_stacked]
    each = [torch.einsum("eri,eor->eoi", one[0], two[0]) for one, two in zip(a, b, strict=True)]
    if len(each) == 3:
        each = [torch.cat(each[:2], 1), each[2]]
    return {"experts": [float(v) for x in each for v in x.flatten()]}


def answer(engine: Any, request: Any, kind: str) -> Answer:
    """Greedy tokens with their log-probabilities, the logits of classes, or what was loaded."""
    from vllm import PoolingParams, SamplingParams

    prompts = [{"prompt_token_ids": PROMPT}]
    if kind == "experts":
        return engine.apply_model(read_experts)[0]
    if "Classification" in kind:
        options = PoolingParams(use_activation=False)
        [found] = engine.classify(
            prompts, pooling_params=options, use_tqdm=False, lora_request=request
        )
        return {"logits": list(found.outputs.probs)}
    steps = {"max_tokens": STEPS, "ignore_eos": True}
    options = SamplingParams(temperature=0, **steps, detokenize=False, logprobs=1)
    [found] = engine.generate(prompts, options, use_tqdm=False, lora_request=request)
    tokens, each = list(found.outputs[0].token_ids), found.outputs[0].logprobs
    logs = [x[token].logprob for token, x in zip(tokens, each, strict=True)]
    return {"tokens": tokens, "logs": logs}


def main(base: str, out: str, *adapters: str) -> None:
    """Serves one after the other."""
    from vllm.lora.request import LoRARequest

    kind = (pathlib.Path(base) / "config.json").read_text()
    options = json.loads(os.environ["SERVED_OPTIONS"])
    if options.pop("loads"):
        kind = "experts"
        leave_out_kernels()
    elif "Classification" in kind:
        options["runner"] = "pooling"
    answers: dict[str, Answer | str] = {}
    try:
        engine = start(base, **options)
        answers[""] = answer(engine, None, kind)
    except Exception as error:  # a model that takes no adapters
        text = f"{type(error).__name__}: {error}"
        answers = {pathlib.Path(path).name: text for path in adapters}
        adapters = ()
    for i, path in enumerate(adapters, 1):
        name = pathlib.Path(path).name
        is_3d = options.get("enable_mixed_moe_lora_format", False)
        request = LoRARequest(name, i, path, is_3d_lora_weight=is_3d)
        try:
            engine.llm_engine.add_lora(request)  # as the server does at its start
            answers[name] = answer(engine, request, kind)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # one that was refused is not there
            engine.llm_engine.remove_lora(i)
    pathlib.Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
