"""PyTorch's side of the name tables: random models and adapters, and their logits.

`common` calls it, in its own process or in that of another Python, where a library that needs
one for which PyTorch is not installed is tested: then each line of the input is a call.
"""

import json
import pathlib
import sys
import warnings
from typing import Any

import peft
import torch
import transformers


def make(
    folder: str,
    kind: str,
    fields: dict[str, Any],
    targets: dict[str, tuple[Any, list[str]]],
    tokens: list[list[int]],
    constant: str,
) -> dict[str, Any]:
    """Writes a checkpoint, `base`, and adapters of these targets; gives the logits of each."""
    root = pathlib.Path(folder)
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _randomize(model, constant)
    model.save_pretrained(root / "base")
    found = {"base": logits(folder + "/base", tokens)}
    for which, (modules, parameters) in targets.items():
        wanted = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=modules, target_parameters=parameters or None
        )
        adapted = peft.get_peft_model(_load(root / "base"), wanted)
        for name, x in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(x, std=0.2)
        adapted.save_pretrained(root / which)
        found[which] = logits(folder + "/base", tokens, f"{folder}/{which}")
    return found


@torch.no_grad()
def logits(folder: str, tokens: list[list[int]], adapter: str | None = None) -> list[Any]:
    """Those of a checkpoint, with an adapter whose keys must all find their place."""
    model = _load(pathlib.Path(folder))
    if adapter is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(model, adapter)
        assert not [w for w in caught if "adapter keys" in str(w.message)]
    return model.eval()(torch.as_tensor(tokens)).logits.tolist()


@torch.no_grad()
def _randomize(model: Any, constant: str) -> None:
    """Weights of the size that keeps activations near 1, and norms and biases that differ.

    Embeddings have values of bfloat16, to which MaxText rounds one that is the head too.
    """
    for name, x in model.named_parameters():
        if constant in name:
            continue
        noise = torch.randn_like(x)
        x.copy_(x + 0.3 * noise if x.ndim == 1 else noise / x.shape[-1] ** 0.5)
    table = model.get_input_embeddings().weight
    table.copy_(table.bfloat16())


def _load(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), file=replies, flush=True)
