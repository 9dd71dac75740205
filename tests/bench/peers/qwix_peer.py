"""Qwix: a linen module rewritten so that its products look for factors beside the kernels."""

from typing import Any

import jax
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

from . import compare, dense_peer


def attach(base: compare.Model, ids: jax.Array) -> compare.Tuned:
    """The factors exist only after another `init`, whose kernels are thrown away."""
    rule = qwix.LoraRule(
        module_path=r".*/(q|k|v|o|up|down)", rank=compare.RANK, alpha=compare.ALPHA
    )
    module = qwix.apply_lora_to_model(base.module, qwix.LoraProvider([rule]))
    frozen = flatten_dict(base.params)
    init = flatten_dict(jax.jit(module.init)(jax.random.key(2), ids))
    trained = {path: x for path, x in init.items() if path not in frozen}

    def apply(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        return module.apply(unflatten_dict({**frozen, **trained}), ids)

    return compare.Tuned(apply, frozen, trained)


PEER = compare.Peer("qwix", compare.version("qwix"), "n-D", dense_peer.make, attach)

if __name__ == "__main__":
    compare.main(PEER)
