'''Adds methods, quantization schemes and primitives of your own.

A method is two classes. A *node* is what the adapter holds for one weight: its arrays, the axes of
W that they follow, and the `Change` that they make to W. A *rule* is what the user writes; it makes
the nodes. This is all of IA³ (Liu et al., arXiv 2205.05638), which multiplies each output by a
gain:

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
...     """Multiplies each output of the weights whose path matches `pattern` by a gain."""
...
...     pattern: str | None = None
...     node: ClassVar = Gain
...
...     def start(self, key, w, site):
...         shape = self.shapes(site.layout, site.shape)["gain"]
...         return w, Gain(jnp.ones(shape), site.layout)

`axes` determines the shapes, shardings and checkpoints of the arrays, `lower` all computations, and
`labels` what the optimizer trains.

>>> ia3 = jlora.transform(lambda p, x: x @ p["w"], IA3("w"))
>>> base, adapter = ia3.init(jax.random.key(0), {"w": jnp.eye(4, 3)}, jnp.ones((1, 4)))
>>> print(adapter)
{'w': Gain(gain=float32[3])}
>>> jlora.merge(base, {"w": adapter["w"].replace(gain=jnp.array([1.0, 2.0, 3.0]))})["w"].tolist()
[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]]

For a method with A and B, `lower` returns
`Change((Delta(self.factor("a"), self.factor("b"), scale),))`. Its `axes` give the axis of the rank
a name, such as `"rank"`, and `Rule.sizes` returns its length.

For annotations, `jlora.types` has `Site` and `Layout`, `BaseLeaf` (the `w` of `start`: an array, a
`jax.ShapeDtypeStruct` or a `jlora.Quantized`) and `RankRule` (what an initializer reads of a rule).

`register` refuses a class that is incomplete, or has the name of another rule. A node does not
extend another node: it declares all its fields. `init` checks that what `start` returns has the
shapes that `axes` and `sizes` say.

A quantization scheme is a frozen dataclass, a subclass of `Scheme` with `encode`. It also defines
`form` if blocks are not along the last axis, and `decode` if a weight is not code × scale. For a
primitive that moves weights, write a function under `@primitive(name)`: it gets an `Equation` and
its operands, and returns a `Weight` or raises `Unfactorable`. A primitive that has a rule is
refused, unless with `override=True`. CONTRIBUTING.md has an example of each.
'''

from ._adapters import Node as Node
from ._adapters import register as register
from ._core import RANK as RANK
from ._core import Axis as Axis
from ._core import Change as Change
from ._core import Delta as Delta
from ._core import Equation as Equation
from ._core import Factor as Factor
from ._core import Packed as Packed
from ._core import Unfactorable as Unfactorable
from ._core import Weight as Weight
from ._core import primitive as primitive
from ._node import PartialWeightError as PartialWeightError
from ._quantized import Coded as Coded
from ._quantized import Form as Form
from ._quantized import Scheme as Scheme
from ._quantized import one_block as one_block
from ._site import Rule as Rule
