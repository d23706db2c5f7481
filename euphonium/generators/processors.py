"""What opens components whose own classes need torchvision, for parts of them that are not used here.

transformers' processors join a tokenizer with what reads pictures and videos. Where they do not load without
torchvision, a class that does opens the same folder, and makes the same of texts and pictures.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def without_torchvision(name: str) -> Any:
    """The class of transformers that opens a component in the place of the class ``name``; None if that opens itself.

    ``PixtralProcessor`` makes of texts alone what its tokenizer makes of them.
    """
    if name == "PixtralProcessor":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    return _qwen_processor() if name == "Qwen2VLProcessor" else None


@cache
def _qwen_processor() -> Any:
    """``Qwen2VLProcessor`` without its reader of videos."""
    from transformers import Qwen2VLProcessor

    class PictureProcessor(Qwen2VLProcessor):
        # The base takes the parts of a processor from the names of these arguments.
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return PictureProcessor
