"""Every family against the diffusers pipeline that it adapts, in a tiny configuration of the same classes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from actors.rollout import RolloutWorker, encode_one
from actors.sampler import sample_deterministic
from euphonium.config import LoraConfig, ModelConfig, RunConfig, SamplerConfig
from euphonium.errors import ConfigError
from euphonium.generators.conditioning import expand, stack_conditionings
from euphonium.generators.generator import Generator
from euphonium.generators.lora import adapter_parameters, add_adapter
from euphonium.generators.registry import FAMILIES, open_generator
from euphonium.rewards.process import ProcessRewardModel
from euphonium.wire.records import GroupTask
from tests.euphonium.generators.tiny_pipelines import BUILDERS, Folders

CPU = torch.device("cpu")
STEPS = 3
PROMPTS = ["a red car", 'a sign "no"']
NEGATIVE_PROMPT = "blurry"
LIMIT = 24
# What FLUX's scheduler makes of 24 tokens: its shift is the exponential of a line through (4, 0.5) and (64, 1.15).
FLUX_SHIFT = math.exp(0.5 + (24 - 4) * (1.15 - 0.5) / (64 - 4))


@dataclass(frozen=True)
class Case:
    """A pipeline, what it is asked for, and the names of its own arguments for guidance."""

    pipeline_class: str
    shift: float
    size: tuple[int, int, int] = (1, 16, 24)
    embedded_guidance: float | None = None
    cfg_scale: float | None = None

    def config(self, folder: Path, **changes: Any) -> ModelConfig:
        frames, height, width = self.size
        fields: dict[str, Any] = {
            "path": str(folder), "frames": frames, "height": height, "width": width, "max_prompt_tokens": LIMIT,
            "embedded_guidance": self.embedded_guidance, "cfg_scale": self.cfg_scale,
            "negative_prompt": NEGATIVE_PROMPT if self.cfg_scale else "",
        }  # fmt: skip
        return ModelConfig(**(fields | changes))


CASES = {
    "flux": Case("FluxPipeline", FLUX_SHIFT, embedded_guidance=3.5),
    "flux with true CFG": Case("FluxPipeline", FLUX_SHIFT, embedded_guidance=3.5, cfg_scale=2.0),
    "sd3": Case("StableDiffusion3Pipeline", 3.0, cfg_scale=4.5),
    "sd3 without CFG": Case("StableDiffusion3Pipeline", 3.0),
    "wan": Case("WanPipeline", 5.0, size=(5, 16, 32), cfg_scale=5.0),
    "sd1": Case("StableDiffusionPipeline", 1.0, cfg_scale=7.5),
    "hunyuan": Case("HunyuanVideoPipeline", 7.0, size=(5, 32, 48), embedded_guidance=6.0),
    "hunyuan with true CFG": Case("HunyuanVideoPipeline", 7.0, size=(5, 32, 48), embedded_guidance=6.0, cfg_scale=2.0),
    "hunyuan 1.5": Case("HunyuanVideo15Pipeline", 5.0, size=(5, 16, 24), cfg_scale=6.0),
    "skyreels": Case(
        "HunyuanSkyreelsImageToVideoPipeline", 7.0, size=(5, 32, 48), embedded_guidance=1.0, cfg_scale=6.0
    ),
}
TRANSFORMERS = ["flux", "sd3", "wan", "hunyuan", "hunyuan 1.5", "skyreels"]
one_a_family = pytest.mark.parametrize("name", [*TRANSFORMERS, "sd1"])
one_a_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


def family_of(name: str, folders: Folders, **changes: Any) -> Generator:
    case = CASES[name]
    return open_generator(case.config(folders(case.pipeline_class), **changes))


def noise(family: Generator, batch: int = len(PROMPTS)) -> Tensor:
    return torch.randn(batch, *family.latent_shape, generator=torch.Generator().manual_seed(0))


def pictures(family: Generator) -> dict[str, Path]:
    """First frames of the prompts, of another size than the videos, beside the pipeline's folder."""
    files = {prompt: family.folder.parent / f"{i}.png" for i, prompt in enumerate(PROMPTS)}
    for i, file in enumerate(files.values()):
        pixels = np.zeros((40, 40, 3), dtype=np.uint8)
        pixels[: 10 + 20 * i, :, i] = 255
        Image.fromarray(pixels).save(file)
    return files


