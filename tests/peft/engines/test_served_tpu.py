"""What tpu-inference, which is vLLM on TPUs, does with adapters and with merged folders.

The engine is the judge, as in `test_served.py`. Here it runs on a CPU, where the worker replaces
what only a TPU has. Needs vllm-tpu and PEFT.
"""

import importlib.util
import pathlib
import types

import pytest

if not importlib.util.find_spec("tpu_inference"):
    pytest.skip("needs tpu-inference", allow_module_level=True)

import jax
import jax.numpy as jnp
from models import llama

import jlora
from jlora import peft
from tests.peft.engines.served_worker import PROMPT, STEPS, Answer
from tests.peft.engines.test_served import (
    IGNORED,
    MIXED,
    OTHERS,
    REFUSED,
    SERVED,
    ask,
    is_close,
    make,
    make_base,
    run,
)

pytestmark = pytest.mark.filterwarnings("default")  # what PEFT and PyTorch warn of is their own
WORKER = pathlib.Path(__file__).with_name("served_tpu_worker.py")
ENGINE = "tpu-inference"
# The devices in this order: those of a CPU have no coordinates.
OPTIONS = {"additional_config": {"sharding": {"sharding_strategy": {"device_indexes": [0]}}}}

VERDICTS: dict[str, dict[str, list[str]]] = {
    "llama": {
        SERVED: [
            *("plain", "all linear", "rsLoRA", "both", "a rank of 5", "k alone", "up alone"),
            *("one layer", "bfloat16", "ours", "ours for vLLM", "ours shared by layers"),
        ],
        REFUSED: [
            *("DoRA", "biases", "a head in full", "a class head", "rows of tokens", "PiSSA"),
            *("a rank of 17", "other names", "larger sizes"),
        ],
        IGNORED: ["another prefix", "a prefix less", "the head alone"],
        OTHERS: [
            *("lm_head", "embed_tokens", "ours with embeddings", "another kind", "another rank"),
            *("too many layers", "smaller sizes"),
        ],
    },
    "qwen2": {SERVED: ["plain", "all linear"], REFUSED: ["lm_head", "embed_tokens"]},
    "phi3": {SERVED: ["fused", "all fused"]},
    "gemma3": {SERVED: ["all linear"], REFUSED: ["lm_head"]},
}


@pytest.mark.parametrize("model", VERDICTS)
def test_verdicts(model: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` gives that of the engine, with models in PyTorch; it has no Phi-3 in JAX."""
    monkeypatch.setenv("MODEL_IMPL_TYPE", "auto" if model == "phi3" else "vllm")
    wanted = {name: verdict for verdict, names in VERDICTS[model].items() for name in names}
    found, said = ask(tmp_path, model, list(wanted), engine=ENGINE, worker=WORKER, **OPTIONS)
    assert found == wanted
    assert said == {name: IGNORED if x == OTHERS else x for name, x in wanted.items()}


@pytest.mark.parametrize(
    ("name", "path"), [("Llama", "flax_nnx"), ("GptOss", "vllm"), ("Qwen3Moe", "vllm")]
)
def test_auto(name: str, path: str) -> None:
    """Which models the engine takes by default, of those that it has in both."""
    from tpu_inference.models.common.model_loader import resolve_model_architecture

    config = types.SimpleNamespace(architectures=[f"{name}ForCausalLM"])
    model = types.SimpleNamespace(hf_config=config)
    assert resolve_model_architecture(types.SimpleNamespace(model_config=model), False) == path


# Why the engine serves no adapter of a base, with `--enable-lora`.
FAILS = {
    ("llama", "auto"): "'NoneType' object has no attribute 'set_active_adapters'",
    ("qwen3-moe", "vllm"): "Monolithic kernels are not supported for Fused MoE LoRA.",
}


@pytest.mark.parametrize(("model", "path"), FAILS)
def test_no_adapters(
    model: str, path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models in JAX end at the first request, and those with experts do not start."""
    monkeypatch.setenv("MODEL_IMPL_TYPE", path)
    base = make_base(model, tmp_path)
    adapter = make(base, tmp_path / "adapters", "plain")
    answers = run(WORKER, base, [adapter], loads=False, **OPTIONS)
    assert FAILS[model, path] in str(answers["plain"])
    notes = peft.check(adapter, ENGINE, base=base).notes
    assert ["LORA_MODULE_PATH" in note for note in notes] == ([True] if path == "vllm" else [])


def answer_in_jax(base: pathlib.Path, folder: pathlib.Path) -> Answer:
    """Greedy tokens with their log-probabilities, with the adapter beside the base."""
    config = llama.read(base)
    model, names = llama.Llama(config, dtype=jnp.float32), llama.names(config)
    variables = peft.load_base(base, llama.shapes(config), names)
    ids = list(PROMPT)
    lora = jlora.transform(model.apply, *MIXED)
    frozen, _ = lora.init(jax.random.key(0), variables, jnp.array([ids]))
    adapter = peft.load(folder, frozen, names)
    logs = []
    for _ in range(STEPS):
        logits = lora.apply(frozen, adapter, jnp.array([ids]))[0, -1]
        ids.append(int(logits.argmax()))
        logs.append(float(jax.nn.log_softmax(logits)[ids[-1]]))
    return {"tokens": ids[len(PROMPT) :], "logs": logs}


@pytest.mark.parametrize("path", ["vllm", "flax_nnx"])
def test_merged(path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in PyTorch and those in JAX answer as JAX with the adapter does."""
    monkeypatch.setenv("MODEL_IMPL_TYPE", path)
    base = make_base("llama", tmp_path)
    adapter = make(base, tmp_path / "adapters", "ours")
    peft.export_merged(base, adapter, tmp_path / "merged")
    answers = run(WORKER, tmp_path / "merged", loads=False, enable_lora=False, **OPTIONS)
    found, wanted = answers[""], answer_in_jax(base, adapter)
    assert isinstance(found, dict) and is_close(found, wanted)
