"""Tiny random models of diffusers, each with the arguments of a call. Needs PyTorch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch


def wave(*shape: int) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
    "use_linear_projection": True,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}
LAYERS = {"num_layers": 1, "num_single_layers": 1, "in_channels": 8, "joint_attention_dim": 16}
WAN = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 24}
QWEN = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16}
TIME = np.array([3.0, 700.0], np.float32)
NOISY = {"sample": wave(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": wave(2, 5, 16)}
SIZES = {"text_embeds": wave(2, 8), "time_ids": wave(2, 6)}
TOKENS = {"hidden_states": wave(2, 4, 8), "encoder_hidden_states": wave(2, 5, 16)}
GRID = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], np.float32)
GRID4 = np.pad(GRID, ((0, 0), (0, 1)))


class Model(NamedTuple):
    """A model of diffusers.

    Attributes:
        kind: its class.
        fields: the fields of its configuration.
        arrays: the arguments of a call that are traced.
        prefix: its name in a pipeline.
        pipeline: the family whose pipeline reads the files.
        kohya: the prefix under which diffusers reads its own names in kohya's dialect, and a
            pattern of those that it does not read; None if it wants the names of another model.
        static: the other arguments.
    """

    kind: str
    fields: dict[str, Any]
    arrays: dict[str, Any]
    prefix: str
    pipeline: str
    kohya: tuple[str, str] | None = None
    static: Mapping[str, Any] = MappingProxyType({})

    def make(self) -> Any:
        """Makes it, with random values in all parameters, also norms and biases."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.kind)(**self.fields).eval()
        with torch.no_grad():
            for x in model.parameters():
                x += 0.02 * torch.randn_like(x)
        return model


MODELS = {
    "sd15": Model("UNet2DConditionModel", UNET, NOISY, "unet", "StableDiffusion", ("unet", "none")),
    "sdxl": Model(
        "UNet2DConditionModel",
        UNET | SDXL,
        NOISY | {"added_cond_kwargs": SIZES},
        *("unet", "StableDiffusionXL", ("unet", "add_embedding")),
    ),
    "sd3": Model(
        "SD3Transformer2DModel",
        SD3 | HEADS,
        {
            "hidden_states": wave(2, 4, 8, 8),
            "encoder_hidden_states": wave(2, 5, 16),
            "pooled_projections": wave(2, 8),
            "timestep": TIME,
        },
        *("transformer", "SD3"),
    ),
    "flux": Model(
        "FluxTransformer2DModel",
        LAYERS | HEADS | {"pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)},
        TOKENS
        | {"pooled_projections": wave(2, 8), "timestep": TIME / 1000}
        | {"img_ids": GRID, "txt_ids": np.zeros((5, 3), np.float32)},
        *("transformer", "Flux", ("transformer", "ff|norm1|proj_(mlp|out)|single_.*/norm")),
    ),
    "flux2": Model(
        "Flux2Transformer2DModel",
        LAYERS | HEADS | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        TOKENS
        | {"timestep": TIME / 1000, "guidance": np.ones(2, np.float32)}
        | {"img_ids": GRID4, "txt_ids": np.zeros((5, 4), np.float32)},
        *("transformer", "Flux2"),
    ),
    "wan": Model(
        "WanTransformer3DModel",
        WAN | HEADS | {"num_layers": 2, "rope_max_seq_len": 16},
        {
            "hidden_states": wave(2, 4, 2, 8, 8),
            "timestep": TIME,
            "encoder_hidden_states": wave(2, 5, 16),
        },
        *("transformer", "Wan"),
    ),
    "qwen-image": Model(
        "QwenImageTransformer2DModel",
        QWEN | HEADS | {"axes_dims_rope": (4, 4, 8)},
        {
            "hidden_states": wave(2, 4, 16),
            "encoder_hidden_states": wave(2, 5, 16),
            "encoder_hidden_states_mask": np.ones((2, 5), bool),
            "timestep": TIME / 1000,
        },
        *("transformer", "QwenImage", ("unet", "none")),
        static={"img_shapes": [[(1, 2, 2)]] * 2},
    ),
}
