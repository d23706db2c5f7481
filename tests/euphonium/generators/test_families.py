"""Every family against the diffusers pipeline that it adapts, in a tiny configuration of the same classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.rollout import RolloutWorker
from actors.sampler import sample_deterministic
from euphonium.config import NoiseGridConfig, RunConfig
from euphonium.errors import ConfigError
from euphonium.generators.components import open_pipeline
from euphonium.generators.conditioning import expand
from euphonium.generators.generator import Generator
from euphonium.generators.ltx2 import Ltx2
from euphonium.generators.registry import FAMILIES
from euphonium.wire.arrays import as_tensor
from euphonium.wire.records import GroupTask
from tests.euphonium.generators.cases import (
    CASES,
    CPU,
    LIMIT,
    NEGATIVE_PROMPT,
    PROMPTS,
    STEPS,
    Case,
    conditioning_of,
    family_of,
    noise,
    one_a_family,
    pictures,
)
from tests.euphonium.generators.ltx2_pipeline import ltx2_start, ltx2_states
from tests.euphonium.generators.tiny_minimax_h3 import minimax_h3_samples
from tests.euphonium.generators.tiny_pipelines import BUILDERS, Folders

WAN_I2V, HUNYUAN_15_I2V = "WanImageToVideoPipeline", "HunyuanVideo15ImageToVideoPipeline"
QWEN_EDIT = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
ONE_PICTURE = (WAN_I2V, HUNYUAN_15_I2V, *QWEN_EDIT)
PACKED = ("FluxPipeline", "QwenImagePipeline", *QWEN_EDIT)  # their latents, to tokens


def our_samples(family: Generator, conditioning: dict[str, Tensor], start: Tensor) -> Tensor:
    transformer = family.load_transformer(CPU)

    def velocity(x: Tensor, time: float) -> Tensor:
        with torch.no_grad():
            return family.velocity(transformer, x, torch.full((len(x),), time), conditioning)

    return family.finish(
        sample_deterministic(family.ode_table(STEPS, NoiseGridConfig()), velocity, start), conditioning
    )


def their_pipeline(case: Case, folder: Path) -> Any:
    """The diffusers pipeline of a folder; multistep schedulers are made to take single steps on their own levels."""
    import diffusers
    from diffusers import ClassifierFreeGuidance, DDIMScheduler, UniPCMultistepScheduler

    pipeline = open_pipeline(getattr(diffusers, case.pipeline_class), folder)
    pipeline.set_progress_bar_config(disable=True)
    if case.pipeline_class == "StableDiffusionPipeline":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if case.pipeline_class.startswith("Wan"):
        # Of first order and without its corrector, UniPC takes Euler's steps.
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            pipeline.scheduler.config, solver_order=1, disable_corrector=list(range(STEPS))
        )
    if case.pipeline_class.startswith("HunyuanVideo15"):
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=case.cfg_scale)
        pipeline.tokenizer_max_length = LIMIT
        # Its attention mask does not fit a batch of more than one.
        pipeline.vae.enable_slicing()
    return pipeline


def call_of(case: Case, family: Generator, pipeline: Any, output_type: str = "latent") -> dict[str, Any]:
    """Arguments of the pipeline's call for the same noise and prompts."""
    start = noise(family)
    frames, height, width = case.size
    call: dict[str, Any] = {
        "prompt": list(PROMPTS), "height": height, "width": width, "num_inference_steps": STEPS, "latents": start,
        "output_type": output_type,
    }  # fmt: skip
    if frames > 1:
        call["num_frames"] = frames
    else:
        call["latents"] = start.squeeze(2)
    if case.cfg_scale is not None:
        call["negative_prompt"] = [NEGATIVE_PROMPT] * len(PROMPTS)
    if family.takes_image:
        call["image"] = [Image.open(file) for file in pictures(family).values()]
    if case.pipeline_class == "ZImagePipeline":
        # Its scale counts from 0.
        call["guidance_scale"] = case.cfg_scale or 0.0
    elif case.pipeline_class.startswith("QwenImage"):
        call["true_cfg_scale"] = case.cfg_scale or 1.0
    elif case.pipeline_class == "Flux2Pipeline":
        call["guidance_scale"] = case.embedded_guidance
    elif case.embedded_guidance is not None:
        call |= {"guidance_scale": case.embedded_guidance, "true_cfg_scale": case.cfg_scale or 1.0}
    elif not case.pipeline_class.startswith("HunyuanVideo15"):
        call["guidance_scale"] = case.cfg_scale or 1.0
    if not case.pipeline_class.startswith(("StableDiffusionPipeline", "HunyuanVideo15")):
        call["max_sequence_length"] = case.limit
    if case.pipeline_class == "Flux2KleinPipeline" and "negative_prompt" in call:
        # It takes no other text than none.
        call["negative_prompt_embeds"], _ = pipeline.encode_prompt(
            call.pop("negative_prompt"), max_sequence_length=LIMIT
        )
    if case.pipeline_class == HUNYUAN_15_I2V:
        # It takes the size from the picture.
        del call["height"], call["width"]
    if "cfg_scale_2" in case.more:
        call["guidance_scale_2"] = case.more["cfg_scale_2"]
    if case.pipeline_class == "LTXPipeline":
        call["latents"] = pipeline._pack_latents(start)
    if isinstance(family, Ltx2):
        call |= ltx2_start(family, pipeline, start)
    if case.pipeline_class in PACKED:
        call["latents"] = pipeline._pack_latents(start.squeeze(2), *start.shape[:2], *start.shape[3:])
    return call


