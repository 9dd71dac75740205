"""The paper's tasks: files in, batches for training, the official scores out."""
