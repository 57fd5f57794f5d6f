"""Our configurations ↔ the config.json and scheduler_config.json of a diffusers folder.

Reading, every option that could change a number must have the value that our models have; an option that this file has
never heard of must be off. So a folder is either read exactly or refused.
"""

from __future__ import annotations

from typing import Any

from unclip.errors import Refused
from unclip.models import IMAGE_TOKENS, DecoderConfig, PriorConfig, UpsamplerConfig

DIFFUSERS = "0.42.0"
"""The version whose classes these documents are written for, and against which the tests compare."""

Document = dict[str, Any]
PREDICTIONS = {"x0": "sample", "eps": "epsilon"}
SCHEDULER = "UnCLIPScheduler"

_UNET: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "norm_eps": (1e-5,), "mid_block_scale_factor": (1,), "time_embedding_type": ("positional",),
    "attention_type": ("default",), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "resnet_out_scale_factor": (1.0,),
}  # fmt: skip
_UNET_FREE = {
    "sample_size", "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "dropout",
    "down_block_types", "up_block_types", "downsample_padding", "downsample_type", "upsample_type", "out_channels",
    # Options of attention blocks other than the ones below:
    "addition_embed_type_num_heads", "transformer_layers_per_block", "upcast_attention", "use_linear_projection",
    "cross_attention_dim", "resnet_time_scale_shift", "time_embedding_dim",
}  # fmt: skip
_DECODER = _UNET | {
    "in_channels": (3,), "class_embed_type": ("identity",), "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",),
    "resnet_time_scale_shift": ("scale_shift",), "time_embedding_dim": (None,),
}  # fmt: skip
_UPSAMPLER = _UNET | {"in_channels": (6,), "add_attention": (False,), "mid_block_type": ("UNetMidBlock2D",)}
_PRIOR: dict[str, tuple[Any, ...]] = {
    "additional_embeddings": (4,), "added_emb_type": ("prd",), "time_embed_act_fn": ("silu",),
    "encoder_hid_proj_type": ("linear",),
}  # fmt: skip
_PRIOR_FREE = {
    "num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings", "dropout",
    "time_embed_dim", "embedding_proj_dim", "clip_embed_dim",
}  # fmt: skip


def head(name: str) -> Document:
    """What every document of diffusers begins with."""
    return {"_class_name": name, "_diffusers_version": DIFFUSERS}


def prior_document(config: PriorConfig) -> Document:
    """PriorTransformer's config.json."""
    return head("PriorTransformer") | {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embedding,
        "num_embeddings": config.context,
        "additional_embeddings": 4,
        "dropout": config.dropout,
    }


def read_prior(document: Document, scheduler: Document, where: str) -> PriorConfig:
    """The prior of a PriorTransformer's config.json and its scheduler's; raises Refused where it is none of ours."""
    read = _Reader(document, where, _PRIOR, _PRIOR_FREE, defaults={"num_attention_heads": 32, "attention_head_dim": 64,
        "num_layers": 20, "embedding_dim": 768, "num_embeddings": 77})  # fmt: skip
    width = read.number("num_attention_heads") * read.number("attention_head_dim")
    embedding = read.number("embedding_dim")
    read.same("time_embed_dim", width)
    read.same("embedding_proj_dim", embedding)
    read.same("clip_embed_dim", embedding)
    process = _read_scheduler(scheduler, where, "fixed_small_log")
    return PriorConfig(
        embedding=embedding,
        text_width=embedding,
        context=read.number("num_embeddings"),
        width=width,
        depth=read.number("num_layers"),
        heads=read.number("num_attention_heads"),
        dropout=document.get("dropout", 0.0),
        clip_range=process.pop("clip"),
        **process,
    )


def text_proj_document(config: DecoderConfig) -> Document:
    """UnCLIPTextProjModel's config.json."""
    return head("UnCLIPTextProjModel") | {
        "clip_extra_context_tokens": IMAGE_TOKENS,
        "clip_embeddings_dim": config.embedding,
        "time_embed_dim": config.unet.time_width,
        "cross_attention_dim": config.context_width,
    }


def decoder_document(config: DecoderConfig) -> Document:
    """UNet2DConditionModel's config.json."""
    attends = [config.size >> level in config.attention for level in range(len(config.multiples))]
    return head("UNet2DConditionModel") | {
        "sample_size": config.size,
        "in_channels": 3,
        "out_channels": config.unet.out_channels,
        "down_block_types": [_block("Down", attend) for attend in attends],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [_block("Up", attend) for attend in reversed(attends)],
        "block_out_channels": [config.channels * multiple for multiple in config.multiples],
        "layers_per_block": config.depth,
        "cross_attention_dim": config.context_width,
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.groups,
        "dropout": config.dropout,
        "class_embed_type": "identity",
        "resnet_time_scale_shift": "scale_shift",
    }


