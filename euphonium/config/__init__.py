"""The configuration: a tree of pydantic models, read from YAML recipes and overrides; all defaults are here."""

from euphonium.config.base import Node
from euphonium.config.loading import dump_config, load_any_config, load_config
from euphonium.config.pools import LearnerPoolConfig, OrmPoolConfig, PoolConfig, PoolsConfig, RewardPoolConfig
from euphonium.config.reward_training import (
    BackboneConfig,
    OrmConfig,
    OrmOptimizerConfig,
    PairsConfig,
    PreferencesConfig,
    PrmConfig,
    RewardOptimizerConfig,
    RewardTrainingConfig,
)
from euphonium.config.rewards import (
    AdvantageConfig,
    BreakerConfig,
    OutcomeRewardConfig,
    PrmRefreshConfig,
    ProcessRewardConfig,
    RewardsConfig,
    WatchConfig,
)
from euphonium.config.run import RunConfig
from euphonium.config.sampling import (
    EvaluationConfig,
    GuidanceConfig,
    LoraConfig,
    ModelConfig,
    MovingWindowConfig,
    PromptsConfig,
    RolloutConfig,
    SamplerConfig,
    SpsaConfig,
)
from euphonium.config.training import (
    CheckpointConfig,
    KlConfig,
    KlControllerConfig,
    MetricsConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

__all__ = [
    "AdvantageConfig",
    "BackboneConfig",
    "BreakerConfig",
    "CheckpointConfig",
    "EvaluationConfig",
    "GuidanceConfig",
    "KlConfig",
    "KlControllerConfig",
    "LearnerPoolConfig",
    "LoraConfig",
    "MetricsConfig",
    "ModelConfig",
    "MovingWindowConfig",
    "Node",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OrmConfig",
    "OrmOptimizerConfig",
    "OrmPoolConfig",
    "OutcomeRewardConfig",
    "PairsConfig",
    "PoolConfig",
    "PoolsConfig",
    "PreferencesConfig",
    "PrmConfig",
    "PrmRefreshConfig",
    "ProcessRewardConfig",
    "PromptsConfig",
    "RewardOptimizerConfig",
    "RewardPoolConfig",
    "RewardTrainingConfig",
    "RewardsConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerConfig",
    "SpsaConfig",
    "WatchConfig",
    "dump_config",
    "load_any_config",
    "load_config",
]
