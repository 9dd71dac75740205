"""Families of models in PyTorch, from which `zoo.py` draws, each model with the inputs of a call.

Needs PyTorch, `transformers` 5, diffusers, timm and torchvision.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import diffusers
import timm
import tiny_models
import torch
import torch_images
import torchvision
import transformers
from torch import nn


class Specimen(NamedTuple):
    """A model, and the arguments of its call: tensors are traced, other values are static."""

    model: Any
    inputs: dict[str, Any]


# ------------------------------------------------------------------------------------ transformers

RECURRENT = "mamba|rwkv|zamba|bamba|jamba|recurrent|xlstm|hybrid|falcon_h1|nemotron_h|lfm|kimi_lin"
IMAGES = {"pixel_values", "pixel_values_videos", "flattened_patches"}
SOUNDS = {"input_values", "input_features", "audio_values"}


def find_family(cls: Any) -> str:
    """Says what a class of `transformers` is, by its arguments and its configuration."""
    names = inspect.signature(cls.forward).parameters.keys()
    kind, fields, has_encoder = _describe(cls.config_class)
    if names & SOUNDS:
        return "audio"
    if names & IMAGES:
        return "vision and language" if "input_ids" in names else "vision"
    if re.search(RECURRENT, kind):
        return "state spaces"
    if "expert" in fields:
        return "experts"
    if has_encoder:
        return "encoders and decoders"
    return "decoders" if "use_cache" in names else "encoders"


@functools.cache
def _describe(kind: Any) -> tuple[str, str, bool]:
    config = tiny_models.make_default(kind)
    return config.model_type, " ".join(config.to_dict()), config.is_encoder_decoder


@functools.cache
def list_by_family() -> dict[str, list[str]]:
    """Lists the classes of `transformers` of each family."""
    found: dict[str, list[str]] = {}
    for cls in tiny_models.list_classes():
        try:
            found.setdefault(find_family(cls), []).append(cls.__name__)
        except Exception:  # without a default configuration
            continue
    return found


def make_transformers(name: str) -> Specimen | None:
    """Makes a model with what it takes; of one that sees, with the tokens of an image."""
    model = tiny_models.make_model(getattr(transformers, name), is_untied=False)
    shake(model)
    for config in (model.config, *tiny_models.list_parts(model.config).values()):
        config.use_cache = False  # where the call does not name it
    inputs = tiny_models.find_inputs(model)
    if inputs is None:
        return None
    return Specimen(model, pair(model, see(model, inputs)))


def pair(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Makes a batch of two, of which the second is padded, if the model takes one."""
    is_tensor = torch.is_tensor
    two = {k: torch.cat([x, x.flip(-1)]) if is_tensor(x) else x for k, x in inputs.items()}
    masks = dict[str, Any]()
    if "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters:
        masks["attention_mask"] = torch.ones_like(two["input_ids"])
        masks["attention_mask"][1, -3:] = 0
    for given in (two | masks, two):
        try:
            if tiny_models.run(model, given):
                return given
        except Exception:  # each model has errors of its own
            continue
    return inputs


