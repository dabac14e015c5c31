"""Nothing but the same compression touches what an unfinished one left, and what was made in vain
leaves nothing."""

import os

import pytest
from container_parts import fill, tree
from test_importers import openmoe_source

import qmoe
from qmoe.errors import OutputError, SourceError
from qmoe.models.importers import IMPORTERS
from qmoe.publish.export import export
from qmoe.store.writer import ContainerWriter
from qmoe.system.files import partial_of, staged


def _state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("how", ["export", "import", "save"])
def test_an_unfinished_compression_survives(how, held, compressed, tmp_path):
    out = tmp_path / "out"
    openmoe_source(tmp_path / "src")
    act = {
        "export": lambda: export(compressed[0], out),
        "import": lambda: IMPORTERS["openmoe"](tmp_path / "src", out),
        "save": lambda: qmoe.load(compressed[0]).save_pretrained(out),
    }[how]
    writer = ContainerWriter(out, job={"seed": 1})
    fill(writer, "m")
    if not held:
        writer.close()
    before = _state(partial_of(out))
    with pytest.raises(OutputError, match=r"out\.partial holds an unfinished compression"):
        act()
    assert _state(partial_of(out)) == before
    assert not out.exists()
    writer.close()
    with ContainerWriter(out, job={"seed": 1}, resume=True) as again:
        assert again.finished_blocks() == {"m": {"seed": 0}}
        again.discard()
    act()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
    openmoe_source(tmp_path / "src")
    monkeypatch.setattr("qmoe.models.importers.writing._chunks", _fails)
    with pytest.raises(SourceError, match="cut short"):
        IMPORTERS["openmoe"](tmp_path / "src", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def _fails(name, part):
    yield b""
    raise SourceError("cut short")


def test_a_staged_directory(tmp_path):
    out = tmp_path / "out"
    with (
        staged(out, "export"),
        pytest.raises(OutputError, match="another run is writing"),
        staged(out, "export"),
    ):
        pass
    assert out.is_dir()
    out.rmdir()
    dead = tmp_path / "out.export"  # of a process that was killed
    (dead / "data").mkdir(parents=True)
    (dead / "data/half").write_text("")
    (dead / "lock").write_text("")
    with staged(out, "export") as work:
        (work / "whole").write_text("")
    assert tree(out) == {"whole": b""}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "out.export").mkdir()
    (tmp_path / "out.export/thesis").write_text("mine")
    with pytest.raises(OutputError, match="in the way"), staged(tmp_path / "out", "export"):
        pass
    assert (tmp_path / "out.export/thesis").read_text() == "mine"


def test_the_lock_is_let_go_after_a_refusal(tmp_path, monkeypatch):
    """The output may appear between the first look and the lock."""
    out, looks = tmp_path / "out", []

    def appears(writer):
        looks.append(len(os.listdir("/proc/self/fd")))
        if len(looks) > 1:
            raise OutputError(f"{out} already exists")

    monkeypatch.setattr(ContainerWriter, "_check_free", appears)
    with pytest.raises(OutputError, match="already exists"):
        ContainerWriter(out)
    assert len(os.listdir("/proc/self/fd")) == looks[0]


def test_every_file_is_hashed_once(tmp_path, monkeypatch):
    from qmoe.store import writer as module

    hashed, real = [], module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda p: hashed.append(p.name) or real(p))
    names = [f"b{i}" for i in range(12)]

    def write(until):
        with ContainerWriter(tmp_path / "out", resume=True) as made:
            for name in names[:until]:
                if name not in made.finished_blocks():
                    fill(made, name)
            if until == len(names):
                made.finish(names, config={"model_type": "x"}, settings={}, versions={}, source={})

    write(7)
    assert hashed == []  # what this process wrote it knows
    write(12)
    assert sorted(hashed) == sorted(f"qmoe-{n}.safetensors" for n in names[:7])
