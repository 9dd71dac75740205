"""What PEFT does with the modules of a model, by their classes and names."""

import torch  # pyright: ignore[reportMissingImports]

from ..peft.names._leaves import PARTS_OF_EXPERTS

# The last names of modules that PEFT refuses, in models of these types.
OF_MAMBA = ("out_proj", "conv1d")
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
# What PEFT adapts in place of `PARTS_OF_EXPERTS`.
EXPERTS = (".gate_up_proj", ".down_proj", ".gate.weight")


def find_refused(model: torch.nn.Module) -> dict[str, str]:
    """Finds the modules that PEFT does not adapt as a whole, and says what they are.

    Source: PEFT 0.21, `dispatch_default` and `_check_lora_target_modules_mamba`.
    """
    refused = OF_MAMBA if _type_of(model) in MAMBAS else ()
    found = dict[str, str]()
    for name, module in model.named_modules():
        if _last(name) in refused:
            found[name] = f"{_last(name)} of a Mamba, which PEFT refuses"
        elif not is_adaptable(module):
            groups = " with groups" if getattr(module, "groups", 1) != 1 else ""
            found[name] = f"a {type(module).__name__}{groups}"
    return found


def find_bare(model: torch.nn.Module) -> frozenset[str]:
    """Finds the modules of other classes than PEFT adapts, such as routers."""
    return frozenset(name for name, m in model.named_modules() if name and not is_adaptable(m))


def find_linear(model: torch.nn.Module) -> tuple[str, ...]:
    """Finds the parameters that PEFT adapts for `target_modules="all-linear"`.

    Source: PEFT 0.21, `_maybe_include_all_linear_layers` and `_convert_peft_config_moe`.
    """
    modules = dict(model.named_modules())
    head = _head_of(model)
    parts = _find_parts(model)
    linear = {name for name, m in modules.items() if _is_linear(m) and m is not head}
    # PEFT also adapts modules whose names end with one of these.
    targets = {_last(name) for name in linear} - parts if parts else linear
    refused = find_refused(model)
    reading = {name for name, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)}
    chosen = {
        f"{name}.weight".removeprefix(".")
        for name in modules.keys() - refused.keys()
        if name.rpartition(".")[0] not in reading and not targets.isdisjoint(_list_ends(name))
    }
    experts = EXPERTS if parts else ()
    names = (name for name, _ in model.named_parameters())
    return tuple(name for name in names if name in chosen or name.endswith(experts))


def is_adaptable(module: torch.nn.Module) -> bool:
    """Whether PEFT adapts modules of this class, with one A and one B for the whole weight."""
    if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return module.groups == 1
    return _is_linear(module) or isinstance(module, torch.nn.Embedding)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _head_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the output head of a model of `transformers`, if it has one."""
    is_known = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    return model.get_output_embeddings() if is_known else None


def _find_parts(model: torch.nn.Module) -> frozenset[str]:
    """Finds the last names of modules that PEFT takes for parts of experts."""
    if not (kind := _type_of(model)):
        return frozenset()
    try:
        from transformers import conversion_mapping
    except ImportError:  # of `transformers` 4, with which PEFT renames nothing
        return frozenset()
    # PEFT reads this table too, which has no public name.
    converted = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = "mixtral" if kind == "mixtral" else converted.get(kind, "")
    return PARTS_OF_EXPERTS.get(kind, frozenset())


def _type_of(model: torch.nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _list_ends(name: str) -> set[str]:
    """Lists a name and its endings after a dot."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
