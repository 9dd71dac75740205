"""The layout of the package: what a folder may import, what depends on what, what is registered."""

import ast
import collections
import functools
import gc
import pathlib
import re
from collections.abc import Iterator
from typing import TypeVar

import jax
import pytest
from jax.extend.core import Primitive

import jlora
from jlora._core._interpret import PRIMITIVES

ROOT = pathlib.Path(jlora.__file__).parent
FOLDERS = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
ROOMS = sorted(f"peft.{p.parent.name}" for p in ROOT.glob("peft/*/__init__.py"))
MOST = 250  # lines of code of a module
Node = TypeVar("Node", bound=ast.AST)
GONE = {"closed_call"}  # primitives of JAX 0.10 that the newest has not


@functools.cache
def imported(file: pathlib.Path) -> set[str]:
    """The modules of jlora that a file imports relatively, as dotted names from the package on."""
    inside = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = inside[: len(inside) - node.level + 1]
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}".strip(".") for a in node.names]
            found |= {n if is_module(n) else base for n in names}
    return found - {""}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_every_folder_is_checked() -> None:
    assert {"_core", "_adapters", "initializers", "sharding", "_planning"} <= set(FOLDERS)
    assert {"peft.names", "peft.adapter", "peft.merge"} <= set(ROOMS)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "_cli"] + ROOMS)
def test_a_folder_imports_what_its_first_line_says(folder: str) -> None:
    """A room of `peft` also says which of the other rooms it imports."""
    path = ROOT.joinpath(*folder.split("."))
    text = (path / "__init__.py").read_text()
    listed = re.search(r"Imports (`.*?`)\.", text, re.DOTALL)
    assert listed, text
    names = {n for file in path.rglob("*.py") for n in imported(file) if not n.startswith(folder)}
    is_room = folder in ROOMS
    used = {".".join(n.split(".")[: 1 + (is_room and n.startswith("peft."))]) for n in names}
    assert used == set(re.findall(r"`([\w.]+)`", listed[1]))


@functools.cache
def graph() -> dict[str, set[str]]:
    """Modules of jlora, a folder's `__init__` by the folder's name, and what they import."""
    found = {}
    for file in ROOT.rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = {n for n in imported(file) if n != name}
    return found


def floors(modules: dict[str, set[str]]) -> dict[str, int]:
    """The longest way down of each module; `RecursionError` where imports run in a circle."""
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            known[name] = 1 + max((floor(n) for n in modules[name] if n in modules), default=0)
        return known[name]

    return {name: floor(name) for name in modules}


def test_imports_run_down() -> None:
    """No circle; and few floors in the core."""
    found = graph()
    assert floors(found)
    core = {n: deps for n, deps in found.items() if n.startswith("_core.") or n == "_compat"}
    assert max(floors(core).values()) <= 6


def count_code(file: pathlib.Path) -> int:
    """The lines of a module that are neither docstrings nor comments nor blank."""
    text = file.read_text()
    docs = set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(i not in docs and line.strip()[:1] not in ("", "#") for i, line in lines)


def test_a_folder_has_few_floors_and_short_modules() -> None:
    """At most 9 floors of modules inside a folder."""
    found = graph()
    for folder in {name.rpartition(".")[0] for name in found}:
        inside = {n: deps for n, deps in found.items() if n.rpartition(".")[0] == folder}
        assert max(floors(inside).values()) <= 9, folder
    lines = {str(file.relative_to(ROOT)): count_code(file) for file in ROOT.rglob("*.py")}
    assert not {name: n for name, n in lines.items() if n > MOST}


def form(value: ast.expr) -> str:
    """Names the form of a value: a start such as `0`, a part such as `x.a`, a call, and so on."""
    match value:
        case ast.Constant() | ast.UnaryOp() | ast.List(elts=[]) | ast.Dict(keys=[]):
            return "start"
        case ast.Call(func=ast.Subscript(), args=[], keywords=[]):  # `dict[str, int]()`
            return "start"
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
            return f"{name}()"
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return "part of a call" if find_all(ast.Call, value) else "part"
    return type(value).__name__