def conditioning_of(family: Generator, prompts: Sequence[str] = PROMPTS) -> dict[str, Tensor]:
    encode = family.prompt_encoder(CPU, pictures(family) if family.takes_image else None)
    return stack_conditionings([encode_one(encode, prompt) for prompt in prompts])


def our_samples(family: Generator, shift: float, conditioning: dict[str, Tensor], start: Tensor) -> Tensor:
    transformer = family.load_transformer(CPU)

    def velocity(x: Tensor, time: float) -> Tensor:
        with torch.no_grad():
            return family.velocity(transformer, x, torch.full((len(x),), time), conditioning)

    return sample_deterministic(family.ode_table(STEPS, shift), velocity, start)


def their_pipeline(case: Case, folder: Path) -> Any:
    """The diffusers pipeline of a folder, made to take the same steps as ours."""
    from diffusers import ClassifierFreeGuidance, DDIMScheduler, DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if case.pipeline_class == "StableDiffusionPipeline":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    if case.pipeline_class == "WanPipeline":
        # The only pipeline that leaves the grid to its scheduler.
        grid = np.linspace(1, 0, STEPS + 1)[:-1]
        pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, sigmas=grid)
    if case.pipeline_class == "HunyuanVideo15Pipeline":
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=case.cfg_scale)
        pipeline.tokenizer_max_length = LIMIT
        # Its attention mask does not fit a batch of more than one.
        pipeline.vae.enable_slicing()
    return pipeline


