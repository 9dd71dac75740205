"""What a model calls, and what it only reads: PEFT computes what jlora does, or jlora refuses."""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("peft")

import jax
import peft as hf_peft
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small import set_up_noisy
from torch import nn
from torch.nn.functional import linear
from torch_functions import Lambda

import jlora
from jlora import LoRA, peft
from jlora._tree import leaves_by_path, nest
from jlora.types import InputError

IDS = np.array([[1, 2, 0], [3, 0, 4]])
READ, SHARED = "reads it without calling its module", "share"


def make(function: Callable[..., torch.Tensor]) -> Any:
    """A module with several others, of which one is linear and of a class of its own."""
    torch.manual_seed(0)
    one, two, same = (nn.Linear(8, 8) for _ in range(3))
    same.weight = two.weight
    return Lambda(
        function,
        table=nn.Embedding(5, 8),
        one=one,
        two=two,
        same=same,
        plain=[one],
        router=Lambda(lambda m, x: linear(x, m.weight), weight=nn.Parameter(torch.randn(8, 8))),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        grouped=nn.Conv1d(8, 8, 1, groups=2),
        dilated=nn.Conv1d(8, 8, 3, padding="same", dilation=2),
        circular=nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular"),
    ).eval()


def of_rows(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
    return lambda m, ids: function(m, m.table(ids))


class Form(NamedTuple):
    """A use of a weight.

    Attributes:
        function: of the module and the ids.
        pattern: of the weight.
        why: why an adapter of it is refused; empty if it is not.
        has_file: whether PEFT would take a file in spite of it.
    """

    function: Any
    pattern: str
    why: str = ""
    has_file: bool = True


FORMS = {
    "called": Form(of_rows(lambda m, x: m.one(x)), "one/weight"),
    "called twice": Form(of_rows(lambda m, x: m.one(m.one(x))), "one/weight"),
    "asked for its form": Form(
        of_rows(lambda m, x: m.one(x.to(m.one.weight.dtype)) * m.one.weight.shape[0]), "one/weight"
    ),
    "of a class of its own": Form(of_rows(lambda m, x: m.router(x)), "router/weight"),
    "an embedding": Form(lambda m, ids: m.table(ids), "table/weight"),
    "read": Form(of_rows(lambda m, x: linear(x, m.one.weight)), "one/weight", READ),
    "a slice": Form(of_rows(lambda m, x: linear(x, m.one.weight[:4])), "one/weight", READ),
    "transposed": Form(of_rows(lambda m, x: x @ m.one.weight.t()), "one/weight", READ),
    "called and read": Form(
        of_rows(lambda m, x: m.one(x) + linear(x, m.one.weight)), "one/weight", READ
    ),
    "a head that is no module": Form(
        of_rows(lambda m, x: linear(x, m.table.weight)), "table/weight", READ
    ),
    "a class of its own that is read": Form(
        of_rows(lambda m, x: linear(x, m.router.weight)), "router/weight", READ, has_file=False
    ),
    "shared": Form(of_rows(lambda m, x: m.same(torch.relu(m.two(x)))), "two/weight", SHARED),
    "called through a plain list": Form(of_rows(lambda m, x: m.plain[0](x)), "one/weight", READ),
    "of attention": Form(
        of_rows(lambda m, x: m.attention(x, x, x)[0]), "attention/out_proj/weight", READ
    ),
    "of all of attention": Form(
        of_rows(lambda m, x: m.attention(x, x, x)[0]),
        "attention/in_proj_weight",
        "a parameter of a MultiheadAttention",
        has_file=False,
    ),
    **{
        f"a convolution with {why}": Form(
            of_rows(lambda m, x, name=name: getattr(m, name)(x.transpose(1, 2))),
            f"{name}/weight",
            f"a Conv1d with {why}",
            has_file=why != "groups",
        )
        for name, why in {
            "grouped": "groups",
            "dilated": "dilation",
            "circular": "padding_mode",
        }.items()
    },
}


def compute(model: nn.Module, folder: pathlib.Path) -> np.ndarray:
    """What PEFT computes with the files in a folder."""
    adapted = hf_peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return adapted(torch.as_tensor(IDS)).numpy()


@pytest.mark.parametrize("name", FORMS)
def test_peft_computes_what_jlora_does(name: str, tmp_path: pathlib.Path) -> None:
    """Or it is known before training, and `save` says the same."""
    form = FORMS[name]
    params, apply = jlora.torch.extract(make(form.function))
    lora, base, adapter = set_up_noisy(apply, LoRA(form.pattern, rank=2), params, IDS)
    outputs = np.asarray(lora.apply(base, adapter, IDS))
    sites = lora.sites(params, IDS)
    names = jlora.torch.names(sites, apply)
    problems = peft.check_sites(sites, names)
    if not form.why:
        assert problems == ()
        peft.save(tmp_path / "ours", base, adapter, names)
        np.testing.assert_allclose(
            compute(make(form.function), tmp_path / "ours"), outputs, 0, 1e-5
        )
        return
    [problem] = problems
    assert problem.where == form.pattern and form.why in problem.why
    with pytest.raises(InputError) as caught:
        peft.save(tmp_path / "ours", base, adapter, names)
    assert caught.value.problems == problems
    if form.has_file:  # the names that do not know what is called
        peft.save(tmp_path / "wrong", base, adapter, jlora.torch.names(sites))
        with pytest.raises((AssertionError, RuntimeError)):
            np.testing.assert_allclose(compute(make(form.function), tmp_path / "wrong"), outputs)


@pytest.mark.parametrize("parts", [["lm"], ["policy/lm", "reference"]])
def test_models_in_a_larger_tree(parts: list[str]) -> None:
    """Rows know the model in each of its parts; those of other leaves are by use."""
    params, apply = jlora.torch.extract(make(of_rows(lambda m, x: linear(x, m.one.weight))))
    row = {x.path: x for x in jlora.torch.names(jlora.transform(apply).sites(params, IDS), apply)}
    paths = [tuple(part.split("/")) for part in parts]
    tree = nest({("head", "weight"): np.ones((3, 8), np.float32)} | dict.fromkeys(paths, params))

    def score(tree: Any) -> list[jax.Array]:
        models = [functools.reduce(operator.getitem, path, tree) for path in paths]
        return [apply(x, IDS) @ tree["head"]["weight"].T for x in models]

    sites = jlora.transform(score, LoRA("one/weight", rank=2)).sites(tree)
    names = {x.path: x for x in jlora.torch.names(sites, apply)}
    assert names.pop("head/weight") == peft.Name("head/weight", "head", "oi")
    expected = {
        f"{part}/{path}": dataclasses.replace(
            x, path=f"{part}/{path}", module=f"{part.replace('/', '.')}.{x.module}"
        )
        for part in parts
        for path, x in row.items()
    }
    assert names == expected
    problems = peft.check_sites(sites, jlora.torch.names(sites, apply))
    assert [x.where for x in problems] == [f"{part}/one/weight" for part in parts]
    assert all(READ in x.why for x in problems)
    other = jlora.transform(lambda p: p["weight"].sum()).sites({"weight": np.ones((3, 3))})
    with pytest.raises(ValueError, match=r"no part of `sites` has them .* leaf is 'weight'"):
        jlora.torch.names(other, apply)


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(x)
    found.view(-1, 8)[:2] = m.two(x).view(-1, 8)[:2]
    return found + m.one(x)


# Which modules an output depends on, of two that are called.
USED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], str]] = {
    "both": (lambda m, x: m.one(m.router(x)), "one"),
    "a result that nobody reads": (lambda m, x: (m.grouped(x[0, :, None].mT), m.one(x))[1], "one"),
    "one of two outputs": (lambda m, x: {"a": m.one(x), "b": [m.two(x)]}, "one two"),
    "without gradients": (lambda m, x: m.one(x) + m.two(x).detach(), "one"),
    "under no_grad": (lambda m, x: m.one(x) + torch.no_grad()(m.two)(x), "one"),
    "written in a view": (written, "one two"),
    "of the shape alone": (lambda m, x: m.one(x) + torch.zeros_like(m.two(x)), "one"),
    "of the dtype alone": (lambda m, x: m.one(x) + m.two(x).new_ones(8), "one"),
    "by an index": (lambda m, x: m.one(x) * m.two(x).argmax(-1, keepdim=True), "one"),
    "by a comparison": (lambda m, x: m.one(x) * (m.two(x) > 0), "one"),
    "grad by torch.func": (lambda m, x: torch.func.grad(lambda y: y.exp().sum())(m.one(x)), "one"),
    "written over": (lambda m, x: (y := m.two(x), y.copy_(m.one(x)))[1], "one"),
    "at a traced index": (lambda m, x: m.one(x)[x.sum().long() % 2], "one"),
}


