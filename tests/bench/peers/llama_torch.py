"""PEFT on the Llama of transformers, or torch's floor: one step, timed, as a line of JSON.

    python -m tests.bench.peers.llama_torch lora|floor [again] [quick]

`again` computes each layer again in the backward pass. The factors are in bfloat16: with PEFT's
default, float32, the small products would be too.
"""

import json
import sys
import time

import peft
import torch
import transformers

from . import llama_work


def main(trained: str, *options: str) -> None:
    """Prints the seconds of the steps."""
    work = llama_work.QUICK if "quick" in options else llama_work.LLAMA
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make(work, trained, device)
    if "again" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(work.vocab, (work.batch, work.length), device=device)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds = [step() for _ in range(work.warm_up + work.steps)]
    found = {"seconds": seconds[work.warm_up :], "trained": sum(p.numel() for p in parameters)}
    if device == "cuda":
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
    modules = (torch, peft, transformers)
    found["versions"] = ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
    print(json.dumps(found))


def make(work: llama_work.Work, trained: str, device: str) -> torch.nn.Module:
    """The model with random weights in bfloat16, of which only what is trained has gradients."""
    config = transformers.LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.dim,
        intermediate_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.groups,
        max_position_embeddings=work.length,
        rope_theta=llama_work.ROPE,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if trained == "floor":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rules = peft.LoraConfig(r=llama_work.RANK, lora_alpha=llama_work.ALPHA, target_modules=names)
    return peft.get_peft_model(model, rules, autocast_adapter_dtype=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
