"""Options of rewards that are paths: ``~`` is the home folder, and what cannot be a path is refused as such."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from euphonium.config import OutcomeRewardConfig
from euphonium.errors import ConfigError
from euphonium.rewards.registry import build_reward, find_reward, options_of

NEEDED: dict[str, dict[str, object]] = {
    "clip_score": {"weights": "w", "checkpoint": "c"},
    "pickscore": {"weights": "w", "checkpoint": "c"},
    "hps_v21": {"weights": "w", "checkpoint": "c"},
    "aesthetic": {"weights": "w", "head": "h", "checkpoint": "c"},
    "solireward": {"weights": "w", "system_prompt": "s", "user_prompt": "u"},
    "videoalign": {"weights": "w", "base": "b", "template": "t", "video_fps": 8},
    "trained": {"path": "p"},
}
PATHS = {"weights", "checkpoint", "head", "base", "template", "path"}
CASES = [(kind, option) for kind, needed in NEEDED.items() for option in needed if option in PATHS]


def config(kind: str, options: Mapping[str, object]) -> OutcomeRewardConfig:
    return OutcomeRewardConfig(name="tested", type=kind, options=dict(options))


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_a_path_may_begin_in_the_home_folder(
    kind: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = options_of(find_reward(config(kind, {})))
    assert kinds is not None
    options = kinds.model_validate(NEEDED[kind] | {option: "~/models/x"})
    assert str(getattr(options, option)) == str(tmp_path / "models" / "x")


@pytest.mark.parametrize(("kind", "option"), CASES)
@pytest.mark.parametrize(
    ("path", "why"), [("~nobody-of-this-name/x", "there is no home folder for"), ("a\0b", "NUL"), ("x" * 300, "long")]
)
def test_what_no_file_can_have_as_its_path_is_refused(kind: str, option: str, path: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"rewards\.outcome \(tested\)\.options: .*{option}.*{why}"):
        build_reward(config(kind, NEEDED[kind] | {option: path}))
