"""Engines that hold a model in training, in one process or partitioned by DeepSpeed, which only this package knows."""