def read_decoder(
    document: Document, text_proj: Document, scheduler: Document, context: int, where: str
) -> DecoderConfig:
    """The decoder of a UNet2DConditionModel's and an UnCLIPTextProjModel's config.json; context: CLIP's, in tokens."""
    needed = {"class_embed_type", "mid_block_type", "resnet_time_scale_shift"}
    read = _Reader(document, where, _DECODER, _UNET_FREE, needed)
    shape = read.levels("Down", "Up")
    if read.number("out_channels") != 6:
        raise Refused(
            f"{where}: UnCLIPPipeline's decoder has 6 output channels, and this one {document['out_channels']}"
        )
    if not shape["attends"][-1]:
        raise Refused(
            f"{where}: its middle block attends and its lowest level does not; ours attends in both or neither"
        )
    size = read.number("sample_size")
    fixed = {"clip_extra_context_tokens": (IMAGE_TOKENS,)}
    free = {"clip_embeddings_dim", "time_embed_dim", "cross_attention_dim"}
    proj = _Reader(text_proj, "text_proj", fixed, free, defaults={"clip_embeddings_dim": 768})
    for key, expected in (
        ("time_embed_dim", 4 * shape["channels"]),
        ("cross_attention_dim", read.number("cross_attention_dim")),
    ):
        if proj.number(key) != expected:
            raise Refused(f"text_proj says {key} {proj.number(key)}, and the {where} needs {expected}")
    process = _read_scheduler(scheduler, where, "learned_range")
    _clips_at_one(process.pop("clip"), where)
    return DecoderConfig(
        size=size,
        embedding=proj.number("clip_embeddings_dim"),
        text_width=proj.number("clip_embeddings_dim"),
        context=context,
        channels=shape["channels"],
        multiples=shape["multiples"],
        depth=shape["depth"],
        attention=tuple(size >> level for level, attend in enumerate(shape["attends"]) if attend),
        head_channels=read.number("attention_head_dim"),
        context_width=read.number("cross_attention_dim"),
        groups=shape["groups"],
        dropout=document.get("dropout", 0.0),
        learned_range=True,
        **process,
    )


def upsampler_document(config: UpsamplerConfig) -> Document:
    """UNet2DModel's config.json."""
    levels = len(config.multiples)
    return head("UNet2DModel") | {
        "sample_size": config.size,
        "in_channels": 6,
        "out_channels": config.unet.out_channels,
        "down_block_types": [_block("Down", False)] * levels,
        "up_block_types": [_block("Up", False)] * levels,
        "block_out_channels": [config.channels * multiple for multiple in config.multiples],
        "layers_per_block": config.depth,
        "norm_num_groups": config.groups,
        "dropout": config.dropout,
        "add_attention": False,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "time_embedding_dim": config.unet.time_width,
    }


def read_upsampler(first: Document, last: Document, scheduler: Document, low: int, *, two: bool) -> UpsamplerConfig:
    """The upsampler of super_res_first's and super_res_last's config.json.

    low: the decoder's side. two: whether their weights differ.
    """
    where = "super_res_first"
    read = _Reader(first, where, _UPSAMPLER, _UNET_FREE, {"add_attention"})
    other = _Reader(last, "super_res_last", _UPSAMPLER, _UNET_FREE, {"add_attention"})
    shape = read.levels("Down", "Up")
    if any(shape["attends"]):
        raise Refused(f"{where}: our upsamplers have no attention, and this one does")
    out, kind = read.number("out_channels"), first.get("resnet_time_scale_shift", "default")
    time = first.get("time_embedding_dim") or 4 * shape["channels"]
    if shape != other.levels("Down", "Up") or (out, kind, time) != (
        other.number("out_channels"),
        last.get("resnet_time_scale_shift", "default"),
        last.get("time_embedding_dim") or 4 * shape["channels"],
    ):
        raise Refused("super_res_first and super_res_last have different shapes; our upsampler's two networks have one")
    if out not in (3, 6) or kind not in ("default", "scale_shift") or time % shape["channels"]:
        raise Refused(
            f"{where}: out_channels {out}, resnet_time_scale_shift {kind!r} and time_embedding_dim {time} are none "
            "that our upsamplers can have"
        )
    process = _read_scheduler(scheduler, "super_res", "learned_range" if out == 6 else "fixed_small_log")
    _clips_at_one(process.pop("clip"), "super_res")
    return UpsamplerConfig(
        low=low,
        size=read.number("sample_size"),
        channels=shape["channels"],
        multiples=shape["multiples"],
        depth=shape["depth"],
        groups=shape["groups"],
        dropout=first.get("dropout", 0.0),
        learned_range=out == 6,
        scale_shift=kind == "scale_shift",
        time_multiple=time // shape["channels"],
        antialias=True,
        last=two,
        **process,
    )


