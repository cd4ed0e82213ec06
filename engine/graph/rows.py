"""Graphs whose runs may be shared by several sessions: proven to treat each picture of a batch by itself."""

from __future__ import annotations

from typing import Final

from .workflow import Prompt, Workflow

#: Nodes of ComfyUI that keep nothing between runs and make each picture of a batch as they make it alone, bit by bit
#: (tests/comfy/test_batches.py runs every one). A picture that is the same for all frames, one of EmptyImage say, may
#: still come out once instead of once a frame; who shares has to count.
ROWS_APART: Final = frozenset(
    {"EmptyImage", "FeatherMask", "ImageBlend", "ImageBlur", "ImageCompositeMasked", "ImageFlip", "ImageInvert",
     "ImageRGBToYUV", "ImageScale", "ImageSharpen", "ImageToMask", "MaskComposite", "MaskToImage", "SolidMask",
     "ThresholdMask"}
)  # fmt: skip


def rows_apart(prompt: Prompt) -> bool:
    """Whether the pictures of a batch that went in from several sessions come out as if each had been alone."""
    workflow = Workflow(prompt)
    ends = {*workflow.image_inputs, *workflow.image_outputs}
    return (
        len(workflow.image_inputs) == 1
        and bool(workflow.image_outputs)
        and all(node_id in ends or node["class_type"] in ROWS_APART for node_id, node in prompt.items())
    )
