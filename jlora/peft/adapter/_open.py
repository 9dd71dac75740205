"""Opens an adapter of any dialect, by what is in its path."""

import os
from collections.abc import Collection

from ..._errors import InputError
from ..._folders import to_path
from .._file import CONFIG, IMAGE, TENSORS, Source, find_image
from ._files import Files, open_files, open_tensors
from ._image import decode


def open_adapter(
    path: str | os.PathLike[str],
    argument: str,
    ignore: Collection[str],
    prefix: str | None,
    modules: Collection[str] = (),
) -> Files:
    """Opens an adapter in any dialect.

    Args:
        path: PEFT's folder, a file of another dialect, or a folder with `IMAGE`.
        argument: the user's argument with it, for errors.
        ignore: fields of the configuration to leave out.
        prefix: which model's adapter to read; None for that of a single model.
        modules: the modules of the model, which kohya's names are matched to.
    """
    path = to_path(path, argument)
    file = find_image(path)
    if file is None:
        if prefix is not None:
            raise InputError(
                "prefix",
                f"chooses from the models in a file of diffusers or kohya, but {path} has "
                f"no {IMAGE}; got {prefix!r}. Leave it out, or give such a file.",
            )
        return open_files(Source(path, argument), ignore)
    if file != path and (found := [x for x in (CONFIG, TENSORS) if (path / x).exists()]):
        why = f"has two adapters: {found[0]}, and {IMAGE}. Give the file that you mean, or move it."
        raise InputError(argument, f"{path} {why}", path=path)
    files = open_tensors(Source(file.parent, argument), file.name)
    return decode(files, str(file), ignore, prefix, modules)
