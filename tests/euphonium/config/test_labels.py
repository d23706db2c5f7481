"""Labels of pools: what Ray would refuse when its actors start is refused with the recipe."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ray._private.label_utils import validate_label_selector

from euphonium.config.pools import ShareConfig

NAMES = st.one_of(
    st.sampled_from(["pool", "ray.io/accelerator-type", "a/b/c", "/a", "a/", "-a", "a" * 63, "a" * 64, "a..b/c", "é"]),
    st.text("aB9-_./", max_size=70),
)
VALUES = st.one_of(
    st.sampled_from(["", "H100", "!H100", "in(a,b)", "!in(a, b)", "in()", "in(a,", "a b", "a" * 64, "!!a", "a\n"]),
    st.text("aB9-_.!(), in", max_size=20),
)


@given(name=NAMES, value=VALUES)
def test_whatever_is_taken_here_is_taken_by_ray(name: str, value: str) -> None:
    try:
        share = ShareConfig(labels={name: value})
    except ValidationError:
        return
    assert validate_label_selector(share.ray_options["label_selector"]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("pool", "rollout"), ("zone", "in(a,b)"), ("zone", "!in(a, b)"), ("ray.io/accelerator-type", "!H100"), ("a", "")],
)
def test_labels_and_operators_of_ray_are_taken(name: str, value: str) -> None:
    assert validate_label_selector({name: value}) is None
    assert ShareConfig(labels={name: value}).labels == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("my label", "a", "'my label' is no name of a label; Ray takes"),
        ("a//b", "a", "'a//b' is no name of a label"),
        ("pool", "roll out", "'roll out' is no value of the label 'pool'; Ray takes"),
        ("pool", "in(a", "or its operators: '!a', 'in"),
    ],
)
def test_what_ray_would_refuse_is_refused(name: str, value: str, message: str) -> None:
    assert validate_label_selector({name: value}) is not None
    with pytest.raises(ValidationError) as caught:
        ShareConfig(labels={name: value})
    assert message in str(caught.value)
