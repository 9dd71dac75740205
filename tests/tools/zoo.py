"""Draws models in PyTorch, and measures what `jlora.torch` makes of each against PyTorch and PEFT.

    PYTHONPATH=tests/support python tests/tools/zoo.py SEED [OTHER...]

writes `examples/results/zoo_SEED.jsonl`, without the classes of the files of other seeds. Lines
that the file has already are kept: delete those to be measured again. Needs what `zoo_families.py`
does.
"""

import copy
import functools
import json
import math
import multiprocessing
import pathlib
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
import peft as hf_peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file
from safetensors.torch import load_model, save_model
from small import randomize
from zoo_families import FAMILIES, Specimen, list_drawn
from zoo_page import STAGES, Row, file_of, read, write_line

import jlora
from jlora import LoRA, peft

SECONDS = 900  # for a model
OPTIONS = {"xla_backend_optimization_level": 0}  # compiles faster
LIBRARIES = ("torch", "torchax", "transformers", "peft", "diffusers", "timm", "torchvision", "jax")


# ---------------------------------------------------------------------------------------- measuring


def flatten(outputs: Any) -> dict[str, Any]:
    """Lists outputs in floats by name."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    kinds = (torch.Tensor, jax.Array)
    named = {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, kinds)}
    return {k: x for k, x in named.items() if "float" in str(x.dtype) and 0 not in x.shape}


def compare(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Returns the largest difference of arrays, relative to their largest entry.

    Of arrays whose entries are below a thousandth of the largest of all, it is relative to that.
    """
    if found.keys() != expected.keys():
        return math.inf
    sizes = {k: _measure_size(x) for k, x in expected.items()}
    least = max(1e-3 * max(sizes.values(), default=0), 1e-9)
    pairs = ((found[k], x, max(sizes[k], least)) for k, x in expected.items())
    return max((_compare(*pair) for pair in pairs), default=0.0)


def _measure_size(x: Any) -> float:
    return np.abs(x, where=np.isfinite(x), out=np.zeros(np.shape(x))).max(initial=0)


def _compare(found: Any, expected: Any, size: float) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    is_finite = np.isfinite(expected)
    if not np.array_equal(found[~is_finite], expected[~is_finite], equal_nan=True):
        return math.inf
    return float(np.abs(found[is_finite] - expected[is_finite]).max(initial=0) / size)


