"""Quantized bases on a mesh of devices."""

import devices
import pytest


def test_on_devices():
    devices.run("quantized_on_devices.py")


@pytest.mark.slow
def test_the_other_schemes_on_devices():
    devices.run("quantized_on_devices.py", marked="slow")
