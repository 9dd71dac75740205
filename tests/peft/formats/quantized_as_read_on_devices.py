"""Weights that are quantized while they are read: their bits, and the memory that this takes.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import collections
import contextlib
import math
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, mesh_of, on
from safetensors.numpy import load_file
from small import some

import jlora
from jlora import checkpoint, peft
from tests.peft.formats import test_base_files as base_files

LAYERS, ROWS, COLUMNS = 24, 256, 512
FORMATS = {"floats": base_files.floats} | {
    name: base_files.FORMATS[name] for name in ("fp8", "nf4", "bitsandbytes, 8 bits")
}
SCHEMES = {"NF4": jlora.NF4("up"), "Int8": jlora.Int8("up")}
PLACES = {"one": None, "mesh": AxisType.Auto, "explicit mesh": AxisType.Explicit}


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, tmp_path_factory):
    """A checkpoint of layers of one format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_files, "ROWS", ROWS)
        patch.setattr(base_files, "COLUMNS", COLUMNS)
        files = {f"h.{i}.up": FORMATS[request.param](seed=i) for i in range(LAYERS)}
        folder = base_files.write(tmp_path_factory.mktemp(request.param) / "base", files)
    if request.param == "floats":
        checkpoint.export(folder.parent / "orbax", of_folder(folder, shapes(None)))
    return folder


def shapes(mesh):
    """The tree of parameters, without a mesh or sharded on it."""
    tree = base_files.like(jnp.bfloat16, shape=(LAYERS, COLUMNS, ROWS))
    tree["norm"]["scale"] = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    if mesh is None:
        return tree
    specs = {"layers": {"up": {"kernel": P(None, "fsdp", "tensor")}}, "norm": {"scale": P("fsdp")}}
    return jax.tree.map(lambda x, place: x.update(sharding=place), tree, on(mesh, specs))


def scope(kind):
    """A mesh and its scope; without a mesh a single device, which is not that of the host."""
    if kind is None:
        return None, jax.default_device(jax.devices()[1])
    mesh = mesh_of(kind)
    return mesh, jax.set_mesh(mesh)


def quantized(tree, scheme):
    """As it is quantized once it is loaded; codes that are so already stay."""
    kernel = tree["layers"]["up"]["kernel"]
    if isinstance(kernel, jlora.Quantized):
        if kernel.scheme == jlora.quantize({"up": jnp.ones(kernel.shape)}, scheme)["up"].scheme:
            return tree
        tree = jlora.dequantize(tree)
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 3 else x, tree)
    return jlora.quantize(tree, scheme)


def of_folder(folder, like):
    """By the files themselves."""
    return peft.load_base(folder, like, base_files.NAMES)


def of_tensors(folder, like):
    """By tensors in memory."""
    return peft.from_tensors(load_file(folder / "model.safetensors"), like, base_files.NAMES)


def of_orbax(folder, like):
    """By a checkpoint of Orbax."""
    return checkpoint.base_values(folder.parent / "orbax", like=like)


def reads(folder):
    """The functions that read these values."""
    return [of_folder, *[of_tensors, of_orbax] * folder.parent.name.startswith("floats")]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scheme", some(SCHEMES, "NF4"))
def test_bits(folder, scheme, place):
    """They are those of a tree that is loaded, and then quantized on one device."""
    expected = quantized(of_folder(folder, shapes(None)), SCHEMES[scheme])
    mesh, inside = scope(PLACES[place])
    with inside:
        like = jlora.quantize(shapes(mesh), SCHEMES[scheme])
        for read in reads(folder):
            found = read(folder, like)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
            kernel, wanted = (tree["layers"]["up"]["kernel"] for tree in (found, like))
            if mesh is not None:
                assert_lies(kernel.data, wanted.data)
                assert_lies(kernel.scale, wanted.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_of_one_matrix(scheme):
    """The same without a stack, where some arrays of a quantized weight have no axes."""
    w = np.linspace(-1, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    tree = {"up": {"kernel": jnp.asarray(w.T)}}
    like = jlora.quantize(jax.eval_shape(lambda: tree), SCHEMES[scheme])
    names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
    found = peft.from_tensors({"up.weight": w}, like, names)
    jax.tree.map(np.testing.assert_array_equal, found, jlora.quantize(tree, SCHEMES[scheme]))


# ----------------------------------------------------------------------------------------- memory


class Peaks(collections.Counter):
    """The most bytes of JAX's arrays on each device, and of NumPy's, at any return of jlora's."""

    def note(self, arrays=None):
        """Looks at arrays, by default at all."""
        now = collections.Counter()
        for x in jax.live_arrays() if arrays is None else arrays:
            shard = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            now.update({device.id: shard for device in x.sharding.device_set})
        for device, n in now.items():
            self[device] = max(self[device], n)

    def __call__(self, frame, event, _):
        """Notes them at a return, for `sys.setprofile`."""
        if event == "return" and "/jlora/" in frame.f_code.co_filename:
            self.note()


@contextlib.contextmanager
def measured():
    """Yields the peaks while something runs."""
    start, peaks = Peaks(), Peaks()
    start.note()
    tracemalloc.start()
    sys.setprofile(peaks)
    try:
        yield peaks
    finally:
        sys.setprofile(None)
        peaks["NumPy"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        peaks.note()
        for device, n in start.items():
            peaks[device] -= n


@pytest.mark.parametrize("place", PLACES)
def test_memory(folder, place):
    """A device never has more than its part of the result, the host the codes and few tensors."""
    for read in reads(folder):
        mesh, inside = scope(PLACES[place])
        with inside:
            like = jlora.quantize(shapes(mesh), SCHEMES["NF4"])
            read(folder, like)  # so that nothing is traced below
            with measured() as peaks:
                base = read(folder, like)
        parts = Peaks()
        parts.note(jax.tree.leaves(base))
        host = peaks.pop(0, 0) + peaks.pop("NumPy") - parts.pop(0, 0)
        assert peaks == parts
        if read is of_folder:  # Orbax has one tensor of all layers
            codes = base["layers"]["up"]["kernel"].nbytes
            assert host < codes + 6 * ROWS * COLUMNS * np.dtype(np.float32).itemsize
