"""The weight store: a Ray actor that owns the published weights, so that they outlive the learner that made them."""

from __future__ import annotations

from typing import Any

from core.errors import WeightsMissingError
from core.weights import Bucket, WeightManifest

KEPT_VERSIONS = 2


class WeightStore:
    """Published weights by version and kind; the newest ``KEPT_VERSIONS`` of a kind are kept."""

    def __init__(self) -> None:
        self._arriving: dict[tuple[int, str], dict[int, Any]] = {}
        self._published: dict[str, dict[int, tuple[WeightManifest, list[Any]]]] = {}

    def __repr__(self) -> str:
        return "weight-store"

    def put_bucket(self, version: int, kind: str, index: int, data: Bucket) -> None:
        """Copies one bucket into an object of the store's own: the learner's would die with the learner."""
        import ray

        self._arriving.setdefault((version, kind), {})[index] = ray.put(data)

    def commit(self, manifest: WeightManifest) -> None:
        """Publishes a version, all of whose buckets have arrived.

        Raises:
            WeightsMissingError: not all have; a store that was restarted has lost what came before.
        """
        arrived = self._arriving.pop((manifest.version, manifest.kind), {})
        if sorted(arrived) != list(range(len(manifest.buckets))):
            raise WeightsMissingError(
                f"version {manifest.version} ({manifest.kind}) was published with buckets {sorted(arrived)} "
                f"of {len(manifest.buckets)}"
            )
        versions = self._published.setdefault(manifest.kind, {})
        versions[manifest.version] = manifest, [arrived[i] for i in range(len(manifest.buckets))]
        # A learner that went back to a checkpoint has made newer versions void.
        for version in [v for v in versions if v > manifest.version]:
            del versions[version]
        for version in sorted(versions)[:-KEPT_VERSIONS]:
            del versions[version]

    def fetch(self, version: int, kind: str) -> tuple[WeightManifest, list[Any]]:
        """Manifest and bucket references of the newest weights that are at least of a version.

        Raises:
            WeightsMissingError: there are none.
        """
        newest = self.newest(kind)
        if newest < version:
            have = {kind: sorted(versions) for kind, versions in self._published.items()}
            raise WeightsMissingError(f"the weight store has no version {version} ({kind}); it has {have}")
        return self._published[kind][newest]

    def newest(self, kind: str) -> int:
        """Newest version of a kind; -1 if there is none."""
        return max(self._published.get(kind, {}), default=-1)
