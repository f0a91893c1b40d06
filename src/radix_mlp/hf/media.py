"""Calls of multimodal classes: which are text alone, and why the others run unfolded."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from radix_mlp.hf.text_tower import is_multimodal

__all__ = ["SETTINGS_OF_MEDIA", "placeholders_of", "reason_of_media", "says_text", "without_axes"]

_MEDIA = ("image", "video", "audio", "vision", "speech", "sound", "img_context", "sound_context")
_PLACEHOLDERS = (*(f"{medium}_token_{kind}" for medium in _MEDIA for kind in ("id", "index")), "image_patch_id")
# what heads hand to their trunk in every call
SETTINGS_OF_MEDIA = {
    "downsample_mode",
    "interpolate_pos_encoding",
    "use_audio_in_video",
    "vision_aspect_ratio",
    "vision_feature_layer",
    "vision_feature_select_strategy",
}
_MEDIA_ARGUMENT = re.compile(r"pixel|patches|image|video|audio|vision|speech|input_(features|values)|encoder_outputs")


def placeholders_of(config: PreTrainedConfig) -> dict[int, str]:
    """Token ids that a model exchanges for features of images, videos or sounds -> their names in the configuration.

    Examples:
        >>> from transformers import Gemma3Config, LlamaConfig
        >>> placeholders_of(LlamaConfig())
        {}
        >>> placeholders_of(Gemma3Config())
        {262144: 'image_token_id'}
    """
    found: dict[int, str] = {}
    for part in _parts(config):
        for name in _PLACEHOLDERS:
            value = getattr(part, name, None)
            if type(value) is int:
                found.setdefault(value, name)
    return found


def says_text(model: PreTrainedModel, name: str, value: object) -> bool:
    """Whether an argument is about no token of a text, so that folding may leave it out.

    Such are types that a processor sets to 0 for text, and settings of how images or sounds are read.
    """
    if name in SETTINGS_OF_MEDIA:
        return True
    if name == "mm_encoder_outputs" and isinstance(value, dict):
        # generation gives it with nothing in it for a text
        return all(features is None for features in value.values())
    # other classes give type 0 a meaning of its own
    is_type = name == "mm_token_type_ids" or (name == "token_type_ids" and is_multimodal(model.config))
    return is_type and isinstance(value, torch.Tensor) and not bool(value.any())


def reason_of_media(name: str) -> str | None:
    """Why a call with this argument is not text alone; None if the argument is of another kind."""
    if name.endswith("token_type_ids"):
        return f"{name} marks tokens that are not text, and only calls of text alone fold"
    if _MEDIA_ARGUMENT.search(name):
        return f"{name} is given, and only calls of text alone fold: equal token ids do not mean equal images or sounds"
    return None


def without_axes(model: PreTrainedModel, positions: torch.Tensor, *, has_mask: bool) -> torch.Tensor | str:
    """Positions `[3, B, T]` or `[4, B, T]` that are the same on each axis, as of text, as `[B, T]`; or why not.

    The first of four axes is the place in the text, by which transformers tells packed sequences apart; three axes
    have none, so that each row is one sequence.
    """
    # how classes that rotate parts of a head by different axes name what makes positions of images
    if not hasattr(model.base_model, "get_rope_index") or len(positions) not in (3, 4):
        return "position_ids are not a [B, T] tensor"
    if bool((positions != positions[:1]).any()):
        return "position_ids differ between their axes, as those of images do, and only calls of text alone fold"
    found = positions[0]
    if len(positions) == 3 and not has_mask and bool((found.diff(dim=-1) != 1).any()):
        return "position_ids [3, B, T] do not count up by one, and there is no attention_mask"
    return found


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
