"""The weight store: a Ray actor that owns the published weights, so that they outlive the learner that made them."""

from __future__ import annotations

from typing import Any

from core.errors import TrainingError
from core.weights import Bucket, WeightManifest

KEPT_VERSIONS = 2


class WeightStore:
    """Published weights by version and kind; the newest ``KEPT_VERSIONS`` of a kind are kept."""

    def __init__(self) -> None:
        self._arriving: dict[tuple[int, str], dict[int, Any]] = {}
        self._published: dict[tuple[int, str], tuple[WeightManifest, list[Any]]] = {}

    def __repr__(self) -> str:
        return "weight-store"

    def put_bucket(self, version: int, kind: str, index: int, data: Bucket) -> None:
        """Copies one bucket into an object of the store's own: the learner's would die with the learner."""
        import ray

        self._arriving.setdefault((version, kind), {})[index] = ray.put(data)

    def commit(self, manifest: WeightManifest) -> None:
        """Publishes a version, all of whose buckets have arrived."""
        key = (manifest.version, manifest.kind)
        arrived = self._arriving.pop(key, {})
        if sorted(arrived) != list(range(len(manifest.buckets))):
            raise TrainingError(
                f"version {manifest.version} ({manifest.kind}) was published with buckets {sorted(arrived)} "
                f"of {len(manifest.buckets)}"
            )
        self._published[key] = manifest, [arrived[i] for i in range(len(manifest.buckets))]
        versions = sorted(version for version, kind in self._published if kind == manifest.kind)
        for version in versions[:-KEPT_VERSIONS]:
            del self._published[version, manifest.kind]

    def fetch(self, version: int, kind: str) -> tuple[WeightManifest, list[Any]]:
        """Manifest and bucket references of a version."""
        if (version, kind) not in self._published:
            have = sorted(self._published)
            raise TrainingError(f"the weight store has no version {version} ({kind}); it has {have}")
        return self._published[version, kind]