def their_samples(case: Case, family: Generator, start: Tensor, output_type: str) -> Tensor:
    """What the diffusers pipeline makes of the same noise and prompts."""
    pipeline = their_pipeline(case, family.folder)
    frames, height, width = case.size
    call: dict[str, Any] = {
        "prompt": PROMPTS, "height": height, "width": width, "num_inference_steps": STEPS, "latents": start,
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
    if case.embedded_guidance is not None:
        call |= {"guidance_scale": case.embedded_guidance, "true_cfg_scale": case.cfg_scale or 1.0}
    elif case.pipeline_class != "HunyuanVideo15Pipeline":
        call["guidance_scale"] = case.cfg_scale or 1.0
    if case.pipeline_class not in ("StableDiffusionPipeline", "HunyuanVideo15Pipeline"):
        call["max_sequence_length"] = LIMIT
    if case.pipeline_class == "StableDiffusion3Pipeline":
        call["sigmas"] = np.linspace(1, 0, STEPS + 1)[:-1].tolist()
    if case.pipeline_class == "FluxPipeline":
        call["latents"] = pipeline._pack_latents(start.squeeze(2), *start.shape[:2], *start.shape[3:])
    made = pipeline(**call)
    result: Tensor = made.frames if frames > 1 else made.images
    if output_type == "latent" and case.pipeline_class == "FluxPipeline":
        result = pipeline._unpack_latents(result, height, width, pipeline.vae_scale_factor)
    if frames == 1:
        result = result.unsqueeze(2 if output_type == "latent" else 1)
    return result


def test_every_family_is_tested() -> None:
    assert set(FAMILIES) == set(BUILDERS) == {case.pipeline_class for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_pipelines_own(name: str, folders: Folders) -> None:
    family, case = family_of(name, folders), CASES[name]
    start = noise(family)
    ours = our_samples(family, case.shift, conditioning_of(family), start)
    theirs = their_samples(case, family, start, "latent")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # Equality would say nothing about inputs that do not matter.
    assert float((ours - start).std()) > 0.1
    swapped = our_samples(family, case.shift, conditioning_of(family, PROMPTS[::-1]), start)
    assert float((ours - swapped).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"embedded_guidance": 8.0}),
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
        samples.append(our_samples(family, CASES[name].shift, conditioning_of(family), noise(family)))
    assert float((samples[0] - samples[1]).abs().max()) > 1e-3


@one_a_family
def test_decoded_samples_are_the_pipelines_own(name: str, folders: Folders) -> None:
    family, case = family_of(name, folders), CASES[name]
    start = noise(family)
    latents = their_samples(case, family, start, "latent")
    videos = family.load_decoder(CPU)(latents)
    assert videos.shape == (len(PROMPTS), case.size[0], 3, *case.size[1:])
    assert videos.dtype == torch.float32
    assert 0 <= float(videos.min()) < float(videos.max()) <= 1
    torch.testing.assert_close(videos, their_samples(case, family, start, "pt"), atol=1e-4, rtol=1e-4)


@one_a_family
def test_an_exported_pipeline_has_the_new_weights_and_all_else(name: str, folders: Folders, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    state = {key: tensor + 0.01 for key, tensor in transformer.state_dict().items()}
    # The name of the path must not matter.
    target = tmp_path / "transformer" / "exported"
    family.export(state, target)
    loaded = DiffusionPipeline.from_pretrained(target)
    assert type(loaded).__name__ == family.pipeline_class
    got = getattr(loaded, family.backbone).state_dict()
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)
    assert open_generator(family.config.model_copy(update={"path": str(target)})).fingerprint() == family.fingerprint()


def test_an_export_holds_no_old_weights(folders: Folders, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "transformer-hub"
    shutil.copytree(folders("FluxPipeline"), source)
    for copy in ("flux1-dev.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/x.bin"):
        (source / copy).write_bytes(b"old")
    (source / "LICENSE.md").write_text("terms")
    family = open_generator(CASES["flux"].config(source))
    assert [file.name for file in family.transformer_files()] == ["diffusion_pytorch_model.safetensors"]
    family.export(load_file(family.transformer_files()[0]), tmp_path / "exported")
    assert (tmp_path / "exported" / "LICENSE.md").is_file()
    assert (tmp_path / "exported" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (tmp_path / "exported" / "flux1-dev.safetensors").exists()
    assert sorted(f.name for f in (tmp_path / "exported" / "transformer").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


@one_a_transformer
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_process_reward_model_grows_on_the_first_blocks(name: str, blocks: int, folders: Folders) -> None:
    family = family_of(name, folders)
    torch.manual_seed(0)
    model = ProcessRewardModel.from_generator(family, blocks)
    generator = load_file(family.transformer_files()[0])
    trunk = model.trunk.state_dict()
    assert all(torch.equal(tensor, generator[key]) for key, tensor in trunk.items())
    assert len(trunk) < len(generator)
    x, time = noise(family), torch.tensor([0.9, 0.3])
    conditioning = conditioning_of(family)
    rewards, gradient = model.reward_and_gradient(x, time, conditioning)
    assert rewards.shape == (2,)
    assert gradient.shape == x.shape
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.flatten(1).norm(dim=1).min()) > 0
    # One sample's reward knows nothing of the others, and everything of its noise level and prompt.
    first = {key: tensor[:1] for key, tensor in conditioning.items()}
    second = {key: tensor[1:] for key, tensor in conditioning.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1], time[:1], first), rewards[:1], atol=1e-5, rtol=1e-4)
        assert float((model(x[:1], time[1:], first) - rewards[:1]).abs()) > 1e-6
        assert float((model(x[:1], time[:1], second) - rewards[:1]).abs()) > 1e-6


@one_a_transformer
def test_a_process_reward_model_is_bound_to_latents_and_texts(name: str, folders: Folders, tmp_path: Path) -> None:
    import shutil

    family = family_of(name, folders)
    model = ProcessRewardModel.from_generator(family, 1)
    model.save(tmp_path / "prm")
    loaded = ProcessRewardModel.load(tmp_path / "prm", family.config)
    x, time, conditioning = noise(family), torch.tensor([0.9, 0.3]), conditioning_of(family)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, time, conditioning), model(x, time, conditioning))
    for part in family.fingerprint():
        other = tmp_path / f"other {part}"
        shutil.copytree(family.folder, other)
        (file,) = (other / part).glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        with pytest.raises(ConfigError, match=f"another {part} than"):
            ProcessRewardModel.load(tmp_path / "prm", family.config.model_copy(update={"path": str(other)}))


@one_a_transformer
def test_a_trunk_longer_than_the_transformer_is_refused(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    for blocks in (0, 4):
        with pytest.raises(ConfigError, match=f"trunk of {blocks} blocks"):
            family.build_trunk(blocks)


@one_a_family
def test_default_lora_targets_reach_attention(name: str, folders: Folders) -> None:
    family = family_of(name, folders)
    transformer = family.load_transformer(CPU)
    add_adapter(transformer, LoraConfig(rank=2))
    trained = adapter_parameters(transformer)
    for target in LoraConfig().targets:
        assert any(f".{target}.lora_A." in key for key in trained), target
    for key in (k for k in trained if ".lora_B." in k):
        torch.nn.init.normal_(trained[key])
    conditioning = {key: tensor[:1] for key, tensor in conditioning_of(family).items()}
    x, time = noise(family, 1), torch.tensor([0.5])
    family.velocity(transformer, x, time, conditioning).square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for k, p in trained.items() if "to_v" in k)


