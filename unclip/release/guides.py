"""What may guide a release's decoder beside its own condition: a classifier, a noised CLIP.

Both are optional parts of a release. Their guidance comes on top of classifier-free guidance, at the base resolution;
the prior, and so z_i, knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unclip.diffusion import Denoiser, Sampling, Schedule, classifier_guidance, clip_guidance
from unclip.errors import Refused
from unclip.models import Classifier, ClassifierConfig, HalfUNetConfig, NoisedClip

GUIDES = ("classifier", "noised-clip")
"""Components of a release that can be guides."""


@dataclass(frozen=True)
class Guides:
    """A release's guides; None where it has none."""

    classifier: Classifier | None = None
    noised_clip: NoisedClip | None = None

    @property
    def models(self) -> dict[str, Classifier | NoisedClip]:
        """Component of the release → the guide, of those that are there."""
        both = zip(GUIDES, (self.classifier, self.noised_clip), strict=True)
        return {name: model for name, model in both if model is not None}

    def check(self, sampling: Sampling) -> None:
        """Raises Refused where the decoder's settings ask for a guide or a class that is not there."""
        check_asked(sampling, {name: model.config for name, model in self.models.items()})

    def guide(self, denoise: Denoiser, text_embedding: Tensor, sampling: Sampling, schedule: Schedule) -> Denoiser:
        """The decoder's denoiser, guided towards the labels and the text as its settings want it.

        text_embedding: CLIP's of the captions, [b, d]. CLIP guidance is s·exp(logit scale)·∇(f(x_t)·g(c)), as GLIDE's.
        """
        if sampling.labels and self.classifier is not None:
            denoise = classifier_guidance(
                denoise, self.classifier.log_prob(sampling.labels), sampling.label_guidance, schedule
            )
        if sampling.clip_guidance and self.noised_clip is not None:
            scale = sampling.clip_guidance * float(self.noised_clip.scale)
            denoise = clip_guidance(denoise, self.noised_clip, text_embedding, scale, schedule)
        return denoise


def check_asked(sampling: Sampling, guides: Mapping[str, HalfUNetConfig]) -> None:
    """Raises Refused where the decoder's settings ask for a guide or a class that is not there.

    guides: component of the release → its configuration, of those that are there.
    """
    classifier = guides.get("classifier")
    if sampling.labels and not isinstance(classifier, ClassifierConfig):
        raise Refused(
            f"label {next(iter(sampling.labels))!r} needs a classifier that reads noised pictures, and this release "
            "has none. Train one with a recipe's section `classifier_guidance`."
        )
    for label, value in sampling.labels.items():
        assert isinstance(classifier, ClassifierConfig)
        classifier.place(label, value)
    if sampling.clip_guidance and "noised-clip" not in guides:
        raise Refused(
            f"CLIP guidance of {sampling.clip_guidance:g} needs a CLIP that reads noised pictures, and this release "
            "has none. Train one with a recipe's section `noised_clip`."
        )
