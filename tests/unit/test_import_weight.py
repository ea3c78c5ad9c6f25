"""What a command or a first import drags in, by name and number rather than by seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PRINT_HELP = """
import contextlib, io, sys
sys.argv = ["dkdetr", *{arguments}]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    import cli
    cli.main()
"""
_COUNT = """
import json, sys, sysconfig
packages = sysconfig.get_paths()["purelib"]
files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
foreign = {name.partition(".")[0] for name, file in files.items() if file.startswith(packages)}
foreign |= {"torch", "zarr", "open_clip", "dask", "faiss"} & set(sys.modules)  # wherever they lie
print(json.dumps([len(files), sorted(foreign)]))
"""
# Packages that an installation may load before any code of ours (editable installs, coverage).
_NOT_OURS = ("__editable__", "_distutils_hack", "_virtualenv", "a1_coverage")
_TYPER_AND_ITS_OWN = {
    "typer", "shellingham", "annotated_doc", "typing_extensions",
    "pydantic", "pydantic_core", "typing_inspection", "annotated_types",
}  # fmt: skip


def imported_by(code: str) -> tuple[int, set[str]]:
    """Returns the number of modules and the installed packages a fresh interpreter then holds."""
    done = subprocess.run(
        [sys.executable, "-c", code + _COUNT],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    number, foreign = json.loads(done.stdout.splitlines()[-1])
    return number, {name for name in foreign if not name.startswith(_NOT_OURS)}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["cache", "--help"]])
def test_help_imports_typer_and_nothing_else(arguments: list[str]):
    number, foreign = imported_by(_PRINT_HELP.format(arguments=arguments))
    assert foreign <= _TYPER_AND_ITS_OWN
    assert number < 400


def test_what_is_imported_would_be_noticed():
    assert "dask" in imported_by("import dask")[1]


def test_the_package_itself_imports_nothing():
    _, foreign = imported_by("import dkdetr")
    assert foreign == set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "from dkdetr import DKDETR; DKDETR",
            {"open_clip", "zarr", "dask", "faiss", "matplotlib", "jinja2", "huggingface_hub",
             "scipy", "transformers", "pycocotools", "lvis", "starlette", "av", "supervision"},
        ),
        (
            "import dkdetr.engine.train",
            {"open_clip", "zarr", "dask", "distributed", "faiss", "matplotlib", "jinja2",
             "huggingface_hub", "transformers", "lvis", "starlette", "av", "supervision",
             "tensorboard"},
        ),
        ("import cache.store", {"torch", "zarr", "faiss", "dask"}),
    ],
)  # fmt: skip
def test_what_is_not_needed_is_not_imported(code: str, absent: set[str]):
    _, foreign = imported_by(code)
    assert foreign & absent == set()
