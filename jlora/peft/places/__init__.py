"""Where the parameters of a model are stored in a checkpoint.

A file, `transformers.json`, has what `tests/tools/make_places.py` found out about the models of
`transformers` by running them: where their parameters differ from the tensors of a folder, which of
them are one, which are transposed, and which has a row for each label; and its classes by task.

Imports `_errors` and `peft._submodels`.
"""
