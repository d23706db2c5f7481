"""The configuration: one tree of models (the only place with defaults), read from YAML recipes and overrides."""

from core.config.base import Node
from core.config.loading import dump_config, load_config
from core.config.orm import BackboneConfig, OrmConfig, OrmOptimizerConfig
from core.config.pools import LearnerPoolConfig, PoolConfig, PoolsConfig, RewardPoolConfig
from core.config.prm import (
    PairsConfig,
    PreferencesConfig,
    PrmConfig,
    PrmOptimizerConfig,
    RewardOptimizerConfig,
    RewardTrainingConfig,
)
from core.config.rewards import (
    AdvantageConfig,
    BreakerConfig,
    OutcomeRewardConfig,
    PrmRefreshConfig,
    ProcessRewardConfig,
    RewardsConfig,
    WatchConfig,
)
from core.config.sampling import (
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
from core.config.training import (
    CheckpointConfig,
    KlConfig,
    KlControllerConfig,
    MetricsConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from core.config.tree import RunConfig

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
    "OutcomeRewardConfig",
    "PairsConfig",
    "PoolConfig",
    "PoolsConfig",
    "PreferencesConfig",
    "PrmConfig",
    "PrmOptimizerConfig",
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
    "load_config",
]
