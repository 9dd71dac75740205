"""Every `*_on_devices.py`, several to a process, as the start of one takes seconds."""

import devices
import pytest

PROCESSES = 1
FILES = sorted(str(x.relative_to(devices.TESTS)) for x in devices.TESTS.rglob("*_on_devices.py"))


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", range(PROCESSES))
def test_on_eight_devices(part: int, marked: str) -> None:
    """One in `PROCESSES` of the files."""
    devices.run(*FILES[part::PROCESSES], marked=marked)
