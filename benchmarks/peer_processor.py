"""transformers' processor of Qwen2.5-VL for images, in the peers' processes.

The whole processor asks for a video processor, which imports torchvision, whose wheels of the
package index are built for CUDA and do not load beside torch's CPU build. There are no videos here,
so it is left out; images go through transformers' own PIL image processor.
"""

from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class StillProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_processor(folder: Path) -> StillProcessor:
    """Returns the processor of a policy's folder, padding on the left as generation needs."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder, padding_side="left")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return StillProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
