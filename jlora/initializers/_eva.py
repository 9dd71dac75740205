"""EVA: A from the principal components of a site's inputs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, SketchInitializer, Start, draw


@dataclasses.dataclass(frozen=True, repr=False)
class eva(SketchInitializer):
    r"""Sets A to the leading principal components of the site's inputs, and B to zero.

    A has orthonormal columns, and no other such A keeps more of the variance of the inputs. W does
    not change.

    Args:
        sketch: from `jlora.sketch` with `kind="inputs"` and the same rules.

    Raises:
        TypeError: if `sketch` is not a sketch.
        ValueError: if `sketch` is of another kind; in `init`, if it lacks a site, is zero there,
            or has it with another shape or fewer components than the rank.

    Source: Paischer et al., arXiv 2410.07170. As in PEFT, the mean of the inputs is subtracted. An
    input counts here if the loss depends on it; in PEFT, if its label is not masked.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params, batches = {"w": jnp.ones((2, 3))}, [jnp.array([[4.0, 1], [-4, 1], [0, 1]])]
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> found = jlora.sketch(loss, params, jlora.LoRA("w", rank=1), batches, kind="inputs")
        >>> rule = jlora.LoRA("w", rank=1, init=jlora.initializers.eva(found))
        >>> lora = jlora.transform(lambda params, x: x @ params["w"], rule)
        >>> _, adapter = lora.init(jax.random.key(0), params, batches[0])
        >>> jnp.abs(adapter["w"].a).round(3).tolist()
        [[1.0], [0.0]]
    """

    kind: ClassVar[str] = "inputs"

    def __call__(self, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
        a = self.spectrum_at(site, rule, rule.rank).inputs[..., : rule.rank]
        return draw(w, site, rule, lambda _, dtype: jnp.array(a, dtype))
