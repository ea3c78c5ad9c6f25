"""The wheel works outside the checkout, carries no user's cache, and stays small."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

from tests.e2e.commands import ROOT

_EXTRAS = {"cpu", "gpu", "demo", "video", "export", "serve", "track", "dev"}
_LARGEST_WHEEL_BYTES = 8_000_000
"""6.4 MB of it are the small CLIP and the small backbone."""
_INSIDE = {
    "cli.py",
    "cache/store.py",
    "dkdetr/data/names/lvis.tsv",
    "dkdetr/evaluation/charts.html",
    "dkdetr/evaluation/report.html",
    "dkdetr/evaluation/report_analysis.html",
    "dkdetr/experiments/lvis_r50_70e.toml",
    "dkdetr/inference/serve_curves.html",
    "dkdetr/inference/serve_page.css",
    "dkdetr/inference/serve_page.html",
    "dkdetr/inference/serve_page.js",
    "dkdetr/student/slim_resnet_pictograms.safetensors",
    "pipeline/browse.html",
    "pipeline/pictograms/assets/pictograms_clip.json",
    "pipeline/pictograms/assets/pictograms_clip.safetensors",
    "pipeline/pictograms/assets/pictograms_clip_merges.txt.gz",
}
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
    assert wheel.stat().st_size < _LARGEST_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = BytesParser().parsebytes(archive.read(about))
    assert names >= _INSIDE
    assert set(metadata.get_all("Provides-Extra")) >= _EXTRAS
    assert metadata["License-Expression"] == "Apache-2.0"
    outside = ("cache/lvis", "tests/", "docker/", ".ci/")
    assert not [name for name in names if name.startswith(outside)]
    # Everything that is no code and lies in a package was meant to be in the wheel, and is.
    packaged = {
        str(path.relative_to(source))
        for room in ("dkdetr", "pipeline")
        for path in (source / room).rglob("*")
        if path.suffix in {".html", ".css", ".js", ".toml", ".safetensors", ".gz", ".tsv"}
    }
    assert packaged <= names
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    words = tmp_path / "größe 1" / "names.txt"
    words.parent.mkdir()
    words.write_text("hammer\nred apple\n")
    shown = run_installed(target, tmp_path, "config", "show", "pictograms_tiny")
    assert "name = 'pictograms_tiny'" in shown
    built = run_installed(
        target, tmp_path, "vocab", "build", str(words), "-o", str(words.with_suffix(".vocab")),
        "--teacher", "pictograms", "--prompts", "single",
    )  # fmt: skip
    assert "names: 2 (2 base): hammer, red apple" in built


def run_installed(target: Path, cwd: Path, *arguments: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        check=False, capture_output=True, text=True, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
