"""The configuration: one tree of models (the only place with defaults), read from YAML recipes and overrides."""

from core.config.loading import dump_config, load_config
from core.config.tree import PrmConfig, RunConfig

__all__ = ["PrmConfig", "RunConfig", "dump_config", "load_config"]
