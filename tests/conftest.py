"""Settings of the test run: the examples' folder, and a compiler in a hurry."""

import gc
import importlib.metadata
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

# With PyTorch, which the default tests do without; what CI's part `benchmarks` runs.
collect_ignore = ["fixtures", "peft_families.py", "tables/pytorch.py", "torch_models.py", "bench"]
# Run by `test_eight_devices.py`; imported, for their doctests, only where there are devices.
collect_ignore_glob = (
    [] if "device_count" in os.environ.get("XLA_FLAGS", "") else ["*_on_devices.py"]
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

# Thousands of small programs, each run once: what compiles fast, not what runs fast. It makes the
# suite three times as fast, and an unknown flag ends the process.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
gc.set_threshold(20_000, 50, 100)  # what JAX traces would be searched again and again
# NumPy's matrices are small here: a second thread would only wait.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported


MODULES = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drops what eight modules compiled: all of it at once would take gigabytes in each worker."""
    yield
    import jax  # not before the flags above are set

    if next(MODULES) % 8 == 0:
        jax.clear_caches()
