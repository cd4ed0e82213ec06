"""Which pack brings a node class that this ComfyUI has not: those of ComfyStream's workflows, and well-known ones.

A table of our own, by hand: no list of any registry. A pack is named as its repository ``owner/name`` on GitHub.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

_COMFYSTREAM: Final = "livepeer/comfystream"
_STREAM_PACK: Final = "livepeer/ComfyUI-Stream-Pack"
_TENSORRT: Final = "yondonfu/ComfyUI_TensorRT"
_TORCH_COMPILE: Final = "yondonfu/ComfyUI-Torch-Compile"
_BACKGROUND: Final = "yondonfu/ComfyUI-Background-Edit"
_PORTRAIT: Final = "kijai/ComfyUI-LivePortraitKJ"

#: Patterns as the shell's; first match counts.
PACKS: Final[tuple[tuple[str, str], ...]] = (
    ("PitchShifter", _COMFYSTREAM),
    ("TensorRTLoader", _TENSORRT),
    ("*_TRT_MODEL_CONVERSION", _TENSORRT),
    ("ONNXModelSelector", _TENSORRT),
    ("ONNX_*_EXPORT", _TENSORRT),
    ("DepthAnythingTensorrt", "yuvraj108c/ComfyUI-Depth-Anything-Tensorrt"),
    ("TorchCompileLoad*", _TORCH_COMPILE),
    ("Composite", _BACKGROUND),
    ("GaussianBlur", _BACKGROUND),
    ("BackgroundColor", _BACKGROUND),
    ("FaceMeshNode", _STREAM_PACK),
    ("FeatureBankAttentionProcessor", _STREAM_PACK),
    ("AudioTranscriptionNode", _STREAM_PACK),
    ("SRTGeneratorNode", _STREAM_PACK),
    ("FasterLivePortrait*", "pschroedl/ComfyUI-FasterLivePortrait"),
    ("DownloadAndLoadLivePortraitModels", _PORTRAIT),
    ("LivePortrait*", _PORTRAIT),
    ("Sam2RealtimeSegmentation", "pschroedl/ComfyUI-SAM2-Realtime"),
    ("DownloadAndLoadSAM2RealtimeModel", "pschroedl/ComfyUI-SAM2-Realtime"),
    ("BoundingBoxToCenter", "ad-astra-video/ComfyUI-Florence2-Vision"),
    ("Florence2*", "kijai/ComfyUI-Florence2"),
    ("DownloadAndLoadFlorence2*", "kijai/ComfyUI-Florence2"),
    ("*Sam2*", "kijai/ComfyUI-segment-anything-2"),
    ("*SAM2*", "kijai/ComfyUI-segment-anything-2"),
    ("DepthAnything_V2", "kijai/ComfyUI-DepthAnythingV2"),
    ("DownloadAndLoadDepthAnythingV2Model", "kijai/ComfyUI-DepthAnythingV2"),
    ("*KJ", "kijai/ComfyUI-KJNodes"),
    ("*MaskBatch", "kijai/ComfyUI-KJNodes"),
    ("GrowMaskWithBlur", "kijai/ComfyUI-KJNodes"),
    ("ColorMatch", "kijai/ComfyUI-KJNodes"),
    ("VHS_*", "Kosinkadink/ComfyUI-VideoHelperSuite"),
    ("ADE_*", "Kosinkadink/ComfyUI-AnimateDiff-Evolved"),
    ("ACN_*", "Kosinkadink/ComfyUI-Advanced-ControlNet"),
    ("ControlNetLoaderAdvanced", "Kosinkadink/ComfyUI-Advanced-ControlNet"),
    ("*Preprocessor", "Fannovel16/comfyui_controlnet_aux"),
    ("*Preprocessor_Provider_for_SEGS", "ltdrdata/ComfyUI-Impact-Pack"),
    ("RIFE VFI", "Fannovel16/ComfyUI-Frame-Interpolation"),
    ("*VFI", "Fannovel16/ComfyUI-Frame-Interpolation"),
    ("UltralyticsDetectorProvider", "ltdrdata/ComfyUI-Impact-Subpack"),
    ("Impact*", "ltdrdata/ComfyUI-Impact-Pack"),
    ("*Detailer*", "ltdrdata/ComfyUI-Impact-Pack"),
    ("SAMLoader", "ltdrdata/ComfyUI-Impact-Pack"),
    ("*DetectorSEGS", "ltdrdata/ComfyUI-Impact-Pack"),
    ("IPAdapter*", "cubiq/ComfyUI_IPAdapter_plus"),
    ("*InstantID*", "cubiq/ComfyUI_InstantID"),
    ("*+", "cubiq/ComfyUI_essentials"),
    ("UnetLoaderGGUF*", "city96/ComfyUI-GGUF"),
    ("*CLIPLoaderGGUF", "city96/ComfyUI-GGUF"),
    ("UltimateSDUpscale*", "ssitu/ComfyUI_UltimateSDUpscale"),
    ("ReActor*", "Gourieff/ComfyUI-ReActor"),
    ("LayerMask: *", "chflame163/ComfyUI_LayerStyle"),
    ("LayerUtility: *", "chflame163/ComfyUI_LayerStyle"),
    ("LayerFilter: *", "chflame163/ComfyUI_LayerStyle"),
    ("CR *", "Suzie1/ComfyUI_Comfyroll_CustomNodes"),
    ("Efficient Loader", "jags111/efficiency-nodes-comfyui"),
    ("KSampler (Efficient)", "jags111/efficiency-nodes-comfyui"),
    ("easy *", "yolain/ComfyUI-Easy-Use"),
    ("*|pysssss", "pythongosssss/ComfyUI-Custom-Scripts"),
    ("* (rgthree)", "rgthree/rgthree-comfy"),
    ("Anything Everywhere*", "chrisgoringe/cg-use-everywhere"),
    ("Text Concatenate", "WASasquatch/was-node-suite-comfyui"),
    ("Image Filter Adjustments", "WASasquatch/was-node-suite-comfyui"),
    ("StreamDiffusion*", "jesenzhang/ComfyUI_StreamDiffusion"),
    ("DWPreprocessor", "Fannovel16/comfyui_controlnet_aux"),
)

#: Name their vendor first. They send pictures to somebody else's servers, so the engine does not load them.
API_VENDORS: Final = (
    "Kling", "Luma", "OpenAI", "Recraft", "Runway", "Ideogram", "Pixverse", "Minimax", "Gemini", "Veo", "Vidu",
    "Tripo", "Rodin3D", "Moonvalley", "Pika", "Stability", "ByteDance", "Sora", "Topaz", "FluxPro", "FluxKontextPro",
)  # fmt: skip


def pack_of(class_type: str) -> str:
    """``owner/name`` of the pack's repository; empty when the table does not know it."""
    return next((pack for pattern, pack in PACKS if fnmatchcase(class_type, pattern)), "")


def is_api_node(class_type: str) -> bool:
    """Whether an unknown class is one of ComfyUI's own that call a service on the network."""
    return class_type.startswith(API_VENDORS)
