"""The demo's driver: what it does again, what it leaves, how it stops."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(demo, monkeypatch, tmp_path):
    """Three stages that only write their results; the commands that were called."""
    made: list[str] = []
    results = {name: tmp_path / name for name in ("one", "two", "three")}

    def call(command):
        made.append(command[0])
        if demo.failing == command[0]:
            return 143
        results[command[0]].write_text("done")
        return 0

    demo.failing = None
    monkeypatch.setattr(demo, "call", call)
    monkeypatch.setattr(
        demo, "stages", lambda out, scratch: [demo.Stage(n, [[n]], r) for n, r in results.items()]
    )
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    return made


def test_finished_stages_are_not_done_again(demo, calls):
    assert demo.main() == 0
    assert demo.main() == 0
    assert calls == ["one", "two", "three"]


def test_a_stopped_stage_is_done_again_with_its_time_added(demo, calls, tmp_path):
    demo.failing = "two"
    assert demo.main() == 143
    held = json.loads((tmp_path / "stages.json").read_text())
    assert not held["two"]["done"]
    held["two"]["seconds"] = 50.0
    (tmp_path / "stages.json").write_text(json.dumps(held))
    demo.failing = None
    assert demo.main() == 0
    assert calls == ["one", "two", "two", "three"]
    assert json.loads((tmp_path / "stages.json").read_text())["two"]["seconds"] >= 50.0


def test_what_follows_a_missing_result_is_done_again(demo, calls, tmp_path):
    demo.main()
    (tmp_path / "two").unlink()
    calls.clear()
    demo.main()
    assert calls == ["two", "three"]


def test_every_command_of_the_demo_is_one_that_the_programs_know(demo):
    import fact_infer.cli.main
    from fact_convert.cli.main import _parser as convert
    from fact_train.cli.main import _parser as train

    parsers = {
        "fact-infer": fact_infer.cli.main._parser(),
        "fact-convert": convert(),
        "fact-train": train(),
    }
    for scratch in (False, True):
        for stage in demo.stages(Path("out"), scratch):
            for program, *arguments in stage.commands:
                parsers[program].parse_args(arguments)  # exits if it does not


def test_duration_from_nothing_is_the_shipped_run_s(demo, tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "steps_per_second": v} for s, v in ((1, 0.1), (600, 2.0), (1200, 2.0))]
    log.write_text("\n".join(map(json.dumps, rows)))
    assert "1200 steps" in demo.announce(log)
    assert "10 minutes" in demo.announce(log)


def test_programs_are_called_and_their_status_is_kept(demo, tmp_path, monkeypatch):
    program = tmp_path / "fact-say"
    program.write_text("#!/bin/sh\nexit $1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert demo.call(["fact-say", "0"]) == 0
    assert demo.call(["fact-say", "7"]) == 7
    assert demo.call(["fact-nothing"]) == 2


def test_only_what_an_earlier_attempt_left_is_removed(demo, calls, tmp_path, monkeypatch):
    """A folder of that name which was there before the demo is somebody's."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.png").write_text("")
    record = demo.Record(tmp_path / "stages.json")
    stage = demo.Stage("one", [["one"]], tmp_path / "one", (mine, tmp_path / "page.html"))
    demo.failing = "one"
    assert demo.run(stage, record) == 143
    assert (mine / "photo.png").exists()
    (tmp_path / "page.html").write_text("")
    assert demo.run(stage, record) == 143
    assert not mine.exists()
    assert not (tmp_path / "page.html").exists()