@pytest.mark.parametrize("kind", ["plain", "remat", "activations"])
@pytest.mark.parametrize("name", USED)
def test_modules_that_no_output_depends_on_are_left_out(name: str, kind: str) -> None:
    """As PEFT's would get no gradients."""
    function, expected = USED[name]
    model = make(of_rows(function))
    model.same = nn.Identity().eval()  # so that nothing is shared
    place = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    options = {
        "remat": {"remat": {"one|two": None}},
        "activations": {"activations": {"one": place}},
    }
    params, apply = jlora.torch.extract(model, **options.get(kind, {}))
    sites = jlora.transform(apply).sites(params, IDS)
    grads = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(apply(p, IDS))))(params)
    pattern = jlora.torch.all_linear(apply, sites)
    assert sorted(pattern.split("|")) == [f"{x}/weight" for x in expected.split()]
    trained = {path for path, x in leaves_by_path(grads) if x.any()}
    assert trained.isdisjoint(site.parts for site in sites.leaves if site.used is False)


def either(m: Any, ids: torch.Tensor, by: str = "call") -> torch.Tensor:
    h = m.table(ids)
    return m.one(h) if by == "call" else linear(h, m.one.weight)


def describe(params: Any, apply: Any, by: str) -> tuple[Any, ...]:
    """What is known of a call, by the trace that found the sites."""
    sites = jlora.transform(apply, LoRA("one/weight", rank=2)).sites(params, IDS, by=by)
    names = jlora.torch.names(sites, apply)
    return names, jlora.torch.all_linear(apply), len(peft.check_sites(sites, names))


