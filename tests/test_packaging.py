"""The package list, the mapped folders and the built wheel agree with what is on disk."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("solvers", "pipelines", "configs")
PACKAGE_DATA = {
    "templates": {".html"},
    "configs": {".yaml"},
    "playground/assets": {".safetensors", ".json", ".txt", ".md", ".png"},
}


def _packages_on_disk() -> set[str]:
    def of(folder: Path, name: str) -> set[str]:
        return {
            ".".join([name, *init.parent.relative_to(folder).parts])
            for init in folder.rglob("__init__.py")
            if not any((folder / part).is_symlink() for part in init.relative_to(folder).parts[:1])
        }

    found = of(ROOT / "diffalign", "diffalign")
    for folder in MAPPED:
        found |= of(ROOT / folder, f"diffalign.{folder}")
    return found


def test_package_list_equals_the_folders_on_disk():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject["tool"]["setuptools"]["packages"]) == _packages_on_disk()


def test_imports_from_the_root_with_nothing_installed():
    code = "import diffalign.solvers, diffalign.pipelines, diffalign.configs; print(diffalign.__version__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1


def test_a_copy_without_links_still_imports(tmp_path):
    for folder in MAPPED:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "diffalign").mkdir()
    (tmp_path / "diffalign" / "__init__.py").write_text((ROOT / "diffalign" / "__init__.py").read_text())
    code = "import diffalign.solvers, diffalign.pipelines, diffalign.configs"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    code = "import sys, diffalign; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_every_lazy_name_loads():
    import importlib

    import diffalign

    assert set(diffalign._LAZY) | {"__version__"} == set(diffalign.__all__)
    for name, module in diffalign._LAZY.items():
        assert getattr(diffalign, name) is getattr(importlib.import_module(module), name)
        assert name in dir(diffalign)


def test_wheel_has_one_top_level_name_and_each_file_once(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "."]
    # Not in the build folder of the tree, which may hold what an earlier build left.
    (tmp_path / "own.cfg").write_text(f"[build]\nbuild_base={tmp_path}/build\n")
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(tmp_path / "own.cfg")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"diffalign"}
    assert len(names) == len(set(names))
    assert "diffalign/solvers/__init__.py" in names
    assert "diffalign/py.typed" in names
    for folder, suffixes in PACKAGE_DATA.items():
        on_disk = {
            f"diffalign/{folder}/{file.relative_to(ROOT / source)}"
            for source in [folder if folder in MAPPED else f"diffalign/{folder}"]
            for file in (ROOT / source).rglob("*")
            if file.suffix in suffixes
        }
        assert on_disk == {n for n in names if n.startswith(f"diffalign/{folder}/") and not n.endswith(".py")}
    shipped = {n for n in names if n.endswith(".py")}
    on_disk = set()
    for package in _packages_on_disk():
        parts = package.split(".")
        mapped = len(parts) > 1 and parts[1] in MAPPED
        folder = ROOT.joinpath(*parts[1:]) if mapped else ROOT.joinpath(*parts)
        on_disk |= {"/".join([*parts, file.name]) for file in folder.glob("*.py")}
    assert shipped == on_disk
