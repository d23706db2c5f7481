"""The report: one page that opens offline, says what is on record, and repeats nothing as markup or as a secret."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from orchestrator.commands.cli import run_command
from orchestrator.report.page import report_page
from orchestrator.report.recorded import read_run, read_runs
from orchestrator.state.checkpoints import RESOLVED
from tests.orchestrator.report.recorded_runs import PROMPTS, save_clips, write_clips, write_run

VOID = {"meta", "img", "link", "br", "input", "hr"}
LOADS = {"src", "href", "srcset", "poster", "action", "data"}


class Page(HTMLParser):
    """Checks that a page's elements close in order, and collects what it would load and say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.loads += [value or "" for name, value in attrs if name in LOADS]
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "img":
            self.images.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_run(tmp_path, 4)
    write_clips(folder, 0, seed=0)
    write_clips(folder, 4, seed=1)
    return folder


def page_of(*folders: Path, clip_bytes: int = 10**7) -> Page:
    return Page(report_page(read_runs(folders), "made now", clip_bytes))


def test_a_page_loads_nothing_and_its_links_lead_to_its_own_sections(folder: Path) -> None:
    page = page_of(folder)
    links = [load for load in page.loads if not load.startswith("data:image/webp;base64,")]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(page.ids)
    assert all(link.startswith("#") for link in links)
    text = report_page(read_runs([folder]), "made now", 10**7)
    assert not re.search(r"https?:|@import|url\(", text)


def test_clips_before_and_after_are_in_the_page_with_their_scores(folder: Path) -> None:
    page = page_of(folder)
    # Two prompts, before and after, moving and still.
    assert len(page.images) == 8
    assert page.images[0]["alt"] == f"before training: {PROMPTS[0]}"
    picture = Image.open(io.BytesIO(base64.b64decode(str(page.images[0]["src"]).partition(",")[2])))
    assert (picture.size, getattr(picture, "n_frames", 1)) == ((16, 16), 3)
    assert PROMPTS[0] in page.text
    assert "+4.00" in page.text


def test_a_group_that_was_looked_at_is_in_the_page_step_by_step(folder: Path) -> None:
    assert "One group in detail" not in page_of(folder).text
    (folder / "debug").mkdir()
    rows = ["sample,step,process_reward,advantage,ratio,step_grad_norm"]
    rows += [f"{sample},{step},0.0,{0.5 - sample},1.0,{0.25 * (step + 1)}" for sample in (0, 1) for step in (0, 1)]
    (folder / "debug" / "group.csv").write_text("\n".join(rows) + "\n")
    Image.new("RGB", (8, 8)).save(folder / "debug" / "group.png")
    html = report_page(read_runs([folder]), "made now", 10**7)
    assert "Gradient norm of every step over step: group from 0.25 at 0 to 0.5 at 1" in html
    assert "|advantage| of every step over step: group from 0.5 at 0 to 0.5 at 1" in html
    assert "Process reward of every step" not in html, "there was none"
    assert "data:image/png;base64," in html
    Page(html)


def test_clips_that_do_not_fit_are_counted(folder: Path) -> None:
    page = page_of(folder, clip_bytes=10)
    assert page.images == []
    assert "2 more prompts do not fit; --clips-mb raises the limit" in page.text


def test_large_clips_are_shrunk_and_long_ones_thinned(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 2)
    levels = (np.arange(80) * 37 % 256).astype(np.uint8)
    save_clips(folder, 0, levels.reshape(2, 40, 1, 1, 1).repeat(640, 3).repeat(3, 4))
    page = page_of(folder)
    picture = Image.open(io.BytesIO(base64.b64decode(str(page.images[0]["src"]).partition(",")[2])))
    assert (picture.size, getattr(picture, "n_frames", 1)) == ((320, 1), 20)


def test_what_stands_out_is_said(folder: Path) -> None:
    text = page_of(folder).text
    assert "From iteration 0 to 4: held-out total 0.4000 -> 0.4400 (+0.0400)" in text
    assert "icon fell from 0.3000 to 0.2200 on held-out prompts while the total rose" in text
    assert "the 2 rollout actors hold up the rest: add rollout actors" in text
    assert "Guidance pays" in text


def test_settings_in_which_runs_differ_are_listed_and_no_others(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", RESOLVED):
        (other / name).write_text((folder / name).read_text())
    recipe = yaml.safe_load((other / RESOLVED).read_text())
    recipe["sampler"]["eta"] = 0.123
    recipe["rewards"]["outcome"][0]["options"]["api_key"] = "hunter2"
    (other / RESOLVED).write_text(yaml.safe_dump(recipe))
    page = report_page(read_runs([folder, other]), "made now", 10**7)
    table = page[page.index("Settings that differ</h3>") : page.index("All settings of")]
    assert re.findall(r"<th scope=row><code>(.*?)</code>", table) == [
        "sampler.eta",
        "rewards.outcome.0.options.api_key",
    ]
    assert "0.123" in table
    assert "hunter2" not in page
    assert "(not shown)" in table


def test_several_runs_share_a_chart_for_each_metric(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "metrics" / "other.jsonl"
    other.parent.mkdir()
    other.write_text((folder / "metrics.jsonl").read_text())
    page = report_page(read_runs([folder, other]), "made now", 10**7)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles.count("Held-out total") == 1
    assert "Busy share of every pool: rollout" in titles
    chart = page[page.index("<figcaption>Held-out total<") :]
    assert re.findall(r"<li>.*?</svg>(.*?)</li>", chart[: chart.index("</ul>")]) == ["tiny", "other"]


def test_runs_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / folder.name
    again.mkdir(parents=True)
    (again / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    (again / RESOLVED).write_text((folder / RESOLVED).read_text())
    assert [run.name for run in read_runs([folder, again])] == ["runs/tiny", "again/tiny"]
    assert [run.name for run in read_runs([folder, folder])] == ["runs/tiny (1)", "runs/tiny (2)"]


def test_the_command_writes_the_page_beside_the_metrics(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(folder)]) == 0
    assert capfd.readouterr().out.strip() == str(folder / "report.html")
    assert run_command(["report", str(folder / "samples")]) == 2
    assert "holds no metrics.jsonl; give the folder of a run" in capfd.readouterr().err


def test_a_run_that_has_just_begun_can_be_reported(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    assert "0 of 4 iterations are on record" in page_of(folder).text
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "eval/total/mean": float("nan")}) + '\n{"iter')
    assert read_run(folder).done == 0
    assert page_of(folder).text


def test_a_file_that_is_no_record_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert run_command(["report", str(tmp_path)]) == 2
    assert "a line has no iteration" in capfd.readouterr().err


def test_watch_shows_a_run_once_where_there_is_no_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "logs").mkdir()
    (folder / "logs" / "driver.log").write_text("one\nthe last line of the log\n")
    assert run_command(["watch", str(folder)]) == 0
    shown = capfd.readouterr().out
    assert "tiny: iteration 4 of 4" in shown
    assert "+0.0400" in shown
    assert "rollout        2  ██████████████████·· 90%" in shown
    assert "the last line of the log" in shown


def test_watch_follows_a_run_to_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]))
    # Instead of a wait the run does its next iteration.
    monkeypatch.setattr(
        "time.sleep", lambda _seconds: metrics.write_text("".join(lines[: len(read_run(folder).records) + 1]))
    )
    assert run_command(["watch", str(folder)]) == 0
    shown = capfd.readouterr().out
    assert shown.index("tiny: iteration 2 of 4") < shown.index("iteration 3 of 4") < shown.index("iteration 4 of 4")