def see(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Adds an image to tokens, if the model says how many tokens it takes."""
    fields = [model.config, *tiny_models.list_parts(model.config).values()]
    names = ("image_token_id", "image_token_index")
    token = next((getattr(x, n, None) for n in names for x in fields if hasattr(x, n)), None)
    if token is None or "pixel_values" in inputs:
        return inputs
    size = next((x.image_size for x in fields if type(getattr(x, "image_size", None)) is int), 32)
    image = torch.linspace(-1, 1, 3 * size**2).view(1, 3, size, size)
    n = 1
    for _ in range(2):
        ids = torch.tensor([[3, *[token] * n, 4, 5]])
        both = inputs | {"input_ids": ids, "pixel_values": image}
        try:
            tiny_models.run(model, both)
            return both
        except Exception as e:
            found = re.search(r"features:? (\d+)", str(e))
            n = int(found[1]) if found else n
    return inputs


def shake(model: nn.Module) -> None:
    """Adds noise to what is trained, so that no norm and no bias is trivial."""
    torch.manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x += 0.02 * torch.randn_like(x)


# -------------------------------------------------------------------------- timm and torchvision


def make_timm(name: str) -> Specimen | None:
    """Makes a model of timm, for small images if it takes them.

    Two images: of one, PyTorch's gradients of BatchNorm are wrong where strides are not in order.
    """
    if not _is_small(lambda: timm.create_model(name)):
        return None
    try:
        model, size = timm.create_model(name, img_size=64), 64
    except TypeError:  # it has no such argument
        model = timm.create_model(name)
        is_fixed = model.default_cfg.get("fixed_input_size")
        size = model.default_cfg["input_size"][-1] if is_fixed else 64
    shake(model)
    return Specimen(model.eval(), {"x": draw(2, model.default_cfg["input_size"][0], size, size)})


def make_torchvision(name: str) -> Specimen | None:
    """Makes a model of torchvision, of those that take one image or video."""
    options = {"weights": None, "weights_backbone": None} if _is_detector(name) else {}
    make = functools.partial(torchvision.models.get_model, name, **options)
    if not _is_small(make):
        return None
    model = make().eval()
    shake(model)
    is_fixed = hasattr(model, "image_size")
    size = model.image_size if is_fixed else 96
    is_video = name in torchvision.models.list_models(module=torchvision.models.video)
    shape = (1, 3, 16, 112, 112) if is_video else (2, 3, size, size)
    first = next(iter(inspect.signature(model.forward).parameters))
    return Specimen(model, {first: draw(*shape)})


def _is_detector(name: str) -> bool:
    models = torchvision.models
    return name in models.list_models(module=models.detection) + models.list_models(
        module=models.segmentation
    )


def _is_small(make: Callable[[], Any]) -> bool:
    with torch.device("meta"):
        return sum(x.numel() for x in make().parameters()) < tiny_models.MOST


def draw(*shape: int) -> torch.Tensor:
    """Draws normal numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------------- diffusers

_IMAGE = {"sample": draw(1, 4, 8, 8)}
_VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 4}
_CODER = {"block_out_channels": (8, 16), "layers_per_block": 1}
_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_PATCHES = _HEADS | {"in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2}
_TIME = {"timestep": torch.tensor([7])}
_WORDS = {"encoder_hidden_states": draw(1, 5, 16)}
_TOKENS = {"hidden_states": draw(1, 4, 8, 8)}
_UNET = {key: x for key, x in torch_images.UNET.items() if key != "sample_size"}
# More of them than `torch_images` has: classes, fields of their configurations, and inputs.
DIFFUSERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AutoencoderKL": (_VAE | _CODER | _BLOCKS, {"sample": draw(1, 3, 16, 16)}),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
        {"sample": draw(1, 3, 16, 16)},
    ),
    "AsymmetricAutoencoderKL": (
        _VAE
        | {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16)}
        | {"layers_per_down_block": 1, "layers_per_up_block": 1}
        | _BLOCKS,
        {"sample": draw(1, 3, 16, 16)},
    ),
    "VQModel": (
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_vq_embeddings": 12} | _BLOCKS,
        {"sample": draw(1, 3, 16, 16)},
    ),
    "UNet2DModel": (
        {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
        | {"attention_head_dim": 4, "in_channels": 4, "out_channels": 4}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        _IMAGE | _TIME,
    ),
    "UNet3DConditionModel": (
        _UNET
        | {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8},
        {"sample": draw(1, 4, 2, 8, 8)} | _TIME | _WORDS,
    ),
    "UNetMotionModel": (
        {key: x for key, x in _UNET.items() if key != "attention_head_dim"}
        | {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        | {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")}
        | {"motion_num_attention_heads": 2, "motion_max_seq_length": 4},
        {"sample": draw(1, 4, 2, 8, 8)} | _TIME | _WORDS,
    ),
    "ControlNetModel": (
        {key: x for key, x in _UNET.items() if not key.startswith("up_")}
        | {"conditioning_embedding_out_channels": (8, 16)},
        _IMAGE | _TIME | _WORDS | {"controlnet_cond": draw(1, 3, 16, 16)},
    ),
    "T2IAdapter": (
        {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 8},
        {"x": draw(1, 3, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        _PATCHES | {"num_embeds_ada_norm": 10, "norm_num_groups": 4},
        _TOKENS | _TIME | {"class_labels": torch.tensor([3])},
    ),
    "PixArtTransformer2DModel": (
        _PATCHES | {"cross_attention_dim": 16, "caption_channels": 16},
        _TOKENS
        | _WORDS
        | _TIME
        | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "Transformer2DModel": (
        _HEADS | {"in_channels": 16, "norm_num_groups": 4, "cross_attention_dim": 16},
        {"hidden_states": draw(1, 16, 4, 4)} | _WORDS,
    ),
    "PriorTransformer": (
        _HEADS | {"embedding_dim": 16, "num_embeddings": 5, "additional_embeddings": 4},
        {"hidden_states": draw(1, 16), "proj_embedding": draw(1, 16)} | _WORDS | _TIME,
    ),
    "SanaTransformer2DModel": (
        _PATCHES
        | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
        | {"cross_attention_dim": 16, "caption_channels": 16, "patch_size": 1},
        _TOKENS | _WORDS | _TIME,
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
        | {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
        | {"caption_projection_dim": 16, "pos_embed_max_size": 64},
        _TOKENS | _WORDS | {"timestep": torch.tensor([0.5])},
    ),
    "CogVideoXTransformer3DModel": (
        _HEADS
        | {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16}
        | {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 5},
        {"hidden_states": draw(1, 2, 4, 8, 8)} | _WORDS | _TIME,
    ),
    "LTXVideoTransformer3DModel": (
        _HEADS
        | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16},
        {"hidden_states": draw(1, 8, 8), "encoder_attention_mask": torch.ones(1, 5)}
        | {"num_frames": 2, "height": 2, "width": 2}
        | _WORDS
        | _TIME,
    ),
    "StableAudioDiTModel": (
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2}
        | {"attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_attention_heads": 2}
        | {"cross_attention_dim": 16, "cross_attention_input_dim": 16, "global_states_input_dim": 8}
        | {"time_proj_dim": 8},
        {"hidden_states": draw(1, 4, 8), "global_hidden_states": draw(1, 1, 8)}
        | _WORDS
        | {"timestep": torch.tensor([0.5]), "rotary_embedding": (draw(9, 4), draw(9, 4))},
    ),
    "ChromaTransformer2DModel": (
        torch_images.LAYERS
        | torch_images.HEADS
        | {"axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8}
        | {"approximator_hidden_dim": 16, "approximator_layers": 1},
        {"hidden_states": draw(1, 4, 8), "timestep": torch.tensor([0.5])}
        | {"img_ids": torch.from_numpy(torch_images.GRID), "txt_ids": torch.zeros(5, 3)}
        | _WORDS,
    ),
}


def make_diffusers(name: str) -> Specimen:
    """Makes a model of diffusers."""
    if name in torch_images.MODELS:
        row = torch_images.MODELS[name]
        inputs = torch.utils._pytree.tree_map(torch.as_tensor, row.arrays)
        return Specimen(row.make(), inputs | dict(row.static))
    fields, inputs = DIFFUSERS[name]
    model = getattr(diffusers, name)(**fields).eval()
    shake(model)
    return Specimen(model, inputs)


# ----------------------------------------------------------------------------------- plain modules


class Between(nn.Module):
    """A module between two linear ones; of several outputs, the first goes on."""

    def __init__(self, inner: nn.Module, outputs: int = 16, copies: int = 1) -> None:
        """Takes the sizes of the outputs of the inner module, and how often it wants its input."""
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.inner = inner
        self.last = nn.Linear(outputs, 5)
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes one after the other."""
        h = self.inner(*[self.first(x)] * self.copies)
        return self.last(h[0] if isinstance(h, tuple) else h)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Takes the function."""
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes it."""
        return self.f(x)


def _across(inner: nn.Module) -> nn.Module:
    """Has a module see channels before positions."""
    turn = Lambda(lambda x: x.transpose(1, 2))
    return nn.Sequential(turn, inner, turn)


def _convolve(*layers: nn.Module) -> nn.Module:
    size = nn.Unflatten(-1, (1, 4, 4))
    return nn.Sequential(nn.Flatten(0, 1), size, *layers, nn.Flatten(1))


def _layer(kind: Any, **options: Any) -> nn.Module:
    return kind(16, 2, 24, batch_first=True, **options)


_BATCHED = {"batch_first": True}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "TransformerEncoderLayer": lambda: Between(_layer(nn.TransformerEncoderLayer)),
    "TransformerEncoder": lambda: Between(
        nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, norm_first=True), 2)
    ),
    "TransformerDecoderLayer": lambda: Between(_layer(nn.TransformerDecoderLayer), copies=2),
    "Transformer": lambda: Between(nn.Transformer(16, 2, 1, 1, 24, batch_first=True), copies=2),
    "MultiheadAttention": lambda: Between(nn.MultiheadAttention(16, 2, **_BATCHED), copies=3),
    "MultiheadAttention, other sizes": lambda: Between(
        nn.MultiheadAttention(16, 2, kdim=16, vdim=16, add_bias_kv=True, **_BATCHED), copies=3
    ),
    "LSTM": lambda: Between(nn.LSTM(16, 16, 2, **_BATCHED)),
    "LSTM, both ways": lambda: Between(nn.LSTM(16, 8, bidirectional=True, **_BATCHED)),
    "LSTM, projected": lambda: Between(nn.LSTM(16, 16, proj_size=6, **_BATCHED), 6),
    "GRU": lambda: Between(nn.GRU(16, 16, **_BATCHED)),
    "RNN": lambda: Between(nn.RNN(16, 16, nonlinearity="relu", **_BATCHED)),
    "GRUCell": lambda: Between(nn.Sequential(nn.Flatten(0, 1), nn.GRUCell(16, 16))),
    "LSTMCell": lambda: Between(nn.Sequential(nn.Flatten(0, 1), nn.LSTMCell(16, 16))),
    "Bilinear": lambda: Between(nn.Bilinear(16, 16, 8), 8, copies=2),
    "Conv1d": lambda: Between(_across(nn.Conv1d(16, 16, 3, padding="same", dilation=2))),
    "Conv1d, of groups": lambda: Between(_across(nn.Conv1d(16, 16, 3, padding=1, groups=4))),
    "Conv2d": lambda: Between(
        _convolve(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
    ),
    "Conv2d, reflected": lambda: Between(
        _convolve(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2)), 8
    ),
    "Conv3d": lambda: Between(
        _convolve(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 2, 2)), nn.Hardswish()), 18
    ),
    "ConvTranspose2d": lambda: Between(
        _convolve(nn.ConvTranspose2d(1, 2, 2, 2, output_padding=1), nn.AvgPool2d(3)), 18
    ),
    "ConvTranspose1d": lambda: Between(_across(nn.ConvTranspose1d(16, 16, 3, padding=1))),
    "GroupNorm": lambda: Between(_across(nn.GroupNorm(4, 16))),
    "InstanceNorm1d": lambda: Between(_across(nn.InstanceNorm1d(16, affine=True))),
    "BatchNorm1d": lambda: Between(_across(nn.BatchNorm1d(16))),
    "RMSNorm": lambda: Between(nn.Sequential(nn.RMSNorm(16), nn.SiLU(), nn.LayerNorm(16))),
    "LocalResponseNorm": lambda: Between(nn.LocalResponseNorm(2)),
    "PReLU": lambda: Between(_across(nn.PReLU(16))),
    "GLU": lambda: Between(nn.GLU(), 8),
    "Softmax": lambda: Between(nn.Sequential(nn.LogSoftmax(-1), nn.Softplus(), nn.Softmin(1))),
    "AdaptiveMaxPool1d": lambda: Between(nn.AdaptiveMaxPool1d(4), 4),
    "AdaptiveAvgPool2d": lambda: Between(_convolve(nn.AdaptiveAvgPool2d((2, 3))), 6),
    "LPPool1d": lambda: Between(nn.LPPool1d(2, 2), 8),
    "PixelShuffle": lambda: Between(
        _convolve(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2), nn.PixelUnshuffle(4)), 64
    ),
    "Upsample": lambda: Between(
        _convolve(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)), 64
    ),
    "Upsample, cubic": lambda: Between(_convolve(nn.Upsample(size=6, mode="bicubic")), 36),
    "Unfold": lambda: Between(_convolve(nn.Unfold(2), nn.Fold((4, 4), 2)), 16),
    "CosineSimilarity": lambda: Between(nn.CosineSimilarity(dim=1), 16, copies=2),
    "EmbeddingBag": lambda: nn.Sequential(
        Lambda(lambda x: (x.abs() * 3).long().clamp(max=9)[0]),
        nn.EmbeddingBag(10, 8),
        nn.Linear(8, 4),
    ),
    "spectral_norm": lambda: Between(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))),
    "weight_norm": lambda: Between(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))),
    "orthogonal": lambda: Between(nn.utils.parametrizations.orthogonal(nn.Linear(16, 16))),
    "einsum": lambda: Between(Lambda(lambda x: torch.einsum("bid,bjd->bij", x, x)), 7),
    "fft": lambda: Between(Lambda(lambda x: torch.fft.rfft(x, dim=-1).abs()), 9),
    "cumsum and sort": lambda: Between(Lambda(lambda x: x.cumsum(1).sort(-1).values)),
    "top-k": lambda: Between(Lambda(lambda x: x.topk(4, -1).values), 4),
    "roll and flip": lambda: Between(Lambda(lambda x: x.roll(2, 1).flip(-1))),
    "gather": lambda: Between(Lambda(lambda x: x.gather(-1, x.argsort(-1)))),
    "where": lambda: Between(Lambda(lambda x: torch.where(x > 0, x.exp(), x.sin()).tril())),
    "logcumsumexp": lambda: Between(Lambda(lambda x: x.logcumsumexp(1))),
    "linalg": lambda: Between(
        Lambda(lambda x: torch.linalg.inv(x.mT @ x + 3 * torch.eye(16).to(x))), 16
    ),
}


def make_plain(name: str) -> Specimen:
    """Makes a module of PyTorch alone."""
    model = PLAIN[name]().eval()
    shake(model)
    first = next(iter(inspect.signature(model.forward).parameters))
    return Specimen(model, {first: draw(2, 7, 12)})


# --------------------------------------------------------------------------------------------- all


class Family(NamedTuple):
    """What is drawn from.

    Attributes:
        names: lists the models.
        make: makes one; None if PyTorch computes nothing with what we give it.
        number: how many are drawn.
    """

    names: Callable[[], Sequence[str]]
    make: Callable[[str], Specimen | None]
    number: int


def _list_torchvision() -> list[str]:
    names = torchvision.models.list_models()
    return [x for x in names if not x.startswith("quantized")]


KINDS = (
    "decoders",
    "encoders",
    "encoders and decoders",
    "experts",
    "state spaces",
    "audio",
    "vision",
    "vision and language",
)
OTHERS = {
    "plain modules": Family(lambda: list(PLAIN), make_plain, 20),
    "diffusers": Family(lambda: [*torch_images.MODELS, *DIFFUSERS], make_diffusers, 10),
    "torchvision": Family(_list_torchvision, make_torchvision, 5),
    "timm": Family(timm.list_models, make_timm, 5),
}
FAMILIES = OTHERS | {
    kind: Family(lambda kind=kind: list_by_family()[kind], make_transformers, 10) for kind in KINDS
}


def list_drawn(seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yields the names of each family in the order in which they are drawn."""
    for family, x in FAMILIES.items():
        names = sorted(x.names())
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        yield family, [names[i] for i in order]
