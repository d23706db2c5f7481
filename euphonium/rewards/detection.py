"""Objects in a picture by instance segmentation: transformers' Mask2Former."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from euphonium.errors import ConfigError
from euphonium.rewards.frames import as_bytes
from euphonium.rewards.pretrained import PretrainedOptions, device_of, dtype_of, loading, pinned, whole_network

# Best pairs of query and class that are objects at all.
MOST_INSTANCES = 100


@dataclass(frozen=True, eq=False)
class Found:
    """An object.

    Attributes:
        name: its class.
        confidence: of class and outline, in [0, 1].
        box: left, top, right and bottom edge, in pixels.
        mask: bool ``[height, width]``, its outline.
    """

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: Tensor


@lru_cache(maxsize=1)
def _network_class() -> Any:
    """The published ``Mask2FormerForUniversalSegmentation`` without its loss, which takes a further library."""
    from transformers import Mask2FormerModel
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerPreTrainedModel

    class Segmenter(Mask2FormerPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            """Class logits ``[batch, queries, classes + 1]`` and outlines ``[batch, queries, h, w]``."""
            found = self.model(pixel_values=pixels, output_hidden_states=True, return_dict=True)
            last = found.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(last), found.masks_queries_logits[-1]

    return Segmenter


class InstanceDetector:
    """A Mask2Former for instances, with its image processor."""

    def __init__(self, options: PretrainedOptions) -> None:
        """Loads the network.

        Raises:
            ConfigError: weights that are missing, not pinned or of another architecture; names the option.
        """
        source = pinned(options.weights, options.revision)
        from transformers import AutoConfig, Mask2FormerImageProcessorPil

        self._device = device_of(options.device)
        with loading("weights", options.weights):
            kind = AutoConfig.from_pretrained(**source).model_type
            if kind != "mask2former":
                raise ConfigError(f"option weights: {options.weights!r} is a {kind}, not a mask2former; give one")
            self._processor = Mask2FormerImageProcessorPil.from_pretrained(**source)
            network = whole_network(_network_class(), **source, dtype=dtype_of(options.dtype))
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._labels: dict[int, str] = {int(n): name for n, name in network.config.id2label.items()}
        self.names = frozenset(self._labels.values())

    @torch.inference_mode()
    def find(self, picture: Tensor) -> list[Found]:
        """Objects in a picture ``[3, height, width]`` in [0, 1], the surest first."""
        inputs = self._processor(images=[as_bytes(picture[None])[0]], return_tensors="pt")
        dtype = next(self._network.parameters()).dtype
        logits, outlines = self._network(inputs["pixel_values"].to(self._device, dtype))
        whole = functional.interpolate(outlines.float(), picture.shape[-2:], mode="bilinear", align_corners=False)
        return self._instances(logits[0].float(), whole[0])

    def _instances(self, logits: Tensor, outlines: Tensor) -> list[Found]:
        """Objects from class logits ``[queries, classes + 1]`` and outlines ``[queries, height, width]``.

        A query may be an object of several classes. Its confidence is the class's probability times the mean
        probability of the pixels inside of its outline.
        """
        classes = logits.shape[1] - 1
        scores = logits.softmax(dim=1)[:, :-1].flatten()
        best, places = scores.topk(min(MOST_INSTANCES, len(scores)))
        found = []
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, classes)
            mask = outlines[query] > 0
            if not bool(mask.any()):
                continue
            sure = float(outlines[query].sigmoid()[mask].mean())
            rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.append(Found(self._labels[label], score * sure, box, mask))
        return sorted(found, key=lambda one: -one.confidence)
