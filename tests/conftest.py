"""Settings of the test run: the examples' folder, and a compiler in a hurry."""

import gc
import importlib.metadata
import itertools
import os
from collections.abc import Iterator

import messages
import pytest

# With PyTorch, which the default tests do without; what CI's part `benchmarks` runs.
collect_ignore = [
    "fixtures",
    "peft/engines/served_tpu_worker.py",
    "peft/names/tables/pytorch.py",
    "support/peft_families.py",
    "tools",
    "bench",
]
collect_ignore_glob = ["support/torch_*.py"]
# Run by `test_eight_devices.py`; imported, for their doctests, only where there are devices.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore_glob.append("*_on_devices.py")

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


# ----------------------------------------------------- texts of errors: `messages.txt`

rewritten: dict[str, list[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write what the tests that run say into tests/support/messages.txt"
    parser.addoption("--rewrite-messages", action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    messages.is_rewriting = config.getoption("rewrite_messages")


@pytest.hookimpl(tryfirst=True)  # before any test is left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lets PyTorch warn; drops the texts of tests that are gone: each process the same."""
    for module in {x.getparent(pytest.Module) for x in items if isinstance(x, pytest.Function)}:
        if module and hasattr(module.obj, "torch"):  # what PyTorch and its libraries warn of
            module.add_marker(pytest.mark.filterwarnings("default"))
    is_part = any("::" in str(x) for x in config.invocation_params.args)
    tests = () if is_part else (x.nodeid for x in items)
    config.stash[messages.STALE] = stale = messages.find_stale(messages.EXPECTED, tests)
    if messages.is_rewriting and stale:
        found = messages.EXPECTED
        messages.write({key: found[key] for key in found if key not in stale})
        config.stash[messages.STALE] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    messages.said.clear()
    yield
    messages.check_all_said(item.nodeid)
    item.user_properties.append(("messages", dict(messages.said)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects what all processes say; a test that says nothing has no text any more."""
    if report.when == "call" and report.passed:
        rewritten[report.nodeid] = []
        for name, said in report.user_properties:
            if name == "messages":
                rewritten.update(said)  # pyright: ignore


def pytest_sessionfinish(session: pytest.Session) -> None:
    if messages.is_rewriting and not hasattr(session.config, "workerinput"):
        written = messages.read(messages.FILE.read_text(encoding="utf-8"))
        others = {key: written[key] for key in written if key not in rewritten}
        messages.write(others | messages.choose(rewritten, others))
