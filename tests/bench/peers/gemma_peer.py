"""`gemma.peft`: an interceptor that replaces Dense and DenseGeneral modules by wrapped ones."""

from typing import Any

import flax.linen as nn
import jax
from gemma import peft

from . import compare, dense_peer, twins

WRAPPERS = {nn.Dense: peft.LoRADense, nn.DenseGeneral: peft.LoRADenseGeneral}


def wrap(module: nn.Module) -> nn.Module:
    """An adapted site; any other module as it is."""
    if module.name not in twins.SITES or type(module) not in WRAPPERS:
        return module
    return WRAPPERS[type(module)](rank=compare.RANK, wrapped=module)


def attach(base: compare.Model, ids: jax.Array) -> compare.Tuned:
    """As in Qwix, the factors come from another `init`."""

    def init(ids: jax.Array) -> Any:
        with peft.ModuleInterceptor(wrap):
            return base.module.init(jax.random.key(2), ids)

    def apply(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        with peft.ModuleInterceptor(wrap):
            return base.module.apply(peft.merge_params(frozen, trained), ids)

    return compare.Tuned(apply, base.params, peft.split_params(jax.jit(init)(ids)).lora)


PEER = compare.Peer("gemma.peft", compare.version("gemma"), "n-D", dense_peer.make, attach)

if __name__ == "__main__":
    compare.main(PEER)
