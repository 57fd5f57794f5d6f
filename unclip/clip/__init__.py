"""CLIP: the frozen model that prompts and pictures are embedded with.

In go texts, or pictures; out come embeddings and, for texts, the states of every token. open_clip has the image tower;
the text tower and the tokeniser are our own, equal to open_clip's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unclip.lazy import exports

if TYPE_CHECKING:
    from unclip.clip.config import ClipConfig
    from unclip.clip.model import MERGES, Clip, Preprocess, build_clip, check_clip, clip_widths
    from unclip.clip.open_clip_folder import PREFIX, files_of, model_config
    from unclip.clip.text import Text, TextBlock, TextTower, foreign_settings, real_tokens
    from unclip.clip.tokenizer import CLIP_VOCABULARY, FIXED, Tokenizer
    from unclip.clip.vision import ImageBlock, foreign_vision_settings, image_tower
else:
    __getattr__ = exports(__name__)
