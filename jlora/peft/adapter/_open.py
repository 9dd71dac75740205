"""Opens an adapter of any dialect, by what is in its path: nothing after knows dialects."""

import functools
import os
from collections.abc import Collection

from ..._errors import InputError
from ..._folders import to_path
from .._file import parse_text, read_header, read_json, read_tensors
from .._recognized import CONFIG, IMAGE, TENSORS, find_cause, find_image
from .._source import Source
from ._config import LIMIT, leave_out
from ._files import Files
from ._image import FIELDS, decode


def open_adapter(
    path: str | os.PathLike[str],
    argument: str,
    ignore: Collection[str],
    prefix: str | None = None,
    modules: Collection[str] = (),
) -> Files:
    """Opens an adapter in any dialect.

    Args:
        path: PEFT's folder, a file of another dialect, or a folder with `IMAGE`.
        argument: the user's argument with it, for errors.
        ignore: fields of the configuration to leave out.
        prefix: which model's adapter to read; None for that of a single model.
        modules: the modules of the model, which kohya's names are matched to.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, of no or several dialects, or of another method; or if
            jlora knows a field in `ignore`.
    """
    path = to_path(path, argument)
    image = find_image(path)
    if image is None and prefix is not None:
        raise InputError(
            "prefix",
            f"chooses from the models in a file of diffusers or kohya, but {path} has "
            f"no {IMAGE}; got {prefix!r}. Leave it out, or give such a file.",
        )
    beside = [x for x in (CONFIG, TENSORS) if (path / x).exists()]
    if image not in (None, path) and beside:
        why = (
            f"has two adapters: {beside[0]}, and {IMAGE}. Give the file that you mean, or move it."
        )
        raise InputError(argument, f"{path} {why}", path=path)
    source = Source(path if image is None else image.parent, argument)
    fields = read_json(source, CONFIG, LIMIT) if image is None else {}
    name = TENSORS if image is None else image.name
    header = read_header(source, name)
    read = functools.partial(read_tensors, source, header, name=name)
    files = Files(fields, [*header.entries.values()], read, argument)
    if image is not None:
        configs = parse_text(argument, str(image), header.metadata, FIELDS, LIMIT)
        files = decode(files, configs, str(image), prefix, modules)
    cause = find_cause({x.key: x.shape for x in files.tensors})
    return files._replace(fields=leave_out(files.fields, ignore), cause=cause)
