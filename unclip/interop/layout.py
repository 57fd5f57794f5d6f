"""Our parameters' names ↔ those of diffusers and transformers, one to one.

A name becomes the other side's by substitutions, in order. Braces stand for a tensor of ours that is several of theirs,
stacked along the rows: `attn1.{to_q,to_k,to_v}.weight`. What exists, and in which shape, our own modules say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.errors import Refused

Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """How one module of ours is called, and shaped, on the other side."""

    rules: Rules
    """Regular expression → replacement."""
    leading: tuple[str, ...] = ()
    """Tensors of ours that have leading dimensions of 1 there: `name:count`."""
    transposed: tuple[str, ...] = ()
    """Matrices that are stored transposed there."""

    def names(self, ours: str) -> list[str]:
        """The other side's names for one of ours."""
        for pattern, replacement in self.rules:
            ours = re.sub(pattern, replacement, ours)
        head, brace, rest = ours.partition("{")
        if not brace:
            return [ours]
        parts, _, tail = rest.partition("}")
        return [head + part + tail for part in parts.split(",")]

    def theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under the other side's names."""
        leading = {name: int(count) for name, count in (entry.split(":") for entry in self.leading)}
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            names = self.names(name)
            tensor = tensor.T if name in self.transposed else tensor
            tensor = tensor[(None,) * leading.get(name, 0)]
            out |= dict(zip(names, tensor.chunk(len(names)), strict=True))
        return out

    def ours(self, shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The other side's tensors under our names, float32.

        shapes: our name → shape. where: the folder, for errors. Raises Refused for a tensor that is missing, too many,
        or of another shape than the configuration says.
        """
        out: dict[str, Tensor] = {}
        used: set[str] = set()
        for name, shape in shapes.items():
            names = self.names(name)
            if missing := [one for one in names if one not in state]:
                raise Refused(
                    f"{where} has no tensor {', '.join(missing)}: it is incomplete, or not what its config says"
                )
            used.update(names)
            tensor = torch.cat([state[one].float() for one in names])
            tensor = tensor.T if name in self.transposed else tensor
            if tuple(tensor.shape[tensor.ndim - len(shape) :]) != tuple(shape) or tensor.numel() != shape.numel():
                raise Refused(
                    f"{where}: {', '.join(names)} has the shape {list(tensor.shape)}, and by its config it should hold "
                    f"{list(shape)}"
                )
            out[name] = tensor.reshape(shape).contiguous()
        if extra := sorted(set(state) - used):
            raise Refused(f"{where} holds tensors that its config does not account for: {', '.join(extra[:5])}")
        return out


TIME = r"^time\."
PRIOR = Layout(
    (
        (TIME, "time_embedding."),
        ("^embed_states", "encoder_hidden_states_proj"),
        ("^embed_text", "embedding_proj"),
        ("^embed_image", "proj_in"),
        ("^query", "prd_embedding"),
        ("^positions", "positional_embedding"),
        ("^mean", "clip_mean"),
        ("^std", "clip_std"),
        (r"^out\.", "proj_to_clip_embeddings."),
        (r"^norm\.", "norm_out."),
        (r"^(blocks\.\d+)\.qkv", r"\1.attn1.{to_q,to_k,to_v}"),
        (r"^(blocks\.\d+)\.out", r"\1.attn1.to_out.0"),
        (r"^(blocks\.\d+)\.norm_1", r"\1.norm1"),
        (r"^(blocks\.\d+)\.norm_2", r"\1.norm3"),
        (r"^(blocks\.\d+)\.up", r"\1.ff.net.0.proj"),
        (r"^(blocks\.\d+)\.down", r"\1.ff.net.2"),
        ("^blocks", "transformer_blocks"),
    ),
    leading=("query:2", "positions:1", "mean:1", "std:1"),
)
"""DiffusionPrior without its null text ↔ PriorTransformer."""

TEXT_PROJ = Layout(
    (
        ("^null_image", "learned_classifier_free_guidance_embeddings"),
        ("^image_time", "clip_image_embeddings_project_to_time_embeddings"),
        ("^text_time", "embedding_proj"),
        ("^image_tokens", "clip_extra_context_tokens_proj"),
        (r"^text\.project", "encoder_hidden_states_proj"),
        (r"^text\.norm", "text_encoder_hidden_states_norm"),
    )
)
"""Decoder around its U-Net, statistics folded in ↔ UnCLIPTextProjModel."""

UNET = Layout(
    (
        (TIME, "time_embedding."),
        (r"^mid_1\.", "mid_block.resnets.0."),
        (r"^mid_2\.", "mid_block.resnets.1."),
        (r"^mid_attention\.", "mid_block.attentions.0."),
        (r"^down\.(\d+)\.resample\.", r"down_blocks.\1.downsamplers.0."),
        (r"^up\.(\d+)\.resample\.", r"up_blocks.\1.upsamplers.0."),
        (r"^(down|up)\.(\d+)\.", r"\1_blocks.\2."),
        (r"\.blocks\.", ".resnets."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.qkv\.", r"\1.{to_q,to_k,to_v}."),
        (r"(attentions\.\d+)\.context_kv\.", r"\1.{add_k_proj,add_v_proj}."),
        (r"(attentions\.\d+)\.out\.", r"\1.to_out.0."),
        (r"\.(norm|conv)_([12])\.", r".\1\2."),
        (r"\.time\.", ".time_emb_proj."),
        (r"\.skip\.", ".conv_shortcut."),
        ("^norm_out", "conv_norm_out"),
    )
)
"""UNet ↔ UNet2DConditionModel, and without attention UNet2DModel."""

_TRANSFORMER: Rules = (
    (r"transformer\.resblocks", "encoder.layers"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_", ".self_attn.{q_proj,k_proj,v_proj}."),
    (r"\.attn\.out_proj", ".self_attn.out_proj"),
    (r"\.mlp\.c_fc", ".mlp.fc1"),
    (r"\.mlp\.c_proj", ".mlp.fc2"),
)

CLIP_TEXT = Layout(
    (
        *_TRANSFORMER,
        ("^encoder", "text_model.encoder"),
        ("^token_embedding", "text_model.embeddings.token_embedding"),
        ("^positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("^ln_final", "text_model.final_layer_norm"),
        ("^text_projection", "text_projection.weight"),
    ),
    transposed=("text_projection",),
)
"""open_clip's text side ↔ CLIPTextModelWithProjection."""

CLIP_VISION = Layout(
    (
        *_TRANSFORMER,
        (r"^visual\.encoder", "vision_model.encoder"),
        (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
        (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),
        (r"^visual\.ln_post", "vision_model.post_layernorm"),
        (r"^visual\.proj$", "visual_projection.weight"),
    ),
    transposed=("visual.proj",),
)
"""open_clip's ViT ↔ CLIPVisionModelWithProjection."""
