"""What the sdist and the wheel hold, and that the wheel works away from the source."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files that git does not track, such as an editor's, may lie in these folders: the tests look for what must be there.
KERNELS = [path for suffix in ("cpp", "cu", "h", "cuh", "py") for path in sorted(ROOT.glob(f"csrc/**/*.{suffix}"))]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel made from it, of a copy of the source."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("bdfast", "csrc", "tools"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    # Unoptimised: the compiler is not what is tested, and takes most of the time.
    environment = {**os.environ, "BDFAST_CUDA": "0", "CXXFLAGS": "-O0"}
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    result = subprocess.run(build, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "dist"


def test_the_sdist_holds_every_kernel_and_what_builds_them(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in KERNELS}
    expected |= {"setup.py", "pyproject.toml", "LICENSE", "tools/toolchain.py", "bdfast/py.typed", "csrc/bindings.cpp"}
    assert expected <= names
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names)


def test_the_wheel_holds_the_package_alone(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        triton = {name for name in names if name.startswith("bdfast/triton_kernels/")}
        for name in triton:  # files with their contents, not the link
            assert archive.read(name) == (ROOT / "csrc" / "triton" / Path(name).name).read_bytes()
    assert triton == {f"bdfast/triton_kernels/{path.name}" for path in (ROOT / "csrc" / "triton").glob("*.py")}
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"bdfast"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bdfast").rglob("*.py")}
    assert modules <= set(names)
    assert f"bdfast/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert "bdfast/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_imports_in_a_fresh_environment_from_another_folder(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    # torch comes from the environment of the tests, by a .pth file after the wheel's own folder; .pth files inside that
    # environment, such as that of an editable install, are not processed.
    (site_packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site_packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import json, bdfast, bdfast._C as c;"
        "print(json.dumps([bdfast.__file__, c.__file__, c.version, bdfast.__version__, c.build_info]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    package, module, built, version, info = json.loads(result.stdout)
    for path in (package, module):
        assert Path(path).is_relative_to(tmp_path / "env")
    assert built == version
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"labels": [1]}, protocol=2))
    code = "from bdfast.untrusted import read_artefact as read; print(read('x.pkl', form='pickle').value)"
    result = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "{'labels': [1]}\n", result.stderr  # the process that reads starts from the wheel, too
    record = json.loads(info)
    assert record["cpu"][0] == "baseline"
    assert record["cuda_architectures"] == []
    assert record["cuda_left_out"] == "BDFAST_CUDA=0"
