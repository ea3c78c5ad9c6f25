"""The wheel works outside the checkout and carries no user's cache."""

import shutil
import subprocess
import sys
import zipfile

from tests.e2e.commands import ROOT

_SOURCES = ("cli.py", "pyproject.toml", "README.md", "LICENSE", "dkdetr", "pipeline", "cache")


def test_a_wheel_built_beside_a_cache_installs_and_runs(tmp_path) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in _SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    (source / "cache" / "lvis").mkdir()
    (source / "cache" / "lvis" / "CACHE.json").write_text("{}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "cache/store.py" in names
    assert "dkdetr/student/slim_resnet_pictograms.safetensors" in names
    assert "pipeline/pictograms/assets/pictograms_clip.safetensors" in names
    assert "dkdetr/evaluation/report.html" in names
    assert not [name for name in names if name.startswith(("cache/lvis", "tests/"))]
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    shown = subprocess.run(
        [sys.executable, "-I", "-c",
         f"import sys; sys.path.insert(0, {str(target)!r}); import cli; cli.main()",
         "config", "show", "pictograms_tiny"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "name = 'pictograms_tiny'" in shown.stdout
