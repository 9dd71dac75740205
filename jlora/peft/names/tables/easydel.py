"""A name table for EasyDeL's decoders, whose modules are called as those of `transformers`.

Tested with `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `Gemma3ForCausalLM` of
EasyDeL 0.3.0 on JAX 0.10.2, which it asks not to have, on files of transformers 5.5 and PEFT 0.21.

Of a tied model leave the head out, a leaf that is there and not used:

    used = lambda path, _: "lm_head" not in path
    graph, params, rest = nnx.split(model, nnx.All(nnx.Param, used), ...)

EasyDeL keeps the cosines and sines of rotary embeddings in bfloat16, so that its logits are less
close to those of PyTorch than its weights, which are the same to the bit.
"""

from .transformers import LLAMA

EASYDEL = LLAMA