class Subject:
    """A model in PyTorch and in JAX; the method of each stage measures it, in order."""

    def __init__(self, specimen: Specimen, folder: pathlib.Path) -> None:
        """Takes a folder for files."""
        self.model, self.inputs = specimen
        self.folder = folder
        self.problem: Exception | None = None
        leaves = {k: jax.tree.leaves(x) for k, x in self.inputs.items()}
        traced = {k for k, x in leaves.items() if x and all(map(torch.is_tensor, x))}
        to_numpy = functools.partial(jax.tree.map, lambda x: x.numpy())
        self.arrays = {k: to_numpy(x) for k, x in self.inputs.items() if k in traced}
        self.static = {k: x for k, x in self.inputs.items() if k not in traced}

    def forward(self) -> float:
        """Compares the outputs with PyTorch's: those of a step, with B = 0, if it can be made."""
        self.params, self.apply = jlora.torch.extract(self.model)
        try:
            self._init()
            (_, found), _ = self._step(self.values, self.base, self.arrays)
        except Exception as e:
            self.problem = e
            found = jax.jit(self._call, compiler_options=OPTIONS)(self.params, self.arrays)
            self.expected = self._run(self.model)
        return compare(found, self.expected)

    def linear(self) -> str:
        """Compares `all_linear` with the modules that PEFT adapts and its model calls."""
        if self.problem:
            raise self.problem
        theirs = self._list_theirs()
        if theirs is None:
            return "PEFT refuses"
        return "equal" if self.ours == theirs else f"different: {sorted(self.ours ^ theirs)[:3]}"

    def adapter(self) -> float:
        """Compares the outputs with those of PEFT, which loads our file.

        Raises PEFT's warning where it loses weights of its own file too.
        """
        self.values = randomize(self.values)
        (_, self.outputs), self.grads = self._step(self.values, self.base, self.arrays)
        peft.save(self.folder / "adapter", self.base, self.values, self.names)
        with warnings.catch_warnings(record=True) as caught:
            self.theirs = self._load("adapter")
        if any("missing adapter keys" in str(x.message) for x in caught):
            self.theirs.save_pretrained(self.folder / "own")
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*missing adapter keys")
                self._load("own")
        return compare(self._run(self.theirs), self.outputs)

    def gradient(self) -> float:
        """Compares the gradients of A and B with PEFT's, by the names of its file."""
        peft.save(self.folder / "grads", self.base, self.grads, self.names)
        ours = load_file(self.folder / "grads" / "adapter_model.safetensors")
        self._differentiate(self.theirs)
        named = {k.replace(".default", ""): x.grad for k, x in self.theirs.named_parameters()}
        ours = {k: x for k, x in ours.items() if ".lora_" in k}  # PEFT's file has adapted heads too
        theirs = {k: 0 * x if named[k] is None else named[k].numpy() for k, x in ours.items()}
        return compare(ours, theirs)

    def merged(self) -> float:
        """Compares the outputs with those of the merged folder, loaded by its own library."""
        has_folder = hasattr(self.model, "save_pretrained")
        (self.folder / "base").mkdir()
        if has_folder:
            self.model.save_pretrained(self.folder / "base")
        else:
            save_model(self.model, self.folder / "base" / "model.safetensors")
        peft.export_merged(self.folder / "base", self.folder / "adapter", self.folder / "merged")
        if has_folder:
            model = type(self.model).from_pretrained(self.folder / "merged").eval()
            if hasattr(model, "set_experts_implementation"):  # which is in no file
                model.set_experts_implementation(self.model.config._experts_implementation)
        else:
            model = copy.deepcopy(self.model)
            load_model(model, self.folder / "merged" / "model.safetensors")
        return compare(self._run(model), self.outputs)

    def _load(self, name: str) -> Any:
        folder, model = self.folder / name, copy.deepcopy(self.model)
        return hf_peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()

    def _run(self, model: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {k: x.numpy() for k, x in flatten(model(**self.inputs)).items()}

    def _call(self, params: Any, arrays: Any) -> dict[str, jax.Array]:
        return flatten(self.apply(params, **arrays, **self.static))

    def _differentiate(self, model: Any) -> None:
        loss = self._weigh(flatten(model(**self.inputs)))
        if loss.requires_grad:
            loss.backward()

    def _weigh(self, outputs: Mapping[str, Any]) -> Any:
        """Adds up all finite outputs, with weights of either sign."""
        total = 0.0
        for key, x in self.expected.items():
            is_finite = np.isfinite(x).ravel()
            draw = np.random.default_rng(0).standard_normal(x.size)[is_finite]
            weights = (draw / max(_measure_size(x), 1e-6)).astype(x.dtype)
            if torch.is_tensor(outputs[key]):
                is_finite, weights = map(torch.as_tensor, (is_finite, weights))
            total += (outputs[key].reshape(-1)[is_finite] * weights).sum()
        return total

    def _list_theirs(self) -> set[str] | None:
        """Lists the parameters whose A and B have gradients in PEFT; None if it refuses them."""
        config = hf_peft.LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False)
        try:
            model = hf_peft.get_peft_model(copy.deepcopy(self.model), config).eval()
        except ValueError as e:
            return set() if "No modules were targeted" in str(e) else None
        self._differentiate(model)
        each = model.base_model.model.named_modules()
        adapted = {name: m for name, m in each if isinstance(m, LoraLayer)}
        names = {
            f"{name.replace('.base_layer', '')}.{getattr(m, 'parameter_name', 'weight')}"
            for name, m in adapted.items()
            if m.lora_A["default"].weight.grad is not None
        }
        return {name.replace(".", "/") for name in names}

    def _init(self) -> None:
        """Makes an adapter by `all_linear`; without linear modules, of all that PEFT can hold."""
        sites = jlora.transform(self._call).sites(self.params, self.arrays)
        self.expected = self._run(self.model)  # after a call, which makes pytrees of its outputs
        self.names = jlora.torch.names(sites, self.apply)
        try:
            pattern, has_linear = jlora.torch.all_linear(self.apply, sites), True
        except ValueError:
            pattern, has_linear = (
                "|".join(x.path for x in self.names if x.kind and not x.refused),
                False,
            )
        lora = jlora.transform(self._call, LoRA(pattern, rank=1, alpha=2))
        self.base, self.values = lora.init(jax.random.key(0), self.params, self.arrays)
        nodes = jax.tree_util.tree_leaves_with_path(self.values, lambda x: not isinstance(x, dict))
        paths = {"/".join(key.key for key in path) for path, _ in nodes}
        self.ours = paths if has_linear else set[str]()

        def adapt(adapter: Any, base: Any, arrays: Any) -> tuple[jax.Array, Any]:
            outputs = lora.apply(base, adapter, arrays)
            return self._weigh(outputs), outputs

        step = jax.value_and_grad(adapt, has_aux=True)
        self._step = jax.jit(step, compiler_options=OPTIONS)


