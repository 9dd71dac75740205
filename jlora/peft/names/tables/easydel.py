"""The name table for EasyDeL's decoders, whose modules have the names of `transformers`.

Tested with `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM` and `Gemma3ForCausalLM` of
EasyDeL 0.3.0 on JAX 0.10.2, a version that its requirements exclude, with files of transformers 5.5
and PEFT 0.21.

A tied model has a leaf for the head that it does not use. Leave it out:

    used = lambda path, _: "lm_head" not in path
    graph, params, rest = nnx.split(model, nnx.All(nnx.Param, used), ...)

Weights are bit for bit PyTorch's. Logits differ more, as EasyDeL keeps the cosines and sines of
rotary embeddings in bfloat16.
"""

from .transformers import LLAMA

EASYDEL = LLAMA
