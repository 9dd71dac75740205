'''The one door for methods, schemes, primitives and engines of your own.

A method is two classes. A node is what the adapter has for a weight: its arrays, what their axes
follow, and the `Change` that they make. A rule is what the user writes, and starts nodes. This is
IA³ (Liu et al., arXiv 2205.05638) whole, which multiplies each output with a gain:

>>> import dataclasses
>>> from typing import ClassVar
>>> import jax, jax.numpy as jnp, jlora
>>> from jlora.extend import Change, Node, Rule, register
>>> @register
... class Gain(Node):
...     """W' = g ⊙ W."""
...
...     gain: jax.Array
...     layout: jlora.types.Layout
...     labels: ClassVar = {"gain": "gain"}
...
...     @staticmethod
...     def axes(layout):
...         return {"gain": (*layout.stack, *layout.outputs)}
...
...     def lower(self, w):
...         return Change(gain=self.factor("gain"))
>>> @register
... @dataclasses.dataclass(frozen=True)
... class IA3(Rule):
...     """Adapts the weights whose path matches `pattern` by a gain for each output."""
...
...     pattern: str | None = None
...     node: ClassVar = Gain
...
...     def start(self, key, w, site):
...         shape = self.shapes(site.layout, site.shape)["gain"]
...         return w, Gain(jnp.ones(shape), site.layout)

The shapes, shardings and checkpoints of the arrays follow from `axes`, all that is computed from
`lower`, and from `labels` what the optimizer trains.

>>> ia3 = jlora.transform(lambda p, x: x @ p["w"], IA3("w"))
>>> base, adapter = ia3.init(jax.random.key(0), {"w": jnp.eye(4, 3)}, jnp.ones((1, 4)))
>>> print(adapter)
{'w': Gain(gain=float32[3])}
>>> jlora.merge(base, {"w": adapter["w"]._replace(gain=jnp.array([1.0, 2.0, 3.0]))})["w"].tolist()
[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]

A method with A and B gives `Change((Delta(self.factor("a"), self.factor("b"), scale),))`. Its
`axes` call the axis of the rank by a name, as `"rank"`, of which `Rule.sizes` has the length.

A scheme of quantization is a frozen dataclass, a `Scheme` with `encode`. It defines `form` and
`decode` too where blocks are not along the last axis, or a code is not multiplied by its scale.
What a primitive does to weights is a function under `@primitive(name)`: it takes an `Equation` and
its operands, and returns a `Weight` or raises `Unfactorable`. An `Engine` has functions that yield
a `Finding` each, and is added by `register_engine`. CONTRIBUTING.md has one of each.
'''

from typing import TYPE_CHECKING, Any

from ._adapters import Node as Node
from ._adapters import PartialWeightError as PartialWeightError
from ._adapters import register as register
from ._core import RANK as RANK
from ._core import Axis as Axis
from ._core import Change as Change
from ._core import Delta as Delta
from ._core import Equation as Equation
from ._core import Factor as Factor
from ._core import Unfactorable as Unfactorable
from ._core import Weight as Weight
from ._core import rule as _rule
from ._quantized import Coded as Coded
from ._quantized import Form as Form
from ._quantized import Scheme as Scheme
from ._quantized import one_block as one_block
from ._rules import Rule as Rule

if TYPE_CHECKING:
    from .peft.engines import Engine as Engine
    from .peft.engines import Finding as Finding

primitive = _rule

_ENGINES = {"Engine": "Engine", "Finding": "Finding", "register_engine": "register"}


def __getattr__(name: str) -> Any:
    if name not in _ENGINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .peft import engines  # loaded when it is first used, as `jlora.peft` is

    return getattr(engines, _ENGINES[name])
