"""Reads hostile folders under an audit hook, in a process of its own, as a hook cannot be removed.

Prints, for each folder, the events that no folder may cause, and all messages.
"""

import contextlib
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from peft_calls import ADAPTERS, BASES, NAMES, command, folders
from peft_files import Folder, edit_metadata, node

import jlora
from jlora import checkpoint

ODD = "a\0b\u202ec\x1b[2Jd\u2028e"  # NUL, a bidirectional mark, an escape sequence, a line's end
STARTS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.system")


# ---------------------------------------------------------------------------------- the folders


def params() -> Any:
    return {"q": {"kernel": np.ones((8, 8), np.float32)}}


def write_json(path: Folder, **fields: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))


def harmless(root: Folder) -> Folder:
    """A folder with a base, an adapter for it, and a checkpoint of Orbax."""
    root.parent.mkdir(exist_ok=True)
    folders(root)
    adapter = {"q": {"kernel": node(NAMES[0], (8, 8))}}
    checkpoint.save(root / "orbax", adapter, (jlora.LoRA("q/kernel", rank=2),), base=params())
    return root


class Bomb:
    """Runs a command as it is unpickled."""

    def __reduce__(self) -> Any:
        """As pickle calls it."""
        return os.system, ("touch bomb",)


def of_config(**fields: Any) -> Callable[[Folder], None]:
    return lambda root: write_json(root / "adapter/adapter_config.json", **fields)


def of_model(**fields: Any) -> Callable[[Folder], None]:
    return lambda root: write_json(root / "base/config.json", **fields)


def rename(text: str) -> Callable[[Folder], None]:
    """Another name in the headers of both safetensors files."""

    def damage(root: Folder) -> None:
        for path in (root / "base/model.safetensors", root / "adapter/adapter_model.safetensors"):
            data = path.read_bytes()
            n = int.from_bytes(data[:8], "little")
            each = re.split(r"\bq\.", data[8 : 8 + n].decode())
            header = f"{json.dumps(text)[1:-1]}.".join(each).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])

    return damage


def pickles(root: Folder) -> None:
    for path in (root / "adapter/adapter_model.bin", root / "base/pytorch_model.bin"):
        path.write_bytes(pickle.dumps(Bomb()))
    (root / "adapter/adapter_model.safetensors").unlink()
    (root / "base/model.safetensors").unlink()


def code(root: Folder) -> None:
    for name in ("evil.py", "modeling_evil.py", "adapter.py", "sitecustomize.py", "re.py"):
        for folder in ("base", "adapter", "orbax"):
            (root / folder / name).write_text("import os; os.system('touch bomb')")
    of_model(auto_map={"AutoModel": "modeling_evil.Evil"})(root)
    auto = {"base_model_class": "Evil", "parent_library": "evil"}
    of_config(auto_mapping=auto, base_model_name_or_path="evil/evil")(root)


def links(root: Folder) -> None:
    outside = root.parent / "outside"
    outside.write_text("{}")
    for path in (root / "adapter/adapter_config.json", root / "base/config.json"):
        path.unlink()
        path.symlink_to(outside)


def index(root: Folder, file: str) -> None:
    base = root / "base"
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    mapped = {"weight_map": {"q.weight": file}}
    (base / "model.safetensors.index.json").write_text(json.dumps(mapped))


def odd_files(root: Folder) -> None:
    for folder in ("base", "adapter", "orbax"):
        (root / folder / ODD.replace("\0", "")).write_text("{}")
    (root / "orbax/jlora/metadata").unlink()


def of_orbax(change: Callable[[Any], Any]) -> Callable[[Folder], None]:
    """Other metadata in Orbax, with the hash that fits them."""
    return lambda root: edit_metadata(root / "orbax", change)


def rule(**fields: Any) -> Callable[[Folder], None]:
    return of_orbax(lambda found: found["rules"][0].update(fields))


FOLDERS: dict[str, Callable[[Folder], Any]] = {
    "pickles": pickles,
    "code": code,
    "links": links,
    "index out of the folder": lambda root: index(root, "../outside.safetensors"),
    "index of odd names": lambda root: index(root, ODD),
    "index of a missing file": lambda root: index(root, "model-2.safetensors"),
    "odd names": rename(ODD),
    "odd marks": rename("a\u202eb"),
    "odd files": odd_files,
    "odd targets": of_config(target_modules=["q", ODD], modules_to_save=[ODD]),
    "odd pattern": of_config(target_modules=f"(?=.*{ODD})"),
    "odd ranks": of_config(rank_pattern={ODD: 2, f"{ODD}*": 2}, alpha_pattern={ODD: 2}),
    "odd type": of_config(peft_type=ODD),
    "odd feature": of_config(**{"loftq_config": {ODD: ODD}, ODD: ODD}),
    "odd base": of_config(base_model_name_or_path=ODD, task_type=ODD, revision=ODD),
    "odd architecture": of_model(architectures=[ODD], model_type=ODD),
    "odd quantization": of_model(quantization_config={"quant_method": ODD}),
    "another address": of_config(base_model_name_or_path="https://example.com/x"),
    "function of a rule": rule(init={"function": "os.system"}),
    "module of a rule": rule(init={"function": "jlora.initializers._split.os.system"}),
    "odd function": rule(init={"function": ODD}),
    "odd rule": rule(rule=ODD),
    "odd pattern of a rule": rule(pattern=ODD),
    "odd node": of_orbax(lambda found: found["adapter"][0].update(node=ODD)),
    "odd path": of_orbax(lambda found: found["adapter"][0].update(path=["q", ODD])),
    "odd base path": of_orbax(lambda found: found["base"][0][0].append(ODD)),
    "odd version": of_orbax(lambda found: found["versions"].update({ODD: ODD})),
    "odd dtype": of_orbax(lambda found: found["base"][0].__setitem__(2, ODD)),
    "odd format": of_orbax(lambda found: found.update(format=ODD)),
}


