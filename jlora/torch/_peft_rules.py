"""What PEFT does with the modules of a model, by their classes and names."""

import torch  # pyright: ignore[reportMissingImports]

from ..peft.names._leaves import ONE_EXPERT
from ..peft.names._peft import ModuleRules, load_module_rules

CONVOLUTIONS = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d


def find_refused(model: torch.nn.Module) -> dict[str, str]:
    """Finds the modules that PEFT does not adapt as a whole, and says what they are.

    Source: PEFT 0.21, `dispatch_default` and `_ConvNd.update_layer`.
    """
    answer = _answer_of(model)
    has_experts = any(x.endswith(_ends(answer)) for x, _ in model.named_parameters())
    taken = () if has_experts else answer.modules  # else `save` names them as parameters
    found = dict[str, str]()
    for name, module in model.named_modules():
        if not is_adaptable(module):
            found[name] = " with ".join([f"a {type(module).__name__}", *_list_own(module)])
        elif _last(name) in answer.refused:
            found[name] = f"{_last(name)} of a {model.config.model_type}, which PEFT refuses"
        elif _last(name) in taken:
            found[name] = f"a {_last(name)}, which PEFT takes for experts, and none are there"
    return found


def find_bare(model: torch.nn.Module) -> frozenset[str]:
    """Finds the modules of other classes than PEFT adapts, such as routers."""
    return frozenset(name for name, m in model.named_modules() if name and not is_adaptable(m))


def find_linear(model: torch.nn.Module) -> tuple[str, ...]:
    """Finds what PEFT adapts for `target_modules="all-linear"`, without vectors.

    Source: PEFT 0.21, `_maybe_include_all_linear_layers`, and `peft/names/peft.json`.
    """
    modules = dict(model.named_modules())
    head = _head_of(model)
    # Of a matrix with one row or column, A and B would have more numbers than it.
    names = [name for name, x in model.named_parameters() if 1 not in x.shape]
    answer = _answer_of(model)
    experts = _ends(answer)
    linear = {name for name, m in modules.items() if _is_linear(m) and m is not head}
    # PEFT also adapts modules whose names end with one of these.
    targets = {_last(name) for name in linear}.difference(answer.modules) if experts else linear
    refused = find_refused(model)
    reading = {name for name, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)}
    chosen = {
        f"{name}.weight".removeprefix(".")
        for name in modules.keys() - refused.keys()
        if name.rpartition(".")[0] not in reading and not targets.isdisjoint(_list_ends(name))
    }
    return tuple(name for name in names if name in chosen or name.endswith(experts))


def is_adaptable(module: torch.nn.Module) -> bool:
    """Whether PEFT adapts such modules, with one A and one B for the whole weight."""
    if isinstance(module, CONVOLUTIONS):
        return not _list_own(module)
    return _is_linear(module) or isinstance(module, torch.nn.Embedding)


def _list_own(module: torch.nn.Module) -> list[str]:
    """Lists what a convolution has, and PEFT's A of it has not."""
    if not isinstance(module, CONVOLUTIONS):
        return []
    plain = {"groups": 1, "dilation": (1,) * len(module.kernel_size), "padding_mode": "zeros"}
    return [name for name, x in plain.items() if getattr(module, name) != x]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _head_of(model: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the output head of a model of `transformers`, if it has one."""
    is_known = any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
    return model.get_output_embeddings() if is_known else None


def _answer_of(model: torch.nn.Module) -> ModuleRules:
    """Returns the answer; without experts for `transformers` 4, which has them as modules."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    found = load_module_rules().get(kind, ModuleRules())
    is_old = any(ONE_EXPERT.search(f"{name}.") for name, _ in model.named_modules())
    return ModuleRules(found.refused) if is_old else found


def _ends(answer: ModuleRules) -> tuple[str, ...]:
    return tuple(f".{name}" for name in answer.parameters)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _list_ends(name: str) -> set[str]:
    """Lists a name and its endings after a dot."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
