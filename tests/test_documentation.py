"""The documentation is true: its code runs, its commands parse, its links lead somewhere."""

import math
import re
import shlex
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """Whole command lines in code blocks and back quotes that start with ``diffalign``."""
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(diffalign [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("diffalign ")]
    return [w for w in words if not {"...", "<command>", "<method>"} & set(w)]


def load(code: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(page):
    for words in commands(page.read_text()):
        words[1:2] = cli.ALIASES.get(words[1], words[1]).split()
        name = next((" ".join(words[1:n]) for n in (3, 2) if " ".join(words[1:n]) in cli.COMMANDS), None)
        if name is None:  # a group such as `diffalign bench`, or `diffalign --help`
            assert words[1].startswith("--") or any(c.split()[0] == words[1] for c in cli.COMMANDS), words
            continue
        options = words[1 + len(name.split()) :]
        if not options:  # only named
            continue
        cls = cli._load(cli.COMMANDS[name].config)
        cli.parse(cls, options, prog=name, example="")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_are_found_in_a_page():
    block = "```\ndiffalign sample \\\n    --steps 3  # why\nmake demo\n```\n"
    text = block + "and `diffalign demo` or `diffalign x ...`"
    assert commands(text) == [["diffalign", "sample", "--steps", "3"], ["diffalign", "demo"]]


def test_the_solver_walk_gives_a_second_order_solver():
    from diffalign.bench.networks import SD_SCHEDULER
    from diffalign.solvers import GaussianMixture, NoiseSchedule, sample

    code = next(block for block in blocks(CONTRIBUTING, "python") if "AB2Scheduler" in block)
    cls = load(code, "contributing_ab2").AB2Scheduler
    mixture, schedule = GaussianMixture.random((2, 3)), NoiseSchedule.from_config(SD_SCHEDULER)
    noise = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = schedule.t_min
    exact = mixture.solve(noise, schedule, t_end=end)
    errors = []
    for n in (40, 80, 160):
        times = schedule.t_of_lambda(
            np.linspace(*(float(schedule.lambda_(t)) for t in (schedule.t_max, end)), n + 1)
        )
        scheduler = cls.from_config(SD_SCHEDULER, final_sigmas_type="sigma_min")
        drawn = sample(mixture.model(schedule), noise, scheduler, timesteps=list(times[:-1]))
        errors.append(float((drawn - exact).norm() / exact.norm()))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(slopes) > 1.8, slopes


def test_the_loss_walk_gives_a_loss(monkeypatch):
    from diffalign import losses
    from diffalign.trainers import DiffusionDPOConfig

    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    code = "from diffalign.losses import *\nfrom diffalign.losses import Beta, LOSSES, Loss, Tensor, torch\n"
    code += "\n".join(block for block in blocks(CONTRIBUTING, "python") if "squared_hinge" in block)
    load(code, "contributing_loss")
    row = losses.get_loss("squared_hinge")
    value = row.fn(torch.tensor([0.2, 9.0]), torch.tensor([0.1, 0.0]), 2.0, margin=0.5)
    torch.testing.assert_close(value, torch.tensor([0.09, 0.0]))
    DiffusionDPOConfig(
        pretrained_model_name_or_path="x", loss_type="squared_hinge", loss_options={"margin": 0.5}
    ).check()


def test_the_trainer_walk_gives_a_trainer(tmp_path):
    from diffalign.likelihood import Errors

    code = next(block for block in blocks(CONTRIBUTING, "python") if "GuardedSFTTrainer" in block)
    module = load(code, "contributing_trainer")
    config = cli.parse(module.GuardedSFTConfig, ["--guard", "0.5"], prog="diffalign train x", example="")
    assert config.guard == 0.5
    config.output_dir = str(tmp_path / "out")
    trainer = module.GuardedSFTTrainer(config, model="owner/name", dataset="unused")
    assert not trainer.__abstractmethods__
    errors = Errors(policy=torch.tensor([1.0, 2.0]), reference=torch.tensor([1.0, 3.0]))
    loss, logit = trainer.pair_loss(errors, batch=None)
    torch.testing.assert_close(loss, torch.tensor([1.25]))  # 1 + 0.5 relu(-(2 - 3) / 2)
    torch.testing.assert_close(logit, torch.tensor([-0.5]))


RUNS = re.compile(r"^<!-- runs(?:, with (.+?))? -->\n```(\w*)\n(.*?)^```", re.S | re.M)


def runnable(page: str) -> list[tuple[str, str]]:
    """Language and text of the blocks below ``<!-- runs -->``.

    ``<!-- runs, with 1 for 100; a for b -->`` changes the numbers to small ones, which must be there.
    """
    found = []
    for changes, language, code in RUNS.findall(page):
        for change in filter(None, changes.split("; ")):
            new, _, old = change.partition(" for ")
            assert old in code, f"{old!r} is not in the block that begins {code[:60]!r}"
            code = code.replace(old, new)
        found.append((language, code))
    return found


@pytest.mark.parametrize("name", ["benchmarking", "calibration", "steering"])
def test_the_tutorials_run_on_the_playground(name, tmp_path, monkeypatch):
    """All runnable blocks of a page one after the other, as a reader would paste them: commands and code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parts = runnable((ROOT / "docs" / f"{name}.md").read_text())
    assert any(language == "python" for language, _ in parts)
    namespace: dict[str, object] = {"__name__": f"docs_{name}"}
    for language, code in parts:
        if language == "python":
            exec(compile(code, f"docs/{name}.md", "exec"), namespace)
        else:
            for words in commands(f"```\n{code}```\n"):
                assert cli.main(words[1:]) == 0, words


def test_runnable_blocks_are_found_and_changed():
    page = "<!-- runs, with 1 for 100 -->\n```python\nf(100)\n```\n```python\ng()\n```\n"
    assert runnable(page) == [("python", "f(1)\n")]
    assert runnable("<!-- runs -->\n```\ndiffalign demo\n```\n") == [("", "diffalign demo\n")]
    with pytest.raises(AssertionError, match="'100' is not in the block"):
        runnable(page.replace("f(100)", "f(99)"))
