"""The weight store: a Ray actor that holds references to the published weights, not the weights.

The learner owns the buckets, since one more copy would take as long as the publication itself. If it dies they are
lost, and the learner group that takes its place publishes its own; only the last weights of a learner group that ends
are copied.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from euphonium.errors import WeightsMissingError
from euphonium.role_logs import keep_role_log
from euphonium.wire.records import WeightKind
from euphonium.wire.weights.manifest import Bucket, WeightManifest

if TYPE_CHECKING:
    from ray import ObjectRef

log = logging.getLogger(__name__)

KEPT_VERSIONS = 2


class WeightStore:
    """References to published weights by kind and version; the newest ``KEPT_VERSIONS`` of each kind are kept."""

    def __init__(self, run_dir: Path | None = None) -> None:
        """Holds nothing.

        Args:
            run_dir: folder of the run, for the log.
        """
        keep_role_log(run_dir, repr(self))
        self._arriving: dict[tuple[int, WeightKind], dict[int, ObjectRef[Bucket]]] = {}
        self._published: dict[WeightKind, dict[int, tuple[WeightManifest, list[ObjectRef[Bucket]]]]] = {}

    def __repr__(self) -> str:
        return "weight-store"

    def put_bucket(
        self, version: int, kind: WeightKind, index: int, boxed: list[ObjectRef[Bucket]], keep: bool
    ) -> None:
        """Takes the reference to one bucket.

        Args:
            version: policy version.
            kind: the policy's weights or their moving average.
            index: position of the bucket.
            boxed: the reference, in a list because Ray replaces a bare one by its value; the learner owns it.
            keep: whether to copy the bucket into an object of the store's own, because the learner is about to end.
        """
        import ray

        self._arriving.setdefault((version, kind), {})[index] = ray.put(ray.get(boxed[0])) if keep else boxed[0]

    def commit(self, manifest: WeightManifest) -> None:
        """Publishes a version, all of whose buckets have arrived.

        Raises:
            WeightsMissingError: buckets are missing; a store that was restarted has lost those that it had.
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
        log.info("version %d (%s): %d buckets, published", manifest.version, manifest.kind, len(manifest.buckets))

    def fetch(self, version: int, kind: WeightKind) -> tuple[WeightManifest, list[ObjectRef[Bucket]]]:
        """Manifest and bucket references of the newest weights of a kind.

        Raises:
            WeightsMissingError: they are older than ``version``, or there are none.
        """
        newest = self.newest(kind)
        if newest < version:
            have: dict[str, list[int]] = {name: sorted(versions) for name, versions in self._published.items()}
            raise WeightsMissingError(f"the weight store has no version {version} ({kind}); it has {have}")
        return self._published[kind][newest]

    def lost(self, version: int, kind: WeightKind) -> None:
        """Removes a version whose buckets are lost, because the learner that owned them has died."""
        if self._published.get(kind, {}).pop(version, None) is not None:
            log.warning("version %d (%s) is lost: its buckets' owner has died", version, kind)

    def newest(self, kind: WeightKind) -> int:
        """Newest version of a kind; -1 if there is none."""
        return max(self._published.get(kind, {}), default=-1)
