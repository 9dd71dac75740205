"""PEFT on the BERT of transformers, and torch's floor: the same with only the norms trained."""

import copy
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import peft
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from . import bert_work, environment


def main(folder: pathlib.Path) -> None:
    """Writes the weights to `folder`, and serves the steps."""
    torch.set_num_threads(environment.cpus())
    torch.manual_seed(0)
    config = BertConfig(**bert_work.SIZES)
    plain = BertModel(config, add_pooling_layer=False).eval()  # no dropout, as in JAX
    config.save_pretrained(folder)
    save_file(plain.state_dict(), folder / "model.safetensors")

    rules = peft.LoraConfig(
        r=bert_work.RANK,
        lora_alpha=bert_work.ALPHA,
        target_modules=r"encoder\..*(query|key|value|dense)",
    )
    adapted = peft.get_peft_model(copy.deepcopy(plain), rules).eval()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("LayerNorm" in name)
    batch = [torch.from_numpy(x) for x in bert_work.batch()]
    facts = {
        "versions": f"peft {peft.__version__}, torch {torch.__version__}",
        "trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "losses": [loss(model, batch).item() for model in (plain, adapted)],
    }
    programs = {"floor": step(plain, batch), "lora": step(adapted, batch)}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:  # NAME COUNT: the seconds of so many steps
        name, count = line.split()
        print(json.dumps({"seconds": [programs[name]() for _ in range(int(count))]}), flush=True)


def loss(model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean square of the distance of the hidden states to the targets."""
    ids, mask, target = batch
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return ((hidden - target) ** 2).mean()


def step(model: torch.nn.Module, batch: Sequence[torch.Tensor]) -> Callable[[], float]:
    """A step of Adam on what requires gradients; returns its seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)  # torch's fastest

    def run() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
