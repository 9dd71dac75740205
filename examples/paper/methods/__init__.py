"""LoRA and its rivals, each a small function over `models.bert` and `models.gpt`.

    method = METHODS["adapter_h"](model, jlora.Full("classifier"), bottleneck=8)
    base, trained = method.init(key, variables, ids)   # ids: an array or its shape
    logits = method.apply(base, trained, ids, mask)    # the model's own arguments
    tx = optax.adamw(1e-3)                             # trains `trained`

Each is ``METHODS[name](model, *rules, **sizes) -> Method``. The rules say what else is trained,
such as a head, and come first: a leaf that they take is not the method's. The sizes are

    full, bitfit            none
    lora, lora_all          rank=8, alpha=16.0, dropout=0.0
    adapter_h, adapter_l    bottleneck=8, 16
    pre_embed, pre_layer    l_p=8
    prompt                  l_p=20, tokens=None

The trained tree is a nested dict, for optax, `jlora.count`, `jlora.dropout` and
`jlora.checkpoint`. Where a method adds parameters, they are its collection ``"added"``, and the
model's layers must not be scanned.
"""

from collections.abc import Callable

from .adapters import adapter_h, adapter_l
from .added import Method as Method
from .prefixes import pre_embed, pre_layer, prompt
from .tuned import bitfit, full, lora, lora_all

METHODS: dict[str, Callable[..., Method]] = {
    "full": full,
    "bitfit": bitfit,
    "adapter_h": adapter_h,
    "adapter_l": adapter_l,
    "pre_embed": pre_embed,
    "pre_layer": pre_layer,
    "prompt": prompt,
    "lora": lora,
    "lora_all": lora_all,
}
# These put tokens of their own into every call, which a cache of keys and values cannot hold.
PREFIXES = ("pre_embed", "pre_layer", "prompt")
