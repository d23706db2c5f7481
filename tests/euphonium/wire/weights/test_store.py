import pytest
import ray

from euphonium.errors import WeightsMissingError
from euphonium.wire.weights.manifest import WeightManifest
from euphonium.wire.weights.store import WeightStore


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> WeightStore:
    monkeypatch.setattr(ray, "put", lambda data: data)
    return WeightStore()


def publish(store: WeightStore, version: int, kind: str = "policy") -> None:
    store.commit(WeightManifest(version=version, kind=kind, buckets=()))


def test_the_newest_weights_are_given_if_they_are_new_enough(store: WeightStore) -> None:
    publish(store, 3)
    publish(store, 4)
    assert store.fetch(3, "policy")[0].version == 4
    with pytest.raises(WeightsMissingError, match="no version 5"):
        store.fetch(5, "policy")
    with pytest.raises(WeightsMissingError, match="average"):
        store.fetch(3, "average")


def test_a_learner_that_went_back_makes_newer_versions_void(store: WeightStore) -> None:
    for version in (5, 6, 7):
        publish(store, version)
    publish(store, 4)
    assert store.newest("policy") == 4
    assert store.fetch(2, "policy")[0].version == 4


def test_an_incomplete_version_is_refused(store: WeightStore) -> None:
    from euphonium.wire.weights.manifest import BucketManifest

    whole = WeightManifest(version=1, kind="policy", buckets=(BucketManifest(entries=(), checksum=0),))
    with pytest.raises(WeightsMissingError, match="buckets \\[\\] of 1"):
        store.commit(whole)
