"""Every `*_on_devices.py`, several to a process, as the start of one takes seconds."""

import devices
import pytest

PROCESSES = 3
FILES = sorted(
    str(x.relative_to(devices.TESTS))
    for x in devices.TESTS.rglob("*_on_devices.py")
    if not x.name.startswith("test_")
)


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", range(PROCESSES))
def test_on_devices(part: int, marked: str) -> None:
    """The tests of one file in `PROCESSES`."""
    devices.run(*FILES[part::PROCESSES], marked=marked)
