"""`import qmoe`: what it gives and costs, and that transformers knows the format afterwards."""

import json
import subprocess
import sys
import textwrap

import pytest

import qmoe

HEAVY = ("torch", "transformers", "numba", "numpy", "triton", "safetensors", "huggingface_hub")


def _python(*args, check=True):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("how", [["-m", "qmoe", "--help"], ["-c", "import qmoe"]])
def test_help_and_import_load_nothing_heavy(how):
    listed = _python("-X", "importtime", *how).stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in listed.splitlines()}
    assert "qmoe" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_every_name_of_the_face_is_there_and_nothing_else():
    code = "import json, qmoe; print(json.dumps([dir(qmoe), [n for n in vars(qmoe)]]))"
    listed, present = json.loads(_python("-c", code).stdout)
    assert listed == sorted(listed) == sorted(qmoe.__all__)
    public = {n for n in present if not n.startswith("_")}
    by_python = {
        "errors",
        "lazy",
        "system",
        "version",
    }  # submodules that the package itself imports
    assert public - set(listed) <= by_python
    assert all(getattr(qmoe, name) is not None for name in listed)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qmoe.nothing  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import qmoe, transformers",
        "import transformers, qmoe",
        "import qmoe.inference.quantizer",
        "import qmoe.models.projects.openmoe",
    ],
)
def test_transformers_knows_the_format_in_whatever_order_things_are_imported(imports):
    code = f"""
    {imports}
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
    assert known["qmoe"].__name__ == "QmoeQuantizer"
    assert AutoConfig.for_model("fairseq_moe").model_type == "fairseq_moe"
    import transformers
    assert transformers.__spec__.loader.exec_module.__qualname__.startswith("_LoaderBasics")
    """
    _python("-c", textwrap.dedent(code))


SCRIPT = """
import qmoe

settings = qmoe.Settings(method="rd", calib="text.txt", bits=0.8)
report: qmoe.CompressReport = qmoe.compress("MODEL", "OUT", settings)
print(report.sizes.bits_per_weight, qmoe.inspect("OUT").experts, report.out.name)
score: qmoe.Score = qmoe.evaluate("OUT", "dev.txt", reference="MODEL")
print(score.perplexity, score.kl, qmoe.verify("OUT").files)
print(qmoe.export("OUT", "DEST").stored_bytes, qmoe.push("OUT", "owner/name").url)
"""


def _checked(tmp_path, script, more=""):
    (tmp_path / "script.py").write_text(script)
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nstrict = True\ndisallow_any_expr = True\n[mypy-qmoe.*]\nignore_errors = True\n"
        + more
    )
    done = _python(
        "-m", "mypy", "--config-file", str(config), str(tmp_path / "script.py"), check=False
    )
    assert "Success" in done.stdout, done.stdout


def test_a_script_of_a_user_type_checks_without_any(tmp_path):
    # what lies below is not looked into: nothing that the script sees may come from there
    skip = ["torch", "transformers", "numpy", "numba", "safetensors", "huggingface_hub", "tqdm"]
    more = "".join(
        f"[mypy-{n}.*,{n}]\nfollow_imports = skip\nignore_missing_imports = True\n" for n in skip
    )
    _checked(tmp_path, SCRIPT, more)


@pytest.mark.slow
def test_a_loaded_model_has_a_type(tmp_path):
    _checked(tmp_path, SCRIPT + "model = qmoe.load('OUT')\nprint(model.num_parameters())\n")
