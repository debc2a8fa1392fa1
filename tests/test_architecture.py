"""Who may import whom: the arrows of the design, checked on the syntax trees of the whole package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Part of the package -> parts it may import. A part is a folder or module directly under ``diffalign``.
# The leaves are small helpers that all may use and that import nothing of the package but leaves.
LEAVES = {"errors", "report", "output"}
ALLOWED: dict[str, set[str]] = {
    "solvers": set(),
    "losses": set(),
    # The playground's scorer and verifier have names in the table of rewards.
    "rewards": {"playground"},
    "data": set(),
    "vote": {"data"},
    "likelihood": {"solvers"},
    "models": {"solvers", "likelihood"},
    # The playground's shipped models have names that the loader knows.
    "pipelines": {"solvers", "likelihood", "models", "playground"},
    "trainers": {"solvers", "likelihood", "losses", "models", "pipelines", "data", "rewards"},
}
# Losses are functions of tensors: no other heavy import there.
LOSSES_MAY_IMPORT = {"torch", "diffalign", *sys.stdlib_module_names}


def modules() -> dict[str, Path]:
    """Dotted name -> file, for everything that is imported as ``diffalign.*``."""
    found = {}
    for folder, package in (
        ("diffalign", "diffalign"),
        ("solvers", "diffalign.solvers"),
        ("pipelines", "diffalign.pipelines"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "diffalign" and relative.parts[0] in ("solvers", "pipelines", "configs"):
                continue  # the links to the mapped folders
            parts = [*package.split("."), *relative.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands, relative ones resolved."""
    result = []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # ``from diffalign import likelihood`` names a part only in what it imports.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "diffalign" else [base]
            result += [(node.lineno, n) for n in names]
    return result


def part(name: str) -> str | None:
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "diffalign" and len(pieces) > 1 else None


MODULES = modules()


def test_the_tree_is_seen():
    parts = {part(name) for name in MODULES}
    assert {"solvers", "pipelines", "errors", "cli"} <= parts


@pytest.mark.parametrize("owner", sorted(ALLOWED))
def test_arrows(owner):
    wrong = []
    for name, path in MODULES.items():
        if part(name) != owner:
            continue
        for line, target in imports(name, path):
            other = part(target)
            if other is not None and other not in ALLOWED[owner] | LEAVES | {owner}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_leaves_are_leaves():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in MODULES.items()
        if part(name) in LEAVES
        for line, target in imports(name, path)
        if part(target) not in LEAVES | {None}
    ]
    assert not wrong, "\n".join(wrong)


def test_losses_know_only_torch():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in MODULES.items()
        if part(name) == "losses"
        for line, target in imports(name, path)
        if target.split(".")[0] not in LOSSES_MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_but_the_command_line_imports_it():
    """``bench`` sees all but ``cli``; so does everybody else. ``__main__`` starts it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for name, path in MODULES.items()
        if part(name) not in ("cli", "commands", "__main__")
        for line, target in imports(name, path)
        if part(target) in ("cli", "commands")
    ]
    assert not wrong, "\n".join(wrong)


def test_a_wrong_arrow_would_be_found(tmp_path):
    """The check itself: plain, from, relative and nested imports are all seen."""
    file = tmp_path / "x.py"
    file.write_text(
        "import diffalign.trainers.dpo\nfrom diffalign import likelihood\nfrom diffalign.data import pairs\n"
        "def f():\n    from ..rewards import clip\n"
    )
    assert [part(t) for _, t in imports("diffalign.solvers.x", file)] == [
        "trainers",
        "likelihood",
        "data",
        "rewards",
    ]


def test_scheduler_modules_stay_loadable_by_diffusers():
    """Saved pipelines name a scheduler by its module: it must be flat and have SchedulerMixin in sight."""
    from diffusers import SchedulerMixin

    from diffalign.solvers import SOLVERS

    for cls in SOLVERS.values():
        assert cls.__module__.count(".") == 2, (
            f"{cls.__name__} must live in a flat module of diffalign.solvers"
        )
        assert getattr(sys.modules[cls.__module__], "SchedulerMixin", None) is SchedulerMixin
