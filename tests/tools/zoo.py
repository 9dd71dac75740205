"""Draws models in PyTorch, and measures what `jlora.torch` makes of each against PyTorch and PEFT.

    PYTHONPATH=tests/support python tests/tools/zoo.py SEED [OTHER...]

writes `examples/results/zoo_SEED.jsonl`, without the classes of the files of other seeds. Lines
that the file has already are kept: delete those to be measured again. Needs what `zoo_families.py`
does.
"""

import copy
import functools
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.numpy import load_file
from safetensors.torch import load_model, save_model
from small import randomize
from torch._subclasses import fake_tensor
from zoo_families import FAMILIES, Specimen, list_drawn
from zoo_page import STAGES, Row, file_of, read, write_line

import jlora
from jlora import LoRA, peft
from jlora._adapters._low_rank import matrix_lengths
from jlora.torch._differences import ADAPTED, GRADIENT, Difference, Results, judge

SECONDS = 900  # for a model
RANKS = 1, 4
FAST = os.environ["XLA_FLAGS"]  # compiles faster, and sums in order
LIBRARIES = ("torch", "torchax", "transformers", "peft", "diffusers", "timm", "torchvision", "jax")


# ---------------------------------------------------------------------------------------- measuring


def flatten(outputs: Any) -> dict[str, Any]:
    """Lists outputs in floats by name."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    kinds = (torch.Tensor, jax.Array)
    named = {jax.tree_util.keystr(path): x for path, x in leaves if isinstance(x, kinds)}
    return {k: x for k, x in named.items() if "float" in str(x.dtype) and 0 not in x.shape}


def measure_size(x: Any) -> float:
    """Returns the largest finite entry."""
    return np.abs(x, where=np.isfinite(x), out=np.zeros(np.shape(x))).max(initial=0)


def describe(found: Iterable[Difference]) -> str:
    """Says what differs."""
    return "; ".join(f"different: {x}" for x in list(found)[:3]) or "equal"


def widen(x: torch.Tensor) -> torch.Tensor:
    """Makes floats of 64 bits."""
    return x.double() if x.is_floating_point() else x


class Subject:
    """A model in PyTorch and in JAX; the method of each stage measures it, in order."""

    def __init__(self, specimen: Specimen, folder: pathlib.Path) -> None:
        """Takes a folder for files."""
        self.model, self.inputs = specimen
        self.wide = torch.utils._pytree.tree_map_only(torch.Tensor, widen, self.inputs)
        self.folder = folder
        leaves = {k: jax.tree.leaves(x) for k, x in self.inputs.items()}
        traced = {k for k, x in leaves.items() if x and all(map(torch.is_tensor, x))}
        to_jax = functools.partial(jax.tree.map, lambda x: jnp.asarray(x.numpy()))
        self.arrays = {k: to_jax(x) for k, x in self.inputs.items() if k in traced}
        self.static = {k: x for k, x in self.inputs.items() if k not in traced}
        self.problem: Exception | None = None

    def forward(self) -> str:
        """Compares the outputs with PyTorch's, and the gradients of all parameters."""
        self.params, self.apply = jlora.torch.extract(self.model)
        jax.eval_shape(self._call, self.params, self.arrays)  # a refusal comes before a difference
        call = functools.partial(self.apply, **self.static)
        compare = functools.partial(jlora.torch.compare, self.model, self.params, call)
        try:
            found = compare(**self.arrays)
        except NotImplementedError as e:  # of gradients, if the outputs can be computed
            self.problem = e
            found = compare(**self.arrays, gradients=False)
        return describe(found.found)

    def linear(self) -> str:
        """Compares `all_linear` with the modules that PEFT adapts and its model calls."""
        if self.problem:
            raise self.problem
        self.expected = self._run(self.model)
        sites = jlora.transform(self._call).sites(self.params, self.arrays)
        self.names = jlora.torch.names(sites, self.apply)
        try:
            self.pattern = jlora.torch.all_linear(self.apply, sites)
        except ValueError:  # without linear modules, all that PEFT can hold
            self.pattern = "|".join(x.path for x in self.names if x.kind and not x.refused)
            ours = set[str]()
        else:
            rule = LoRA(self.pattern, rank=1)
            sites = jlora.transform(self._call, rule).sites(self.params, self.arrays)
            ours = {site.path for site in sites if site.is_adapted}
        theirs = self._list_theirs()
        if theirs is None:
            return "PEFT refuses"
        return "equal" if ours == theirs else f"different: {sorted(ours ^ theirs)[:3]}"

    def adapter(self) -> str:
        """Compares the outputs with those of PEFT, which loads our file."""
        self.adapted = [self._adapt(rank) for rank in RANKS]
        return self._judge_adapted(ADAPTED)

    def gradient(self) -> str:
        """Compares the gradients of A and B with PEFT's, by the names of its file."""
        return self._judge_adapted(GRADIENT)

    def merged(self) -> str:
        """Compares the outputs with those of the merged folder, loaded by its own library."""
        has_folder = hasattr(self.model, "save_pretrained")
        (self.folder / "base").mkdir()
        if has_folder:
            self.model.save_pretrained(self.folder / "base")
        else:
            save_model(self.model, self.folder / "base" / "model.safetensors")
        peft.export_merged(
            self.folder / "base", self.folder / f"rank_{RANKS[-1]}", self.folder / "merged"
        )
        if has_folder:
            model = type(self.model).from_pretrained(self.folder / "merged").eval()
            if hasattr(model, "set_experts_implementation"):  # which is in no file
                model.set_experts_implementation(self.model.config._experts_implementation)
        else:
            model = copy.deepcopy(self.model)
            load_model(model, self.folder / "merged" / "model.safetensors")
        ours, theirs = {ADAPTED: self.adapted[-1][0][ADAPTED]}, {ADAPTED: self._run(model)}
        return describe(judge(ours, theirs, lambda: {ADAPTED: self._run(model.double())}))

    def _adapt(self, rank: int) -> tuple[Results, Results, Any]:
        """Returns what an adapter computes in JAX and in PEFT, and in PEFT in float64."""
        sites = jlora.transform(self._call, LoRA(self.pattern, rank=1))
        adapted = [x for x in sites.sites(self.params, self.arrays) if x.is_adapted]
        most = min(n for x in adapted for n in matrix_lengths(x.layout, x.shape))
        lora = jlora.transform(self._call, LoRA(self.pattern, rank=min(rank, most), alpha=2))
        base, values = lora.init(jax.random.key(0), self.params, self.arrays)
        values = randomize(values)

        def weigh(adapter: Any, base: Any, arrays: Any) -> tuple[jax.Array, Any]:
            outputs = lora.apply(base, adapter, arrays)
            return self._weigh(outputs), outputs

        step = jax.jit(jax.value_and_grad(weigh, has_aux=True))
        (_, outputs), grads = step(values, base, self.arrays)
        peft.save(folder := self.folder / f"rank_{rank}", base, values, self.names)
        peft.save(saved := self.folder / f"grads_{rank}", base, grads, self.names)
        grads = load_file(saved / "adapter_model.safetensors")
        grads = {k: x for k, x in grads.items() if ".lora_" in k}  # not adapted heads
        run = functools.partial(self._run_adapted, folder, grads)
        return {ADAPTED: outputs, GRADIENT: grads}, run(False), functools.cache(lambda: run(True))

    def _run_adapted(self, folder: pathlib.Path, names: Iterable[str], is_wide: bool) -> Results:
        """Loads an adapter by PEFT; raises its warning if it loses weights of its own file too."""
        with warnings.catch_warnings(record=True) as caught:
            model = self._load(folder)
        if any("missing adapter keys" in str(x.message) for x in caught):
            model.save_pretrained(self.folder / "own")
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*missing adapter keys")
                self._load(self.folder / "own")
        model = model.double() if is_wide else model
        outputs = flatten(model(**(self.wide if is_wide else self.inputs)))
        loss = self._weigh(outputs)
        if loss.requires_grad:
            loss.backward()
        named = {k.replace(".default", ""): x for k, x in model.named_parameters()}
        grads = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in named.items()}
        return {
            ADAPTED: {k: x.detach().numpy() for k, x in outputs.items()},
            GRADIENT: {k: grads[k].numpy() for k in names},
        }

    def _judge_adapted(self, what: str) -> str:
        each = [judge({what: x[what]}, {what: y[what]}, z) for x, y, z in self.adapted]
        return describe(x for found in each for x in found)

    def _load(self, folder: pathlib.Path) -> Any:
        model = copy.deepcopy(self.model)
        return hf_peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()

    def _run(self, model: Any) -> dict[str, np.ndarray]:
        is_wide = any(x.dtype == torch.float64 for x in model.parameters())
        with torch.no_grad():
            outputs = model(**(self.wide if is_wide else self.inputs))
        return {k: x.numpy() for k, x in flatten(outputs).items()}

    def _call(self, params: Any, arrays: Any) -> dict[str, jax.Array]:
        return flatten(self.apply(params, **arrays, **self.static))

    def _weigh(self, outputs: Mapping[str, Any]) -> Any:
        """Adds up all finite outputs, with weights of either sign."""
        total = 0.0
        for key, x in self.expected.items():
            is_finite = np.isfinite(x).ravel()
            draw = np.random.default_rng(0).standard_normal(x.size)[is_finite]
            weights = (draw / max(measure_size(x), 1e-6)).astype(x.dtype)
            if torch.is_tensor(outputs[key]):
                is_finite, weights = map(torch.as_tensor, (is_finite, weights))
            total += (outputs[key].reshape(-1)[is_finite] * weights).sum()
        return total

    def _list_theirs(self) -> set[str] | None:
        """Lists the parameters whose A and B have gradients in PEFT; None if it refuses them.

        Without those of one row or column, which `all_linear` leaves out.
        """
        config = hf_peft.LoraConfig(r=1, target_modules="all-linear", init_lora_weights=False)
        try:
            model = hf_peft.get_peft_model(copy.deepcopy(self.model), config).eval()
        except ValueError as e:
            return set() if "No modules were targeted" in str(e) else None
        loss = self._weigh(flatten(model(**self.inputs)))
        if loss.requires_grad:
            loss.backward()
        each = model.base_model.model.named_modules()
        adapted = {name: m for name, m in each if isinstance(m, LoraLayer)}
        names = {
            f"{name.replace('.base_layer', '')}.{getattr(m, 'parameter_name', 'weight')}"
            for name, m in adapted.items()
            if m.lora_A["default"].weight.grad is not None
        }
        shapes = {name: x.shape for name, x in self.model.named_parameters()}
        return {name.replace(".", "/") for name in names if 1 not in shapes.get(name, ())}