def scheduler_document(
    config: PriorConfig | DecoderConfig | UpsamplerConfig, clip: float | None, *, learned_range: bool
) -> Document:
    """UnCLIPScheduler's scheduler_config.json; clip: the bound of the predicted x0, None for none."""
    return head(SCHEDULER) | {
        "num_train_timesteps": config.timesteps,
        "variance_type": "learned_range" if learned_range else "fixed_small_log",
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
        "prediction_type": PREDICTIONS[config.prediction],
        "beta_schedule": "squaredcos_cap_v2",
    }


def _read_scheduler(document: Document, where: str, variance: str) -> dict[str, Any]:
    """`prediction`, `schedule`, `timesteps` and `clip`, as our configurations call them."""
    kinds = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction = document.get("prediction_type", "epsilon")
    if document.get("beta_schedule", "squaredcos_cap_v2") != "squaredcos_cap_v2" or prediction not in kinds:
        raise Refused(
            f"the {where}'s scheduler has beta_schedule {document.get('beta_schedule')!r} and prediction_type "
            f"{prediction!r}; {SCHEDULER} knows squaredcos_cap_v2, and {' or '.join(kinds)}"
        )
    if (found := document.get("variance_type", "fixed_small_log")) != variance:
        raise Refused(
            f"the {where}'s scheduler has variance_type {found!r}, and with these outputs it must be {variance!r}"
        )
    return {
        "prediction": kinds[prediction],
        "schedule": "cosine",
        "timesteps": document.get("num_train_timesteps", 1000),
        "clip": float(document.get("clip_sample_range", 1.0)) if document.get("clip_sample", True) else None,
    }


def _clips_at_one(clip: float | None, where: str) -> None:
    if clip != 1.0:
        raise Refused(
            f"the {where}'s scheduler clips x0 at {clip}; pictures lie between -1 and 1, where ours clips them"
        )


def _block(way: str, attends: bool) -> str:
    if attends:
        return f"SimpleCrossAttn{way}Block2D"
    return f"Resnet{'Downsample' if way == 'Down' else 'Upsample'}Block2D"


class _Reader:
    """One config.json under scrutiny."""

    def __init__(
        self,
        document: Document,
        where: str,
        expected: dict[str, tuple[Any, ...]],
        free: set[str],
        needed: set[str] | None = None,
        defaults: Document | None = None,
    ) -> None:
        self.document, self.where = (defaults or {}) | document, where
        if missing := sorted((needed or set()) - set(document)):
            raise Refused(f"{where}/config.json does not say {', '.join(missing)}, and diffusers' default is not ours")
        for key, value in document.items():
            allowed = expected.get(key, (None, False))
            if key in free - set(expected) or key.startswith("_") or value in allowed:
                continue
            wanted = " or ".join(repr(one) for one in allowed)
            raise Refused(
                f"{where}/config.json has {key} = {value!r}, which our models cannot hold; they need {wanted}"
            )

    def number(self, key: str) -> int:
        """A whole number that must be there."""
        value = self.document.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refused(f"{self.where}/config.json has {key} = {value!r}; our models need one whole number")
        return value

    def same(self, key: str, expected: int) -> None:
        """An option that may be absent, and else must say what follows from the others."""
        if self.document.get(key) not in (None, expected):
            raise Refused(
                f"{self.where}/config.json has {key} = {self.document[key]}, and its other widths ask for {expected}"
            )

    def levels(self, down: str, up: str) -> dict[str, Any]:
        """Channels, multiples, depth, groups and which levels attend."""
        widths = self.document.get("block_out_channels")
        downs, ups = self.document.get("down_block_types"), self.document.get("up_block_types")
        if not (isinstance(widths, list) and widths and all(isinstance(one, int) and one > 0 for one in widths)):
            raise Refused(f"{self.where}/config.json has block_out_channels = {widths!r}; it must list whole numbers")
        if any(width % widths[0] for width in widths):
            raise Refused(f"{self.where}: channels of {widths} are no multiples of the first, {widths[0]}")
        kinds = {_block(down, attends): attends for attends in (True, False)}
        if not isinstance(downs, list) or len(downs) != len(widths) or not set(downs) <= set(kinds):
            raise Refused(
                f"{self.where}/config.json has down_block_types = {downs!r}; ours are of {' and '.join(kinds)}"
            )
        attends = [kinds[one] for one in downs]
        if ups != [_block(up, attend) for attend in reversed(attends)]:
            raise Refused(f"{self.where}/config.json has up_block_types = {ups!r}, which do not mirror its way down")
        return {
            "channels": widths[0],
            "multiples": tuple(width // widths[0] for width in widths),
            "depth": self.number("layers_per_block"),
            "groups": self.document.get("norm_num_groups", 32),
            "attends": attends,
        }
