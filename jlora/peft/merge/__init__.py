"""A merged checkpoint from a checkpoint and an adapter."""
