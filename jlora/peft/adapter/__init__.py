"""An adapter in PEFT format: its configuration, what it selects, and reading and writing it."""