@one_a_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learner_and_rollout_compute_the_same(name: str, dtype: str, folders: Folders) -> None:
    """A learner builds, fills in the parameters and casts all at once; a rollout actor loads."""
    family = family_of(name, folders, dtype=dtype)
    built = family.build_transformer()
    stored = {k: t for file in family.transformer_files() for k, t in load_file(file).items()}
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            parameter.copy_(stored[key])
    if dtype == "bfloat16":
        built.bfloat16()
    loaded = family.load_transformer(CPU)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    conditioning = conditioning_of(family)
    x, time = noise(family), torch.full((2,), 0.7)
    with torch.no_grad():
        ours = family.velocity(built.train(), x, time, conditioning)
        theirs = family.velocity(loaded, x, time, conditioning)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_wan_keeps_its_rotary_tables_exact(folders: Folders) -> None:
    from diffusers import WanTransformer3DModel

    family = family_of("wan", folders, dtype="bfloat16")
    exact = WanTransformer3DModel.from_config(family.transformer_config()).rope
    for transformer in (family.load_transformer(CPU), family.build_transformer().bfloat16()):
        torch.testing.assert_close(transformer.rope.freqs_cos, exact.freqs_cos, atol=1e-7, rtol=0)
        torch.testing.assert_close(transformer.rope.freqs_sin, exact.freqs_sin, atol=1e-7, rtol=0)
        assert transformer.to("meta").rope.freqs_cos.device.type == "meta"


