"""`lora.apply` within a `shard_map`, on a mesh of devices."""

import devices


def test_on_devices():
    devices.run("shards_on_devices.py")
