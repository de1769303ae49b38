"""OUT is either not there or complete, and one process at a time works on it."""

import os
from pathlib import Path

import pytest

from hf_quant.cli.folder import Workplace, copy_side_files, output_folder
from hf_quant.errors import RunError
from hf_quant.running.locks import hold


def write(work: Workplace, text: str = "whole") -> None:
    work.model.mkdir()
    (work.model / "config.json").write_text(text)


def test_out_is_the_last_rename(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with output_folder(out) as work:
        write(work)
        assert not out.exists()
    assert (out / "config.json").read_text() == "whole"
    assert os.listdir(out.parent) == ["out"]


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with output_folder(out) as work:
        write(work)
    with pytest.raises(RunError, match="not empty"), output_folder(out) as work:
        write(work, "again")
    assert (out / "config.json").read_text() == "whole"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"), output_folder(tmp_path / "file"):
        pass
    with pytest.raises(RunError, match="cannot write to"), output_folder(tmp_path / "file" / "out"):
        pass


def test_a_failure_leaves_nothing_that_loads_but_keeps_finished_blocks(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted(*, after_a_block: bool) -> None:
        with output_folder(out) as work:
            if after_a_block:
                work.run.mkdir()
                (work.run / "layers.0.safetensors").write_text("a block")
            write(work, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(after_a_block=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        interrupted(after_a_block=True)
    assert not list(tmp_path.rglob("config.json"))
    with output_folder(out) as work:
        assert (work.run / "layers.0.safetensors").read_text() == "a block"
        write(work)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["config.json"]


def test_what_a_killed_run_left_is_dropped_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "out").mkdir(parents=True)
    (tmp_path / "out.partial" / "out" / "old").write_text("half")
    with output_folder(tmp_path / "out") as work:
        write(work)
    assert os.listdir(tmp_path / "out") == ["config.json"]


def test_the_folder_one_stands_in_and_one_with_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with output_folder(Path("out/")) as work:
        assert work.model.name == "out"
        write(work)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with output_folder(Path()) as work:
        assert work.model.name == "here"
        write(work)
    assert os.listdir(tmp_path / "here") == ["config.json"]


def test_two_runs_at_once_refuse(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (
        hold(tmp_path / "out.partial"),
        pytest.raises(RunError, match="another run is writing"),
        output_folder(tmp_path / "out"),
    ):
        pass
    with output_folder(tmp_path / "out") as work:
        write(work)


def test_one_of_several_processes_is_told_what_to_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would find the folder taken by another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="launch a script that calls"), output_folder(tmp_path / "out"):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[Errno 28] No space left on device", "File too large (os error 27)"])
def test_a_full_disk_is_said_to_be_full(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunError, match=r"the disk is full.*the same command"), output_folder(tmp_path / "out"):
        raise OSError(text)


def test_side_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    names = ["tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "generation_config.json"]
    for name in [*names, "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", ".git"]:
        (source / name).write_text("old")
    (source / "config.json").write_text("old")
    (target / "generation_config.json").write_text("new")
    copy_side_files(source, target)
    assert sorted(os.listdir(target)) == sorted(names)
    assert (target / "generation_config.json").read_text() == "new"
