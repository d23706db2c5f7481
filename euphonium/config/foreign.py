"""Names of the same settings in other projects, so that a setting brought from there is never silently ignored.

The tables are data: ``docs/migration.md`` is made from them, the loader answers an unknown key with them, and
``euphonium validate`` finds variables in the environment that would have no effect. They hold what a name stands for
here; a name without a field has no counterpart, and its note says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class ForeignName:
    """One setting of another project.

    Attributes:
        name: as it is written there.
        fields: fields of a recipe that it becomes; none if there is no counterpart.
        note: how values translate, or why there is no counterpart.
    """

    name: str
    fields: tuple[str, ...] = ()
    note: str = ""

    @property
    def advice(self) -> str:
        """What to do instead, as a clause."""
        if not self.fields:
            return f"has no counterpart here: {self.note}"
        return f"is {' and '.join(self.fields)} here" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Project:
    """A project and its settings.

    Attributes:
        title: its name.
        kind: what its settings are called.
        names: the settings.
    """

    title: str
    kind: str
    names: tuple[ForeignName, ...]


def _names(*rows: tuple[str, str, str]) -> tuple[ForeignName, ...]:
    return tuple(ForeignName(name, tuple(filter(None, fields.split(" "))), note) for name, fields, note in rows)


WINDOW = "one half-open range [start, stop]; -1 there is sampler.num_steps here"
OPTIONS = "a constructor argument of the reward"
ALL_STEPS = "every step of the window"
PIPELINE = "read from the pipeline's folder"

EUPHONIUM = Project(
    "Euphonium",
    "variables of `scripts/train_grpo_hunyuan.sh`; the lower-case form is the flag of its Python script, whose other "
    "flags are DanceGRPO's",
    _names(
        ("HUNYUAN_VIDEO_PATH", "model.path", "a folder in diffusers' layout"),
        ("PROCESS_LATENT_REWARD_ENABLED", "rewards.process", "a section, or null"),
        ("PROCESS_LATENT_REWARD_SAMPLING_ENABLED", "sampler.guidance", "a section, or null"),
        ("PROCESS_LATENT_REWARD_TRAINING_ENABLED", "objective.kind", "without effect there; standard keeps guidance"),
        ("PROCESS_LATENT_REWARD_GUIDANCE_SCALE", "sampler.guidance.scale", "a negative value there: give beta instead"),
        ("PROCESS_LATENT_REWARD_KL_BETA", "sampler.guidance.beta", "instead of scale; used there if scale is negative"),
        ("PROCESS_LATENT_REWARD_START_STEP", "sampler.guidance.window", WINDOW),
        ("PROCESS_LATENT_REWARD_END_STEP", "sampler.guidance.window", WINDOW),
        ("PROCESS_LATENT_REWARD_INTERVAL", "", ALL_STEPS + " is guided"),
        (
            "PROCESS_LATENT_REWARD_NORMALIZE_GRADIENT",
            "sampler.guidance.normalise",
            "each sample's gradient on its own; there the whole batch's together",
        ),
        ("USE_DELTA_T_FOR_GRADIENT_SCALING", "", "guidance is always scaled with the step's length, as in Eq. 20"),
        (
            "USE_REWARD_GUIDED_MEAN_FOR_LOGPROB",
            "objective.kind",
            "false is distill, true is standard; rollout and training cannot disagree",
        ),
        (
            "USE_REWARD_GUIDED_MEAN_FOR_LOGPROB_TRAINING",
            "objective.kind",
            "false is distill, true is standard; rollout and training cannot disagree",
        ),
        ("PROCESS_REWARD_ADVANTAGE_MODE", "advantage.mode", "none is outcome, only is process, both is both"),
        ("PROCESS_REWARD_ADVANTAGE_COEF", "rewards.process.weight", ""),
        ("OUTCOME_REWARD_ADVANTAGE_COEF", "rewards.outcome[].weight", "multiplies the weight of every reward"),
        ("SCORE_COEF", "rewards.outcome[].weight", "twice as large here: there the reward is counted a second time"),
        ("TRL_CORE_ENABLED", "rewards.outcome", "list the reward, or leave it out"),
        ("TRL_MODEL_PATH", "rewards.outcome[].options", OPTIONS),
        ("TRL_MODEL_TYPE", "rewards.outcome[].options", OPTIONS),
        ("TRL_DTYPE", "rewards.outcome[].options", OPTIONS),
        ("TRL_PATH", "rewards.outcome[].options", OPTIONS),
        ("TRL_TOKENIZER_PATH", "rewards.outcome[].options", OPTIONS),
        ("TRL_PROMPT_VARIANT", "rewards.outcome[].options", OPTIONS),
        ("VIDEO_ALIGN_IN_TRL_REWARD_ENABLED", "rewards.outcome", "list the reward, or leave it out"),
        ("VIDEO_ALIGN_IN_TRL_REWARD_PRETRAINED_PATH", "rewards.outcome[].options", OPTIONS),
        ("VIDEO_ALIGN_IN_TRL_REWARD_USE_NORM", "rewards.outcome[].options", OPTIONS),
        ("VIDEO_ALIGN_IN_TRL_REWARD_VQ_COEF", "rewards.outcome[].weight", ""),
        ("VIDEO_ALIGN_IN_TRL_REWARD_MQ_COEF", "rewards.outcome[].weight", ""),
        ("VIDEO_ALIGN_IN_TRL_REWARD_TA_COEF", "rewards.outcome[].weight", ""),
        ("LATENT_REWARD_IN_TRL_REWARD_CHECKPOINT_DIR", "rewards.process.path", "weights in this project's layout"),
        ("LATENT_REWARD_IN_TRL_REWARD_ENABLED", "", "the process reward of finished latents is not an outcome reward"),
        ("LATENT_REWARD_IN_TRL_REWARD_COEF", "", "the process reward of finished latents is not an outcome reward"),
        ("LATENT_REWARD_IN_TRL_REWARD_DTYPE", "", "process reward models run in the type of their weights"),
        ("LATENT_REWARD_USE_SIGMOID", "", "process rewards are logits; advantages normalise them"),
        ("LATENT_PRM_PATH", "", "the process reward model's code is part of this project"),
        ("SPSA_REWARD_ENABLED", "sampler.guidance.source", "spsa"),
        ("SPSA_REWARD_SIGMA", "sampler.guidance.spsa.scale", ""),
        ("SPSA_REWARD_NUM_SAMPLES", "sampler.guidance.spsa.perturbations", ""),
        ("SPSA_REWARD_GUIDANCE_SCALE", "sampler.guidance.scale", ""),
        ("SPSA_REWARD_KL_BETA", "sampler.guidance.beta", "instead of scale"),
        ("SPSA_REWARD_START_STEP", "sampler.guidance.window", WINDOW),
        ("SPSA_REWARD_END_STEP", "sampler.guidance.window", WINDOW),
        ("SPSA_REWARD_INTERVAL", "", ALL_STEPS + " is guided"),
        ("SPSA_REWARD_NORMALIZE_GRADIENT", "sampler.guidance.normalise", "each sample's gradient on its own"),
        ("USE_KL_LOSS", "objective.kl", "a section, or null"),
        (
            "KL_COEF",
            "objective.kl.weight",
            "of the transitions' divergence; there of squared velocities, another scale",
        ),
        ("KL_TYPE", "", "both directions are equal for Gaussians of the same variance"),
        ("KL_WEIGHT_VERSION", "", "the divergence is always that of the transitions"),
        ("timestep_selection_mode", "objective.timestep_fraction", "for mode fraction; for range, sampler.sde_window"),
        ("timestep_range_start", "sampler.sde_window", "a half-open range; steps outside become steps of the ODE"),
        ("timestep_range_end", "sampler.sde_window", "a half-open range; steps outside become steps of the ODE"),
        ("timestep_range_interval", "", ALL_STEPS + " is trained"),
        ("lr", "optimizer.learning_rate", ""),
        ("output_base_dir", "output_dir", ""),
    ),
)

DANCE_GRPO = Project(
    "DanceGRPO",
    "flags of `fastvideo/train_grpo_*.py`",
    _names(
        ("eta", "sampler.eta", "with sampler.law: dance"),
        ("sampling_steps", "sampler.num_steps", ""),
        ("shift", "sampler.shift", ""),
        ("num_generations", "rollout.group_size", ""),
        ("train_batch_size", "rollout.prompts_per_iteration", "times the number of GPUs there"),
        (
            "gradient_accumulation_steps",
            "objective.updates_per_iteration",
            "num_generations x train_batch_size / gradient_accumulation_steps",
        ),
        ("max_train_steps", "iterations", "a step there is a rollout with its updates"),
        ("num_train_epochs", "iterations", ""),
        ("bestofn", "advantage.best_of", "half of it: best_of counts each side, and is per group"),
        ("timestep_fraction", "objective.timestep_fraction", ""),
        ("ignore_last", "sampler.sde_window", "[0, num_steps - 1]"),
        ("use_same_noise", "sampler.shared_noise", "within a group; there within all prompts of a GPU"),
        ("init_same_noise", "sampler.shared_noise", ""),
        ("use_group", "advantage.scope", "group"),
        ("clip_range", "objective.clip_range", ""),
        ("adv_clip_max", "advantage.clip", ""),
        ("vq_coef", "rewards.outcome[].weight", ""),
        ("mq_coef", "rewards.outcome[].weight", ""),
        ("use_hpsv2", "rewards.outcome", "list the reward"),
        ("use_hpsv3", "rewards.outcome", "list the reward"),
        ("use_pickscore", "rewards.outcome", "list the reward"),
        ("use_videoalign", "rewards.outcome", "list the reward"),
        ("fps", "rewards.outcome[].options", OPTIONS),
        ("cfg_infer", "model.cfg_scale", "in rollout, training and evaluation"),
        ("cfg", "", "the rate of dropped captions, which the RL trainers never read"),
        ("h", "model.height", ""),
        ("w", "model.width", ""),
        ("t", "model.frames", ""),
        ("num_frames", "model.frames", ""),
        ("num_latent_t", "model.frames", "pixels' frames, not latent ones"),
        ("pretrained_model_name_or_path", "model.path", ""),
        ("dit_model_name_or_path", "model.path", "a checkpoint of this project: resume"),
        ("vae_model_path", "", PIPELINE),
        ("reference_model_path", "", PIPELINE),
        ("model_type", "", PIPELINE),
        ("data_json_path", "prompts.train", "prompts as text: rollout actors encode them"),
        ("validation_prompt_dir", "prompts.evaluation", "prompts as text"),
        ("validation_steps", "evaluation.every", ""),
        ("validation_sampling_steps", "evaluation.num_steps", ""),
        ("validation_guidance_scale", "model.cfg_scale", ""),
        ("learning_rate", "optimizer.learning_rate", ""),
        ("weight_decay", "optimizer.weight_decay", ""),
        ("max_grad_norm", "optimizer.max_grad_norm", ""),
        ("lr_scheduler", "optimizer.schedule", "constant, linear or cosine"),
        ("lr_warmup_steps", "optimizer.warmup_updates", "in updates"),
        ("use_ema", "optimizer.ema_decay", "above 0"),
        ("ema_decay", "optimizer.ema_decay", ""),
        ("ema_start_step", "", "the average starts with the run"),
        ("use_lora", "model.lora", "a section, or null"),
        ("lora_rank", "model.lora.rank", ""),
        ("lora_alpha", "model.lora.alpha", ""),
        ("mixed_precision", "model.dtype", "bfloat16 or float32"),
        ("master_weight_type", "", "ZeRO-3 keeps float32 masters"),
        ("gradient_checkpointing", "pools.learner.gradient_checkpointing", ""),
        ("selective_checkpointing", "pools.learner.gradient_checkpointing", "all or nothing"),
        ("use_cpu_offload", "pools.learner.offload_optimizer", ""),
        ("fsdp_sharding_startegy", "", "the learner group is ZeRO-3"),
        ("sp_size", "", "no sequence parallelism"),
        ("train_sp_batch_size", "pools.learner.rows_per_micro_batch", ""),
        ("sampler_seed", "seed", ""),
        ("checkpointing_steps", "checkpoint.every", ""),
        ("checkpoints_total_limit", "checkpoint.keep_last", ""),
        ("resume_from_checkpoint", "resume", ""),
        ("resume_from_lora_checkpoint", "resume", ""),
        ("tracker_project_name", "name", ""),
        ("loss_coef", "", "losses are means over samples and steps"),
        ("cache_dir", "", "the hub's own cache is used"),
        ("dataloader_num_workers", "", "prompts are read by the orchestrator"),
        ("allow_tf32", "", "a setting of torch: NVIDIA_TF32_OVERRIDE in the runtime environment"),
    ),
)

FLOW_GRPO = Project(
    "Flow-GRPO and Flow-CPS",
    "entries of `config/base.py` and `config/grpo.py`",
    _names(
        ("pretrained.model", "model.path", ""),
        ("pretrained.revision", "model.revision", ""),
        ("resolution", "model.height model.width", ""),
        ("dataset", "prompts.train prompts.evaluation", "one prompt a line"),
        (
            "reward_fn",
            "rewards.outcome",
            "there the weighted sum is normalised, here each reward before it is weighted",
        ),
        ("run_name", "name", ""),
        ("logdir", "output_dir", ""),
        ("save_dir", "output_dir", ""),
        ("num_epochs", "iterations", ""),
        ("save_freq", "checkpoint.every", ""),
        ("eval_freq", "evaluation.every", ""),
        ("num_checkpoint_limit", "checkpoint.keep_last", ""),
        ("resume_from", "resume", ""),
        ("per_prompt_stat_tracking", "advantage.scope", "the mean is always the group's"),
        ("prompt_fn", "", "prompts come from files"),
        ("sample.num_steps", "sampler.num_steps", ""),
        ("sample.eval_num_steps", "evaluation.num_steps", ""),
        ("sample.guidance_scale", "model.cfg_scale", ""),
        ("sample.noise_level", "sampler.eta", "with sampler.law: flow_grpo or cps"),
        ("sample.sde_type", "sampler.law", "sde is flow_grpo, cps is cps"),
        ("sample.same_latent", "sampler.shared_noise", ""),
        ("sample.num_image_per_prompt", "rollout.group_size", ""),
        (
            "sample.num_batches_per_epoch",
            "rollout.prompts_per_iteration",
            "GPUs x train_batch_size x num_batches_per_epoch / num_image_per_prompt",
        ),
        ("sample.train_batch_size", "rollout.prompts_per_iteration", "an actor draws a whole group at a time"),
        ("sample.mini_num_image_per_prompt", "", "an actor draws a whole group at a time"),
        ("sample.test_batch_size", "", "evaluation chooses its own batches"),
        ("sample.global_std", "advantage.scope", "true is global, false is group"),
        ("sample.sde_window_size", "sampler.sde_window.size", "with kind: random"),
        ("sample.sde_window_range", "sampler.sde_window.allowed", "with kind: random"),
        ("sample.train_num_steps", "sampler.sde_window.size", "with kind: random"),
        ("sample.kl_reward", "", "the KL is a penalty in the loss: objective.kl"),
        ("train.learning_rate", "optimizer.learning_rate", ""),
        ("train.batch_size", "pools.learner.rows_per_micro_batch", "in transitions"),
        (
            "train.gradient_accumulation_steps",
            "objective.updates_per_iteration",
            "num_batches_per_epoch / gradient_accumulation_steps",
        ),
        ("train.num_inner_epochs", "", "every group is used once"),
        ("train.timestep_fraction", "sampler.sde_window", "0.99 leaves out the last step: [0, num_steps - 1]"),
        ("train.clip_range", "objective.clip_range", ""),
        ("train.adv_clip_max", "advantage.clip", ""),
        ("train.beta", "objective.kl.weight", "times the mean length of a step: the coded KL lacks it"),
        ("train.cfg", "model.cfg_scale", "always in rollout and training alike"),
        ("train.max_grad_norm", "optimizer.max_grad_norm", ""),
        ("train.adam_beta1", "optimizer.betas", ""),
        ("train.adam_beta2", "optimizer.betas", ""),
        ("train.adam_epsilon", "optimizer.eps", ""),
        ("train.adam_weight_decay", "optimizer.weight_decay", ""),
        ("train.use_8bit_adam", "", "AdamW under ZeRO-3"),
        ("train.ema", "optimizer.ema_decay", "there 0.9 every 8 updates, which is 0.987 every update"),
        ("train.lora_path", "resume", ""),
        ("train.sft", "", "no supervised loss"),
    ),
)

PROJECTS = (EUPHONIUM, DANCE_GRPO, FLOW_GRPO)


@lru_cache(maxsize=1)
def _index() -> tuple[dict[str, tuple[Project, ForeignName]], dict[str, tuple[Project, ForeignName]]]:
    """All names in normal form, and those that go by the last part of a dotted one."""
    whole: dict[str, tuple[Project, ForeignName]] = {}
    last: dict[str, tuple[Project, ForeignName]] = {}
    for project in PROJECTS:
        for entry in project.names:
            name = _normal(entry.name)
            whole.setdefault(name, (project, entry))
            last.setdefault(name.rpartition(".")[2], (project, entry))
    return whole, last


def _normal(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower().removeprefix("config.")


def advice(path: Sequence[str | int], value: Any) -> list[str]:
    """What an unknown key stands for, if it is a setting of another project.

    Args:
        path: of the unknown key in the recipe.
        value: what it was set to; a mapping is searched for names such as ``sample.noise_level``.

    Returns:
        One sentence for each setting that was recognised.
    """
    whole, _ = _index()
    found = []
    for name in _leaves(".".join(map(str, path)), value):
        match = whole.get(_normal(name))
        if match is not None:
            project, entry = match
            found.append(f"{name} of {project.title} {entry.advice}")
    return found


def similar(key: str) -> str | None:
    """What a key means elsewhere that is only the last part of a setting's name there, or stands in another place."""
    _, last = _index()
    match = last.get(_normal(key))
    return f"{match[1].name} of {match[0].title} {match[1].advice}" if match is not None else None


def _leaves(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix


def ineffective_variables(environment: Mapping[str, str]) -> list[str]:
    """Sentences on Euphonium's script variables in an environment, which configures nothing here.

    Only upper-case names are looked for: ``lr`` and its like mean something else to somebody else.
    """
    return [
        f"{entry.name}={environment[entry.name]} {entry.advice}"
        for entry in EUPHONIUM.names
        if entry.name.isupper() and entry.name in environment
    ]