def measure(family: str, name: str) -> Row | None:
    """Measures a model; None if PyTorch computes nothing with it."""
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
    row = measure_stages(specimen)
    jax.clear_caches()
    return row._replace(family=family, name=name, seconds=round(time.monotonic() - start))


def measure_stages(specimen: Specimen) -> Row:
    """Measures stage by stage; what comes after an error is left open."""
    found = dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(specimen, pathlib.Path(folder))
        for stage in STAGES:
            try:
                found[stage] = getattr(subject, stage)()
            except Exception as e:
                word = explain(e)
                if (stage, word) == ("forward", "refused") and not needs_values(specimen):
                    word = "failed"
                return Row(**found, **{stage: word}, why=f"{type(e).__name__}: {e}")
        return Row(**found)


def explain(e: Exception) -> str:
    """Says whether jlora itself raised an error, or PEFT or what it calls did."""
    files = [pathlib.Path(x.filename) for x in traceback.extract_tb(e.__traceback__)]
    kinds = ValueError | TypeError | NotImplementedError
    if isinstance(e, kinds) and files[-1].is_relative_to(pathlib.Path(jlora.__file__).parent):
        return "refused"
    home = pathlib.Path(hf_peft.__file__).parent
    return "PEFT fails" if any(x.is_relative_to(home) for x in files) else "failed"


