"""Real sampling code, with weights made here: the plan gives ComfyUI's picture to the last bit, and loads once.

The UNet has one level of the SD1.5 family (25.8 million parameters), which ComfyUI recognises as such; the
autoencoder is taesd's. Loaded weights are random: ComfyUI makes modules without values, so every tensor is filled.
"""

import math

import pytest
import torch

from .lives import Frame, assert_alike, changed, node

pytestmark = pytest.mark.timeout(300)


class Words:
    """A conditioning without a text encoder."""

    CATEGORY = "fakes"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0}), "strength": ("FLOAT", {"default": 1.0})}}

    def run(self, seed, strength):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn(1, 77, 768, generator=generator) * strength, {}]],)


def filled(state):
    """Random values of a size that keeps activations finite, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    for name in sorted(state):
        shape = state[name].shape
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = 1 / math.sqrt(fan_in) if len(shape) > 1 else 0.02
        state[name] = torch.randn(shape, generator=generator) * scale + (len(shape) == 1 and "weight" in name)
    return state


@pytest.fixture
def models(host, tmp_path, monkeypatch):
    """A UNet and a taesd where ComfyUI's loaders look."""
    import comfy.model_management
    import folder_paths
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.taesd import taesd
    from safetensors.torch import save_file

    unet = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[1], channel_mult=(1,),
        num_heads=8, use_spatial_transformer=True, transformer_depth=[1], transformer_depth_output=[1, 1],
        transformer_depth_middle=1, context_dim=768, legacy=False,
    )  # fmt: skip
    save_file(filled(unet.state_dict()), tmp_path / "small_unet.safetensors")
    save_file(filled(taesd.Encoder().state_dict()), tmp_path / "taesd_encoder.safetensors")
    save_file(filled(taesd.Decoder().state_dict()), tmp_path / "taesd_decoder.safetensors")
    for kind in ("diffusion_models", "vae_approx"):
        places = {**folder_paths.folder_names_and_paths, kind: ([str(tmp_path)], {".safetensors"})}
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", places)
    assert not host.add_nodes({"Words": Words})
    # Threads of OpenMP wait for each other in a spin: on two busy cores that takes ten times as long as one thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield host
    torch.set_num_threads(threads)
    comfy.model_management.unload_all_models()


def test_executor_and_plan_give_the_same_picture_and_load_once(models):
    prompt = {
        "live": node("LoadTensor"),
        "unet": node("UNETLoader", unet_name="small_unet.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="taesd"),
        "good": node("Words", seed=1, strength=1.0),
        "bad": node("Words", seed=2, strength=1.0),
        "encode": node("VAEEncode", pixels=["live", 0], vae=["vae", 0]),
        "sampler": node(
            "KSampler", model=["unet", 0], positive=["good", 0], negative=["bad", 0], latent_image=["encode", 0],
            seed=3, steps=1, cfg=1.0, sampler_name="lcm", scheduler="simple", denoise=0.6,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveTensor", images=["decode", 0]),
    }  # fmt: skip
    words = changed(prompt, good={"seed": 5})
    frames = [Frame(0.25, prompt), Frame(0.25), Frame(0.75), Frame(0.75, words), Frame(0.75)]
    records = assert_alike(models, frames, size=32)
    assert [record["failed"] for record in records] == [None] * 5
    live = ["decode", "encode", "live", "sampler", "save"]
    assert [record["ran"] for record in records] == [
        sorted([*live, "bad", "good", "unet", "vae"]), live, live, sorted([*live, "good"]), live,
    ]  # fmt: skip
    pictures = [record["picture"][2] for record in records]
    assert pictures[0] == pictures[1], "one seed, one picture"
    assert pictures[2] != pictures[1], "the frame matters"
    assert pictures[3] != pictures[2], "the words matter, at once"
    assert pictures[4] == pictures[3]