def measure(family: str, name: str) -> Row | None:
    """Measures a model; None if PyTorch computes nothing with it.

    With floats of 64 bits throughout if those of 32 are not close, as rounding may be what is
    measured.
    """
    start = time.monotonic()
    torch.manual_seed(0)
    try:
        specimen = FAMILIES[family].make(name)
        if specimen is None:
            return None
        with torch.no_grad():
            specimen.model(**specimen.inputs)
    except Exception:  # each has errors of its own
        return None
    row = judge(specimen)
    if row.verdict == "wrong":
        inputs = torch.utils._pytree.tree_map_only(torch.Tensor, widen, specimen.inputs)
        torch.set_default_dtype(torch.float64)  # of what the model makes in a call
        with jax.enable_x64(True):
            wide = judge(Specimen(widen_model(specimen.model), inputs))
        torch.set_default_dtype(torch.float32)
        if wide.verdict not in ("wrong", "failed"):
            row = wide._replace(rounded=max(row.errors))
    jax.clear_caches()
    return row._replace(family=family, name=name, seconds=round(time.monotonic() - start))


def widen(x: torch.Tensor) -> torch.Tensor:
    """Makes floats of 64 bits."""
    return x.double() if x.is_floating_point() else x


class Wide(torch.overrides.TorchFunctionMode):
    """Computes in 64 bits what a model asks for in 32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls a function with the wider dtype."""
        del types
        func = torch.Tensor.double if func is torch.Tensor.float else func
        given = torch.utils._pytree.tree_map(_widen_dtype, (args, kwargs or {}))
        return func(*given[0], **given[1])


def _widen_dtype(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def widen_model(model: Any) -> Any:
    """Makes weights of 64 bits, and has the model compute in them throughout."""
    own = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Wide():
            return own.forward(self, *args, **kwargs)

    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default takes no floats of 64 bits
    return model.double()


def judge(specimen: Specimen) -> Row:
    """Measures stage by stage; what comes after an error is left open."""
    found = dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(specimen, pathlib.Path(folder))
        for stage in STAGES:
            try:
                x = getattr(subject, stage)()
            except Exception as e:
                word = explain(e)
                return Row(**found, **{stage: word}, why=f"{type(e).__name__}: {e}")
            found[stage] = x if isinstance(x, str) else f"{x:.1e}"
        return Row(**found)


def explain(e: Exception) -> str:
    """Says whether jlora itself raised an error, or PEFT or what it calls did."""
    files = [pathlib.Path(x.filename) for x in traceback.extract_tb(e.__traceback__)]
    kinds = ValueError | TypeError | NotImplementedError
    if isinstance(e, kinds) and files[-1].is_relative_to(pathlib.Path(jlora.__file__).parent):
        return "refused"
    home = pathlib.Path(hf_peft.__file__).parent
    return "PEFT fails" if any(x.is_relative_to(home) for x in files) else "failed"


def draw(seed: int, left_out: Set[str] = frozenset(), known: Sequence[Row] = ()) -> Iterator[Row]:
    """Draws models, and measures those that are not known; one that takes too long is ended."""
    rows = {(x.family, x.name): x for x in known}
    pool = multiprocessing.get_context("spawn").Pool(1)
    for family, names in list_drawn(seed):
        left = FAMILIES[family].number
        for name in (x for x in names if x not in left_out):
            row = rows.get((family, name))
            try:
                row = row or pool.apply_async(measure, (family, name)).get(SECONDS)
            except multiprocessing.TimeoutError:
                pool.terminate()
                pool = multiprocessing.get_context("spawn").Pool(1)
                row = Row(family, name, "slow", seconds=SECONDS)
            if row is not None:
                yield row
                left -= 1
            if not left:
                break
    pool.terminate()


def main(seed: int, *others: int) -> None:
    """Measures, and writes the file; rows that it has already are kept."""
    file = file_of(seed)
    known = read(file).rows if file.exists() else ()
    left_out = {x.name for other in others for x in read(file_of(other)).rows}
    head = {"seed": seed, "versions": {name: version(name) for name in LIBRARIES}}
    found = list[Row]()
    for row in draw(seed, left_out, known):
        found.append(row)
        lines = map(write_line, [*found, *(x for x in known if x not in found)])
        file.write_text("".join([json.dumps(head) + "\n", *lines]), encoding="utf-8")
        sys.stderr.write(f"{row.verdict} {write_line(row)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
