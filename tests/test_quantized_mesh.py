"""Quantized bases on a mesh of devices."""

import devices


def test_on_devices():
    devices.run("quantized_on_devices.py")