# ------------------------------------------------------------------------- what is done with them


def operations(root: Folder, good: Folder) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The folder that it reads, its name, and what it does; with good ones beside hostile ones."""
    orbax = root / "orbax"
    out = iter(root / f"out{i}" for i in range(100))
    for name, call in ADAPTERS.items():
        yield "adapter", name, partial(call, good / "base", root / "adapter", next(out))
    for name, call in (BASES | {"inspect base": command("inspect base")}).items():
        yield "base", name, partial(call, root / "base", good / "adapter", next(out))
    yield "orbax", "restore", lambda: checkpoint.restore(orbax)
    yield "orbax", "restore of base", lambda: checkpoint.restore(orbax, base=params())
    yield "orbax", "metadata", lambda: str(checkpoint.read(orbax).rules)
    yield "orbax", "shapes", lambda: checkpoint.base_shapes(orbax)
    yield "orbax", "inspect", partial(command("inspect base"), orbax, orbax, next(out))


def messages(root: Folder, good: Folder) -> Iterator[tuple[str, str]]:
    """What each operation says that reads a folder which is not as the good one."""
    changed = {x for x in ("base", "adapter", "orbax") if contents(root / x) != contents(good / x)}
    for read, name, do in operations(root, good):
        if read not in changed:
            continue
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            try:
                answer = do()
                yield name, answer if isinstance(answer, str) else ""
            except (ValueError, FileNotFoundError, NotImplementedError) as e:
                yield name, str(e)
            yield from ((name, str(x.message)) for x in found)


def contents(folder: Folder) -> dict[str, bytes | None]:
    """Its files, and which of them are links."""
    names = sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    return {str(x.relative_to(folder)): None if x.is_symlink() else x.read_bytes() for x in names}


class Audit:
    """Events that a folder must not cause, while it is open."""

    def __init__(self, root: Folder) -> None:
        """Files may be opened below `root`, and those of Python and its packages."""
        roots = {root, sys.prefix, sys.base_prefix, *sys.path[1:], jlora.__path__[0], "/proc"}
        self.roots = tuple(os.path.realpath(x) + os.sep for x in roots if str(x))
        self.known = {name.partition(".")[0] for name in sys.modules}
        self.events: list[str] = []
        self.is_open = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """As Python calls it."""
        if not self.is_open:
            return
        # A pair of sockets within the process, as of an event loop, leads nowhere.
        if event in STARTS or (event.startswith("socket.") and event != "socket.__new__"):
            self.events.append(f"{event} {args!r:.200}")
        if event == "open" and not isinstance(args[0], int) and not self.may_open(args[0]):
            self.events.append(f"open of {args[0]!r}")

    def may_open(self, path: Any) -> bool:
        """Whether a file lies where one may be opened."""
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or real.startswith(self.roots)

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[str]]:
        """The events from now on, and in the end the modules that are new."""
        self.events, self.is_open = [], True
        try:
            yield self.events
        finally:
            self.is_open = False
            modules = {name.partition(".")[0] for name in sys.modules}
            self.events += [f"import of {name}" for name in sorted(modules - self.known)]
            self.known |= modules


def main() -> None:
    """Prints {folder: {"events": […], "messages": [[operation, text], …]}} for all folders."""
    with tempfile.TemporaryDirectory() as name:
        top = Folder(os.path.realpath(name))
        good = harmless(top / "good")
        # Imports what is imported when first needed.
        for *_, do in operations(shutil.copytree(good, top / "once"), good):
            with contextlib.suppress(ValueError):  # of a base that is inspected
                do()
        shutil.rmtree(top / "once")
        answers = {}
        roots = {x: shutil.copytree(good, top / str(i)) for i, x in enumerate(FOLDERS)}
        audit = Audit(top)
        # That the hook sees anything.
        with audit.listening() as seen:
            subprocess.run([sys.executable, "-c", ""], check=True)
            (top.parent / f"{top.name}.outside").touch()
            importlib.import_module("tabnanny")
        (top.parent / f"{top.name}.outside").unlink()
        answers["the hook itself"] = {"events": list(seen), "messages": []}
        for case, root in roots.items():
            FOLDERS[case](root)
            os.chdir(root / "adapter")
            with audit.listening() as events:
                said = list(messages(root, good))
            bad = [*events, *(f"a command was run in {x}" for x in top.rglob("bomb"))]
            answers[case] = {"events": bad, "messages": said}
        os.chdir("/")
    sys.stdout.write(json.dumps(answers))


if __name__ == "__main__":
    main()