def needs_values(specimen: Specimen) -> bool:
    """Whether PyTorch itself must know values of tensors in the call, or draws."""
    model, inputs = copy.deepcopy(specimen.model), specimen.inputs
    before = read_generators()
    with torch.no_grad():
        model(**inputs)
    if before != read_generators():
        return True
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        given = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        try:
            model(**given)
        except (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
        ):
            return True
    return False


def read_generators() -> tuple[Any, ...]:
    """Returns where the generators of PyTorch, NumPy and Python are."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


class Measurer:
    """Measures in a process of its own, and ends it if a model takes too long."""

    def __enter__(self) -> "Measurer":
        """Starts the process."""
        self._pool = multiprocessing.get_context("spawn").Pool(1)
        return self

    def __exit__(self, *error: object) -> None:
        """Ends it."""
        self._pool.terminate()

    def measure(self, family: str, name: str) -> Row | None:
        """Measures; what is wrong, again as XLA computes by default, with errors like PyTorch's."""
        row = self._run(family, name)
        if row is None or row.verdict != "wrong":
            return row
        self._restart("")
        try:
            return self._run(family, name)
        finally:
            self._restart(FAST)

    def _run(self, family: str, name: str) -> Row | None:
        try:
            return self._pool.apply_async(measure, (family, name)).get(SECONDS)
        except multiprocessing.TimeoutError:
            self._restart(os.environ["XLA_FLAGS"])
            return Row(family, name, "slow", seconds=SECONDS)

    def _restart(self, flags: str) -> None:
        self._pool.terminate()
        os.environ["XLA_FLAGS"] = flags
        self._pool = multiprocessing.get_context("spawn").Pool(1)


def draw(seed: int, left_out: Set[str] = frozenset(), known: Sequence[Row] = ()) -> Iterator[Row]:
    """Draws models, and measures those that are not known; one that takes too long is ended."""
    rows = {(x.family, x.name): x for x in known}
    with Measurer() as measurer:
        for family, names in list_drawn(seed):
            left = FAMILIES[family].number
            for name in (x for x in names if x not in left_out):
                row = rows.get((family, name)) or measurer.measure(family, name)
                if row is not None:
                    yield row
                    left -= 1
                if not left:
                    break


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