def find_all(kind: type[Node], tree: ast.AST) -> list[Node]:
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def test_one_statement_a_line() -> None:
    """`a, b = f(x), x.b` is two statements; `a, b = f(x), f(y)` says one thing of two."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for file in ROOT.rglob("*.py")
        for node in find_all(ast.Assign, ast.parse(file.read_text()))
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if len({form(x) for x in node.value.elts if not isinstance(x, ast.Starred)}) > 1
    ]
    assert not found, "\n".join(found)


PUBLIC = [
    "__init__.py",
    "types.py",
    "extend.py",
    *(f"{x}/__init__.py" for x in FOLDERS if x[0] != "_"),
]


@functools.cache
def classes() -> dict[str, list[pathlib.Path]]:
    """The modules that define a class of each name."""
    found = collections.defaultdict(list)
    for file in ROOT.rglob("*.py"):
        for node in find_all(ast.ClassDef, ast.parse(file.read_text())):
            found[node.name.lstrip("_")].append(file)
    return found


def test_a_class_or_type_has_a_name_of_its_own() -> None:
    """A model of NNX or of Keras with an adapter is the same thing of two libraries."""
    count = collections.Counter({name: len(files) for name, files in classes().items()})
    for file in ROOT.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
                text = ast.unparse(node.targets[0]).lstrip("_")
                count[text] += bool(re.fullmatch("[A-Z]+[a-z]+[A-Za-z]*", text))
    assert [name for name, n in count.items() if n > 1] == ["Adapted"]


def test_what_a_public_function_returns_has_a_public_name() -> None:
    """And what methods of public classes return."""
    public = {
        x.name
        for file in PUBLIC
        for node in find_all(ast.ImportFrom, ast.parse((ROOT / file).read_text()))
        for x in node.names
    }
    returned = {
        f"{x.name}.{f.name}": ast.unparse(f.returns)
        for file in ROOT.rglob("*.py")
        for x in ast.parse(file.read_text()).body
        if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name in public
        if file.parent.name != "_cli"
        for f in find_all(ast.FunctionDef, x)
        if f.returns and (f is x or f.name[0] != "_")
    }
    hidden = classes().keys() - public
    assert len(returned) > 200
    found = {
        x: hint for x, hint in returned.items() if hidden & {*re.findall(r"(?<!\.)\b\w+", hint)}
    }
    assert not found


TYPED = {"site", "rule", "w", "layout", "leaf"}  # names of parameters that say what they are


def test_parameters_have_types() -> None:
    """At most 6% of the annotated parameters are `Any`, such as what a function passes on."""
    every = {
        f"{file.relative_to(ROOT)}:{node.lineno} {x.arg}": ast.unparse(x.annotation)
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        for x in parameters(node.args)
        if x.annotation is not None
    }
    untyped = [where for where, hint in every.items() if hint == "Any"]
    assert len(untyped) <= 0.06 * len(every), untyped
    assert not [where for where in untyped if where.split()[1] in TYPED]


def parameters(args: ast.arguments) -> list[ast.arg]:
    rest = [x for x in (args.vararg, args.kwarg) if x is not None]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *rest]


def test_merging_and_files_do_not_import_the_transform() -> None:
    found = graph()

    @functools.cache
    def below(name: str) -> set[str]:
        return {name}.union(*(below(n) for n in found[name] if n in found))

    for name in ("_merge", "analysis", "peft", "checkpoint", "sharding"):
        assert not below(name) & {"_transform", "_sites", "_match"}


def test_registered_primitives_exist() -> None:
    """Each in this JAX, but for those that only the other supported one has."""
    names = {x.name for x in gc.get_objects() if issubclass(type(x), Primitive)}
    is_newest = jax.__version_info__ >= (0, 11)
    assert set(PRIMITIVES) - names == (GONE if is_newest else set())


def find_private(tree: ast.AST) -> Iterator[str]:
    """What a file takes from PyTorch or torchax that has a private name."""
    for x in ast.walk(tree):
        if isinstance(x, ast.Attribute) and x.attr[0] == "_" != x.attr[1]:
            root = ast.unparse(x.value)
            if not root.startswith(("self", "aten")) and x.attr != "_replace":
                yield f"{root}.{x.attr}"
        if isinstance(x, ast.ImportFrom) and x.level == 0 and x.module:
            names = [*x.module.split("."), *(y.name for y in x.names)]
            if names[0] == "torchax" or (names[0] == "torch" and any(n[0] == "_" for n in names)):
                yield f"{x.module}: {names[-1]}"


def test_private_names_of_pytorch_are_in_one_file() -> None:
    """Each of them has a contract, in tests/torch/test_torch_private.py."""
    files = [x for x in (ROOT / "torch").rglob("*.py") if x.name != "_private.py"]
    used = {f"{x.name}: {y}" for x in files for y in find_private(ast.parse(x.read_text()))}
    assert not used
