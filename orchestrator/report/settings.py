"""Settings of a recipe by path, and as texts for people and trackers, without what looks like a secret in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

HIDDEN = "(not shown)"
_SECRET = re.compile(r"(^|[._-])(token|secret|password|passwd|credential|authorization|api_?key)s?$", re.IGNORECASE)


def flattened(value: object, path: str = "") -> dict[str, object]:
    """Values of nested mappings by their dotted paths; of a list of mappings, each has its place in the path.

    Example:
        >>> flattened({"seed": 0, "rewards": {"outcome": [{"name": "icon"}]}})
        {'seed': 0, 'rewards.outcome.0.name': 'icon'}
    """
    if isinstance(value, Mapping) and value:
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        items = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return {path: value} if path else {}
    found: dict[str, object] = {}
    for key, inner in items:
        found |= flattened(inner, f"{path}.{key}" if path else key)
    return found


def masked(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as texts; texts whose field names a secret, and passwords in addresses, are left out.

    Example:
        >>> masked({"options.token": "abc", "url": "https://me:abc@host/x", "seed": 0})
        {'options.token': '(not shown)', 'url': 'https://...@host/x', 'seed': '0'}
    """
    return {path: _shown(path, value) for path, value in settings.items()}


def _shown(path: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        return str(value)
    if _SECRET.search(path):
        return HIDDEN
    if "://" not in value or "@" not in value:
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return HIDDEN
    account, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"...@{host}")) if at and account else value