def test_apply_remembers_no_call() -> None:
    """In any order, in several threads: the same answers as of a function that was never called."""
    params, apply = jlora.torch.extract(make(either))
    called, read = (describe(*jlora.torch.extract(make(either)), by) for by in ("call", "x"))
    assert (called[2], read[2]) == (0, 1)
    for by in ("x", "call", "x"):
        apply(params, IDS, by=by)
        assert describe(params, apply, "call") == called
        assert describe(params, apply, "x") == read
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: describe(params, apply, ["call", "x"][i % 2]), range(8)))
    assert found == [called, read] * 4


def test_all_linear_of_sites() -> None:
    """Of those that were read by name, and of another model."""
    params, apply = jlora.torch.extract(make(either))
    lora = jlora.transform(apply)
    sites = lora.sites(params, IDS)
    assert jlora.torch.all_linear(apply, sites) == "one/weight"
    with pytest.raises(ValueError, match="`apply` is of a model without linear modules"):
        jlora.torch.all_linear(apply, lora.sites(params, IDS, by="x"))
    bound = functools.partial(apply, by="call")
    assert jlora.torch.all_linear(bound, sites) == "one/weight"
    assert jlora.torch.names(sites, bound) == jlora.torch.names(sites, apply)
    with pytest.raises(TypeError, match=r"`apply` must be the function that .* got function\."):
        jlora.torch.names(sites, cast(Any, make))
    nested = jlora.transform(lambda p, x: apply(p["lm"], x)).sites({"lm": params}, IDS)
    assert jlora.torch.all_linear(apply, nested) == "one/weight"