def test_sd3_reads_its_position_table_from_disk(folders: Folders, tmp_path: Path) -> None:
    """Learners fill in parameters only, and the published table is rounded to half precision."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(folders("StableDiffusion3Pipeline"), tmp_path / "half")
    family = open_generator(CASES["sd3"].config(tmp_path / "half"))
    (file,) = family.transformer_files()
    state = load_file(file)
    state["pos_embed.pos_embed"] = state["pos_embed.pos_embed"].half().float()
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(family.build_transformer().pos_embed.pos_embed, state["pos_embed.pos_embed"])


def test_a_conditioning_of_one_prompt_serves_a_group(folders: Folders) -> None:
    family = family_of("hunyuan 1.5", folders)
    transformer = family.load_transformer(CPU)
    conditioning = encode_one(family.prompt_encoder(CPU), PROMPTS[1])
    assert all(tensor.shape[0] == 1 for tensor in conditioning.values())
    x = noise(family)
    with torch.no_grad():
        group = family.velocity(transformer, x, torch.full((2,), 0.5), expand(conditioning, 2))
        alone = family.velocity(transformer, x[1:], torch.full((1,), 0.5), conditioning)
    torch.testing.assert_close(group[1:], alone, atol=1e-5, rtol=1e-4)


def test_the_first_frame_matters(folders: Folders) -> None:
    family = family_of("skyreels", folders)
    transformer, x, time = family.load_transformer(CPU), noise(family, 1), torch.tensor([0.5])
    outputs = []
    for file in pictures(family).values():
        conditioning = family.prompt_encoder(CPU, {PROMPTS[0]: file})(PROMPTS[:1])
        with torch.no_grad():
            outputs.append(family.velocity(transformer, x, time, conditioning))
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2


def test_a_prompt_without_its_image_is_refused(folders: Folders, tmp_path: Path) -> None:
    family = family_of("skyreels", folders)
    with pytest.raises(ConfigError, match=r"'a red car' has no image.*\.jsonl"):
        family.prompt_encoder(CPU, {})(PROMPTS[:1])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken\.png"):
        family.prompt_encoder(CPU, {PROMPTS[0]: tmp_path / "broken.png"})(PROMPTS[:1])


def test_a_family_of_texts_says_that_it_takes_no_image(folders: Folders) -> None:
    family = family_of("flux", folders)
    with pytest.raises(ConfigError, match=r"model\.path: .* is a FluxPipeline, which takes no image"):
        family.load_image_encoder(CPU)


def ddim_sampler(**changes: Any) -> SamplerConfig:
    return SamplerConfig(**({"law": "ddim", "eta": 1.0, "num_steps": 10} | changes))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stable_diffusion_steps_as_the_ddim_scheduler_does(eta: float, folders: Folders) -> None:
    from diffusers import DDIMScheduler

    family = family_of("sd1", folders)
    table = family.step_table(ddim_sampler(eta=eta))
    description = json.loads((family.folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(description, clip_sample=False)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    x, output, z = (torch.randn(2, 4, 1, 3, 3, generator=generator) for _ in range(3))
    assert table.predicts_noise
    assert [round(float(time) * 1000) for time in table.times] == scheduler.timesteps.tolist()
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(table.sample(k, table.mean(k, x, output), z), theirs, atol=1e-5, rtol=1e-5)


def test_stable_diffusion_refuses_what_it_cannot_do(folders: Folders, tmp_path: Path) -> None:
    import shutil

    family = family_of("sd1", folders)
    with pytest.raises(ConfigError, match=r"sampler\.law: dance .* needs ddim"):
        family.step_table(SamplerConfig(law="dance", eta=0.3, num_steps=4))
    with pytest.raises(ConfigError, match=r"sampler\.shift"):
        family.step_table(ddim_sampler(shift=3.0))
    with pytest.raises(ConfigError, match="1000 noise levels"):
        family.step_table(ddim_sampler(num_steps=1000))
    with pytest.raises(ConfigError, match="U-Net"):
        ProcessRewardModel.from_generator(family, 1)
    with pytest.raises(ConfigError, match="ddim is for models that predict the noise"):
        family_of("flux", folders).step_table(ddim_sampler())
    shutil.copytree(family.folder, tmp_path / "v")
    file = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ConfigError, match="'v_prediction'"):
        open_generator(CASES["sd1"].config(tmp_path / "v"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux", {"frames": 5}, r"model\.frames: FluxPipeline makes images"),
        ("flux", {"height": 18}, r"model\.height: .* multiple of 4"),
        ("flux", {"embedded_guidance": None}, r"model\.embedded_guidance: .* needs the scale"),
        ("sd3", {"embedded_guidance": 3.5}, r"model\.embedded_guidance: .* takes no guidance scale"),
        ("wan", {"frames": 4}, r"model\.frames: .* 2 at a time; 4 is not among those numbers, 3 is"),
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
    ("field", "value", "message"),
    [("boundary_ratio", 0.9, "two transformers"), ("expand_timesteps", True, "each token")],
)
def test_wan_22_is_refused(field: str, value: object, message: str, folders: Folders, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folders("WanPipeline"), tmp_path / "wan22")
    file = tmp_path / "wan22" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=message):
        open_generator(CASES["wan"].config(tmp_path / "wan22"))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("skyreels", ["model.frames=5", "model.height=32", "model.width=48", "model.embedded_guidance=1"]),
        ("flux", ["sampler.law=flow_grpo", "sampler.shift=3", "model.embedded_guidance=3.5"]),
        ("wan", ["model.frames=5", "model.width=32", "model.cfg_scale=5", "model.dtype=bfloat16"]),
        ("sd1", ["sampler.law=ddim", "sampler.shift=1", "model.cfg_scale=7.5"]),
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
        f"model.path={folders(CASES[name].pipeline_class)}", "model.frames=1", "model.height=16", "model.width=24",
        "rewards.process=null", "sampler.guidance=null", f"prompts.train={tmp_path}/prompts.jsonl", *overrides,
    )  # fmt: skip
    worker = RolloutWorker(config, CPU)
    info, final, payload = worker.generate(GroupTask(group_id=0, prompt="a red car", seed=1), None)
    group = config.rollout.group_size
    assert final.shape == (group, *worker.family.latent_shape)
    assert payload.states.shape[:2] == (group, len(worker.table().stochastic_steps))
    assert all(array.shape[0] == 1 and array.dtype == np.float32 for array in payload.conditioning.values())
    assert np.isfinite(payload.log_probs).all()
    assert info.fingerprint == worker.family.step_table(config.sampler).fingerprint()
    evaluated = worker.evaluate(PROMPTS, [1, 2])
    assert evaluated.shape == (2, *worker.family.latent_shape)
    alone = worker.evaluate(PROMPTS[1:], [2])
    np.testing.assert_allclose(evaluated[1:], alone, atol=1e-4 if worker.family.dtype == torch.float32 else 0.1)
