"""Generators: adapters of diffusers pipelines, one file a family over a common base, opened by :mod:`.registry`."""
