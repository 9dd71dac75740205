"""The paper, reproduced: its tasks, rivals, counts and ablations; see `__main__.py`."""