def normalised(pipeline: Any, latents: Tensor) -> Tensor:
    """The states of FLUX.2's walk, of which its pipeline returns the VAE's own latents."""
    norm = pipeline.vae.bn
    mean, variance = (part.view(1, -1, 1, 1) for part in (norm.running_mean, norm.running_var))
    squares: Tensor = pipeline._patchify_latents(latents)
    return (squares - mean) / torch.sqrt(variance + pipeline.vae.config.batch_norm_eps)


def encoded(call: dict[str, Any], pipeline: Any) -> dict[str, Any]:
    """A call of Wan's image-to-video with encoded texts.

    It cleans texts with ftfy, which is no dependency of this project; the text pipeline encodes them alike without.
    """
    from diffusers import WanPipeline

    parts = {name: pipeline.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    texts = [call["prompt"], call["negative_prompt"]]
    embeds = WanPipeline(**parts).encode_prompt(*texts, max_sequence_length=call["max_sequence_length"])
    named = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
    return {name: value for name, value in call.items() if "prompt" not in name} | named


@contextmanager
def pictures_as_large_as_samples(case: Case) -> Iterator[None]:
    """Qwen-Image-Edit's pipelines in it bring pictures to the size of the samples, not to a million pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    size, dimensions = case.size[:0:-1], plus.calculate_dimensions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit, "calculate_dimensions", lambda area, ratio: (*size, None))
        patch.setattr(plus, "calculate_dimensions", lambda area, ratio: size if area > 1e6 else dimensions(area, ratio))
        yield


def one_by_one(call: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls for one prompt each, of pipelines that take one picture at a time."""
    calls = []
    for i, image in enumerate(call["image"]):
        own = {name: value[i : i + 1] for name, value in call.items() if isinstance(value, list | Tensor)}
        calls.append(call | own | {"image": image})
    return calls


def their_samples(case: Case, family: Generator, output_type: str) -> Tensor:
    """What the diffusers pipeline makes of the same noise and prompts."""
    if case.pipeline_class == "MiniMaxH3ModularPipeline":
        return minimax_h3_samples(family, noise(family), PROMPTS, STEPS, output_type)
    pipeline = their_pipeline(case, family.folder)
    frames, height, width = case.size
    call = call_of(case, family, pipeline, output_type)
    if case.pipeline_class == WAN_I2V:
        call = encoded(call, pipeline)
    calls = one_by_one(call) if case.pipeline_class in ONE_PICTURE else [call]
    with pictures_as_large_as_samples(case):
        made = [pipeline(**arguments) for arguments in calls]
    result: Tensor = torch.cat([part.frames if frames > 1 else part.images for part in made])
    if output_type == "latent" and isinstance(family, Ltx2):
        return ltx2_states(family, pipeline, made[0])
    if output_type == "latent" and case.pipeline_class == "LTXPipeline":
        result = pipeline._unpack_latents(result, *family.latent_shape[1:])
    if output_type == "latent" and case.pipeline_class in PACKED:
        result = pipeline._unpack_latents(result, height, width, pipeline.vae_scale_factor)
    if output_type == "latent" and case.pipeline_class == "Flux2Pipeline":
        result = result.transpose(1, 2).unflatten(2, family.latent_shape[2:])
    if output_type == "latent" and case.pipeline_class == "Flux2KleinPipeline":
        result = normalised(pipeline, result)
    if frames == 1 and result.dim() == 4:
        result = result.unsqueeze(2 if output_type == "latent" else 1)
    return result


def test_every_family_is_tested() -> None:
    assert set(BUILDERS) == {case.tiny for case in CASES.values()}
    assert set(FAMILIES) == {case.pipeline_class for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_pipelines_own(name: str, folders: Folders) -> None:
    family, case = family_of(name, folders), CASES[name]
    start = noise(family)
    ours = our_samples(family, conditioning_of(family), start)
    theirs = their_samples(case, family, "latent")
    # HunyuanVideo's levels are rounded to float32 there and not here, and its network sees 1000 times the difference;
    # so does Z-Image's, whose time is what is left of 1.
    # Classifier-free guidance multiplies what is left of it.
    tolerance = 1e-4 * (case.cfg_scale or 1) if case.pipeline_class.startswith(("Hunyuan", "ZImage")) else 1e-5
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    # Equality would say nothing about inputs that do not matter.
    assert float((ours - start).std()) > 0.1
    swapped = our_samples(family, conditioning_of(family, PROMPTS[::-1]), start)
    assert float((ours - swapped).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"embedded_guidance": 8.0}),
        ("flux2 dev", {"embedded_guidance": 8.0}),
        ("hunyuan", {"embedded_guidance": 1.0}),
        ("sd3", {"cfg_scale": 9.0}),
        ("sd3", {"negative_prompt": "a car"}),
        ("wan", {"cfg_scale": 9.0}),
        ("sd1", {"cfg_scale": 2.0}),
        ("hunyuan 1.5", {"negative_prompt": "a car"}),
    ],
)
def test_guidance_changes_the_samples(name: str, changes: dict[str, Any], folders: Folders) -> None:
    samples = []
    for family in (family_of(name, folders), family_of(name, folders, **changes)):
        samples.append(our_samples(family, conditioning_of(family), noise(family)))
    assert float((samples[0] - samples[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name", ["hunyuan", "hunyuan 1.5", "skyreels", "flux", "sd3", "wan", "ltx without CFG", "minimax h3"]
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_group_of_one_prompt_attends_without_a_mask(
    name: str, prompt: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any mask, even one that hides nothing, forbids flash attention."""
    from torch.nn import functional

    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    one = conditioning_of(family, [prompt])
    masked: list[bool] = []
    attend = functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        # The few tokens of the text are refined with a mask in any case.
        if query.shape[-2] > one["encoder_hidden_states"].shape[1]:
            masked.append(attn_mask is not None)
        return attend(query, key, value, attn_mask, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    start = noise(family, 3)
    with torch.no_grad():
        family.velocity(transformer, start, torch.full((3,), 0.5), expand(one, 3))
    assert masked
    assert not any(masked)


@one_a_family
def test_a_network_returns_one_tensor_whatever_the_number_of_samples(name: str, folders: Folders) -> None:
    """ZeRO-3 remembers how many tensors a module returns, and ranks whose batches differ must remember the same."""
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    outputs: list[Any] = []
    transformer.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    x, conditioning = noise(family), conditioning_of(family)
    with torch.no_grad():
        family.velocity(transformer, x, torch.full((len(x),), 0.5), conditioning)
    assert all(torch.is_tensor(output if torch.is_tensor(output) else output[0]) for output in outputs)
    assert outputs


@one_a_family
def test_decoded_samples_are_the_pipelines_own(name: str, folders: Folders) -> None:
    family, case = family_of(name, folders), CASES[name]
    latents = their_samples(case, family, "latent")
    videos = family.load_decoder(CPU)(latents)
    assert videos.shape == (len(PROMPTS), case.size[0], 3, *case.size[1:])
    assert videos.dtype == torch.float32
    assert 0 <= float(videos.min()) < float(videos.max()) <= 1
    torch.testing.assert_close(videos, their_samples(case, family, "pt"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux", {"frames": 5}, r"model\.frames: FluxPipeline makes images"),
        ("flux", {"height": 18}, r"model\.height: .* multiple of 4"),
        ("flux", {"embedded_guidance": None}, r"model\.embedded_guidance: .* needs the scale"),
        ("flux2 dev", {"cfg_scale": 2.0}, r"model\.cfg_scale: .* takes no negative prompt; leave it out"),
        ("sd3", {"embedded_guidance": 3.5}, r"model\.embedded_guidance: .* takes no guidance scale"),
        ("wan", {"frames": 4}, r"model\.frames: .* 2 at a time; 4 is not among those numbers, 3 is"),
        ("minimax h3", {"frames": 20}, r"model\.frames: .* 20 is not among those numbers, 22 is"),
        ("minimax h3", {"cfg_scale": 2.0}, r"model\.cfg_scale: .* takes no negative prompt; leave it out"),
        ("hunyuan", {"width": 40}, r"model\.width: .* multiple of 16"),
        ("sd1", {"width": 17}, r"model\.width: .* multiple of 2"),
    ],
)
def test_settings_that_a_generator_cannot_take_are_refused(
    name: str, changes: dict[str, Any], message: str, folders: Folders
) -> None:
    with pytest.raises(ConfigError, match=message):
        family_of(name, folders, **changes)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("skyreels", ["model.frames=5", "model.height=32", "model.width=48", "model.embedded_guidance=1"]),
        ("flux", ["sampler.law=flow_grpo", "sampler.shift=3", "model.embedded_guidance=3.5"]),
        ("wan", ["model.frames=5", "model.width=32", "model.cfg_scale=5", "model.dtype=bfloat16"]),
        ("wan i2v", ["model.frames=5", "model.width=32", "model.max_prompt_tokens=512", "model.dtype=bfloat16"]),
        ("wan 2.2 i2v", ["model.frames=5", "model.width=32", "model.cfg_scale=5", f"model.pipeline={WAN_I2V}"]),
        ("minimax h3", ["model.frames=22", "sampler.law=cps", "sampler.shift=null", "sampler.grid=pipeline"]),
        ("sd1", ["sampler.law=ddim", "sampler.shift=null", "sampler.grid=pipeline", "model.cfg_scale=7.5"]),
    ],
)
def test_rollout_actors_draw_groups(
    name: str, overrides: list[str], folders: Folders, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    lines = []
    for i, prompt in enumerate(PROMPTS):
        Image.new("RGB", (40, 40), (80 * i, 100, 20)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{i}.png"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    config = make_config(
        f"model.path={folders(CASES[name].tiny)}", "model.frames=1", "model.height=16", "model.width=24",
        "rewards.process=null", "sampler.guidance=null", f"prompts.train={tmp_path}/prompts.jsonl", *overrides,
    )  # fmt: skip
    worker = RolloutWorker(config, CPU)
    info, final, payload = worker.generate(GroupTask(group_id=0, prompt="a red car", seed=1), None)
    group = config.rollout.group_size
    assert final.shape == (group, *worker.family.latent_shape)
    assert payload.rows.shape == (group, len(worker.table().stochastic_steps))
    sent = [as_tensor(array) for array in payload.conditioning.values()]
    assert all(tensor.shape[0] == 1 and tensor.dtype == worker.family.dtype for tensor in sent)
    assert np.isfinite(payload.log_probs).all()
    assert info.fingerprint == worker.family.step_table(config.sampler).fingerprint()
    evaluated = worker.evaluate(PROMPTS, [1, 2])
    assert evaluated.shape == (2, *worker.family.latent_shape)
    alone = worker.evaluate(PROMPTS[1:], [2])
    np.testing.assert_allclose(evaluated[1:], alone, atol=1e-4 if worker.family.dtype == torch.float32 else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hunyuan", "sd3"])
def test_compiled_blocks_compute_the_same(name: str, folders: Callable[[str], Path]) -> None:
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    conditioning, x, time = conditioning_of(family), noise(family), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        eager = family.velocity(transformer, x, time, conditioning)
        family.compile_blocks(transformer)
        assert any(hasattr(block.forward, "__wrapped__") for block in transformer.modules())
        torch.testing.assert_close(family.velocity(transformer, x, time, conditioning), eager, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_only_the_second_length_of_prompts_compiles_blocks_anew(folders: Callable[[str], Path]) -> None:
    from torch._dynamo.utils import counters

    family = family_of("hunyuan", folders)
    transformer, x, time = family.load_transformer(CPU), noise(family)[:1], torch.tensor([0.3])
    full = {n: torch.ones_like(t[:1]) if "mask" in n else t[:1] for n, t in conditioning_of(family).items()}
    family.compile_blocks(transformer, "eager")
    graphs = []
    for tokens in (6, 5, 4, 3):
        prompt = {name: part if "pooled" in name else part[:, :tokens] for name, part in full.items()}
        counters.clear()
        with torch.no_grad():
            family.velocity(transformer, x, time, prompt)
        graphs.append(counters["stats"]["unique_graphs"])
    assert min(graphs[:2]) > 0
    assert graphs[2:] == [0, 0]


def test_attention_backends_are_chosen_by_name(folders: Callable[[str], Path]) -> None:
    family = family_of("hunyuan", folders, attention_backend="_native_math")
    chosen = {
        module.processor._attention_backend
        for module in family.load_transformer(CPU).modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    }
    assert {str(getattr(backend, "value", backend)) for backend in chosen} == {"_native_math"}
    with pytest.raises(ConfigError, match="knows no '_native_flsh'; did you mean '_native_flash'"):
        family_of("hunyuan", folders, attention_backend="_native_flsh")
    with pytest.raises(ConfigError, match="knows no '0b'; give one of flash, "):
        family_of("hunyuan", folders, attention_backend="0b")
