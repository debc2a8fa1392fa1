"""The command line: what it prints, what it refuses, and its exit codes."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from diffalign import cli
from diffalign.errors import RunFailed, UserError, describe

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Inner:
    """Inner options.

    Attributes:
        rank: of something
    """

    rank: int = 4


@dataclass(frozen=True)
class ToyConfig:
    """Do a toy thing.

    More about it.

    Attributes:
        steps: how many steps to take
        seeds: the seeds
    """

    steps: int = 3
    rate: float = 0.5
    seeds: list[int] = field(default_factory=lambda: [0])
    words: list[str] | None = None
    kind: Literal["fast", "slow"] = "fast"
    loud: bool = False
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, int | float | bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be at least 1")


def parse(*args: str):
    return cli.parse(ToyConfig, args, prog="diffalign toy", example="diffalign toy --steps 4")


def run_module(*args: str, cwd=ROOT, env=None):
    command = [sys.executable, "-m", "diffalign", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(env or {})})


@pytest.fixture
def toy(monkeypatch):
    """The command ``diffalign toy``, whose body a test may set by ``toy(function)``."""

    def install(body):
        monkeypatch.setattr(cli, "toy_body", body, raising=False)
        monkeypatch.setattr(cli, "ToyConfig", ToyConfig, raising=False)
        command = cli.Command("diffalign.cli:ToyConfig", "diffalign.cli:toy_body", "a toy", "diffalign toy")
        monkeypatch.setitem(cli.COMMANDS, "toy", command)

    return install


# ------------------------------------------------------------------------------------------------ options


def test_defaults_and_overrides():
    assert parse() == ToyConfig()
    assert parse("--steps", "7", "--inner.rank=9").inner == Inner(9)
    assert parse("--extra.order", "3", "--extra.name", "x").extra == {"order": 3, "name": "x"}


@pytest.mark.parametrize("given", [["1", "-2"], ["[1, -2]"], ["[1,-2]"]])
def test_lists_are_words_or_yaml(given):
    assert parse("--seeds", *given, "--steps", "5") == ToyConfig(seeds=[1, -2], steps=5)


@pytest.mark.parametrize("words", [["a red star"], ["a, b", "no: 'c'"], ["12"], ["[x] y"], ["true"]])
def test_words_stay_words(words):
    assert parse("--words", *words).words == words


@pytest.mark.parametrize(
    ("args", "loud"), [(["--loud"], True), (["--loud", "--steps", "1"], True), (["--loud", "false"], False)]
)
def test_a_boolean_alone_is_true(args, loud):
    assert parse(*args).loud is loud


def test_yaml_then_options(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# diffalign toy --config c.yaml\nsteps: 8\nseeds: [4, 5]\ninner: {rank: 2}\n")
    got = parse("--config", str(file), "--seeds", "6")
    assert got == ToyConfig(steps=8, seeds=[6], inner=Inner(2))
    assert parse("--seeds", "6", "--config", str(file)).seeds == [4, 5]  # in the order written


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    from diffalign import configs

    monkeypatch.chdir(tmp_path)
    shipped = next((ROOT / "configs" / "train").glob("*.yaml"))
    name = f"configs/{shipped.parent.name}/{shipped.name}"
    assert Path(configs.resolve(["--config", name])[1]).samefile(shipped)
    assert Path(configs.resolve([f"--config={name}"])[0].removeprefix("--config=")).samefile(shipped)
    (tmp_path / "configs" / shipped.parent.name).mkdir(parents=True)
    (tmp_path / name).write_text("steps: 1\n")
    assert configs.resolve(["--config", name]) == ["--config", name]  # the user's own file goes first


def test_print_config_can_be_read_back(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    assert parse("--steps", "9", "--words", "a", "b", "--print_config") is None
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["steps"] == 9
    assert parse("--config", str(file)) == ToyConfig(steps=9, words=["a", "b"])


def test_help_teaches(capsys):
    assert parse("--help") is None
    text = capsys.readouterr().out
    for part in ("Do a toy thing.", "More about it.", "how many steps to take", "default: 3", "--inner.rank"):
        assert part in text
    assert "of something" in text
    assert "example:\n  diffalign toy --steps 4" in text
    assert "Attributes:" not in text


def test_a_setting_of_an_item_in_a_list_is_named_as_one():
    from diffalign.trainers import DiffusionDPOConfig

    with pytest.raises(UserError, match="--losses: unknown setting 'wieght'; did you mean 'weight'"):
        cli.parse(DiffusionDPOConfig, ["--losses", "[{name: sft, wieght: 2}]"], prog="train", example="")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--stepz", "3"], ["unknown option --stepz", "did you mean '--steps'?"]),
        (["--qqqqq", "3"], ["unknown option --qqqqq", "--help' lists all"]),
        (["--step", "3"], ["did you mean '--steps'?"]),
        (["--steps", "many"], ["--steps takes a whole number, not 'many'"]),
        (["--rate", "x"], ["--rate takes a number, not 'x'"]),
        (["--loud", "maybe"], ["--loud takes true or false, not 'maybe'"]),
        (["--kind", "medium"], ["--kind takes one of fast, slow, not 'medium'"]),
        (["--seeds", "a"], ["--seeds takes a list (a whole number each), not 'a'"]),
        (["--inner.rank", "x"], ["--inner.rank takes a whole number, not 'x'"]),
        (["--steps"], ["option --steps needs a value"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--steps", "0"], ["steps must be at least 1"]),
        (["--config", "nowhere.yaml"], ["no such config file", "nowhere.yaml"]),
    ],
)
def test_bad_options_are_named_in_one_sentence(args, parts):
    with pytest.raises(UserError) as caught:
        parse(*args)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "<class" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stepz: 3\n", "did you mean '--steps'?"),
        ("steps: [1\n", "not valid YAML"),
        ("steps: many\n", "--steps takes a whole number, not 'many'"),
        ("inner: {rank: x}\n", "--inner.rank takes a whole number"),
    ],
)
def test_bad_yaml_is_named_in_one_sentence(tmp_path, text, part):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(part)):
        parse("--config", str(file))


# ------------------------------------------------------------------------------------ commands, exit codes


def test_main_runs_a_command(toy):
    seen = []
    toy(seen.append)
    assert cli.main(["toy", "--steps", "2"]) == 0
    assert seen == [ToyConfig(steps=2)]


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("bad thing"), 2, "bad thing"),
        (RunFailed("loss is nan at step 3"), 3, "loss is nan at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 3, "no space left for '/x/y'"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "no permission for '/x'"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "no permission for '/x'"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 2, "no such file or folder: '/x'"),
        (MemoryError(), 3, "out of memory"),
        (ModuleNotFoundError("No module named 'lpips'", name="lpips"), 3, "'lpips'"),
        (KeyError("oops"), 3, "KeyError: 'oops' (--debug shows where)"),
    ],
)
def test_errors_are_one_sentence_with_an_exit_code(toy, capsys, error, code, part):
    def body(_):
        raise error

    toy(body)
    assert cli.main(["toy"]) == code
    shown = capsys.readouterr().err
    assert shown.startswith("diffalign: ")
    assert part in shown
    assert shown.count("\n") == 1
    assert cli.main(["toy", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_torch_out_of_memory_is_recognised():
    torch = pytest.importorskip("torch")
    assert describe(torch.OutOfMemoryError("CUDA out of memory"))[0].startswith("out of memory")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["demmo"], ["unknown command 'demmo'", "did you mean 'demo'?"]),
        (["train", "difusion-dpo"], ["unknown command 'train difusion-dpo'", "'train diffusion-dpo'?"]),
        (["train", "dpo"], ["did you mean 'train diffusion-dpo' or 'train flow-dpo'"]),
        (["check"], ["did you mean 'data check'?"]),
        (["zzzzzz"], ["known: "]),
    ],
)
def test_unknown_commands_are_named(capsys, args, parts):
    assert cli.main(args) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts)


@pytest.mark.parametrize(
    ("command", "names"),
    [("sample", range(2, 7)), ("train diffusion-dpo", (0, 1, *range(7, len(cli._SAME))))],
)
def test_names_of_diffusers_and_trl_lead_to_ours(capsys, command, names):
    for ours, *others in (cli._SAME[i] for i in names):
        for other in others:
            assert cli.main([*command.split(), f"--{other}", "1"]) == 2
            assert f"unknown option --{other}; did you mean '--{ours}'?" in capsys.readouterr().err


@pytest.mark.parametrize(("args", "code"), [(["--help"], 0), ([], 2), (["bench"], 2), (["bench", "-h"], 0)])
def test_overview(capsys, args, code):
    assert cli.main(args) == code
    text = capsys.readouterr().out
    assert "bench samplers" in text
    assert "example:" in text
    assert ("playground build" in text) == ("bench" not in args)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_and_a_true_example(capsys, name):
    """The example of each command parses with its own options."""
    import shlex

    command = cli.COMMANDS[name]
    assert cli.main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert command.example in text
    words = shlex.split(command.example)
    assert words[: 1 + len(name.split())] == ["diffalign", *name.split()]
    cls = cli._load(command.config)
    got = cli.parse(cls, words[1 + len(name.split()) :], prog=name, example="")
    assert isinstance(got, cls)
    assert callable(cli._load(command.run))


OPTIONS = [f for f in sorted((ROOT / "configs").glob("*/*.yaml")) if f.parent.name != "accelerate"]


@pytest.mark.parametrize("file", OPTIONS, ids=lambda f: f.name)
def test_shipped_configs_start_with_the_command_that_runs_them(file):
    first = file.read_text().splitlines()[0].removeprefix("# ").split()
    assert first[0] == "diffalign"
    name = " ".join(first[1:3])
    assert f"configs/{file.parent.name}/{file.name}" in first
    cls = cli._load(cli.COMMANDS[name].config)
    assert isinstance(cli.parse(cls, ["--config", str(file)], prog=name, example=""), cls)


def test_module_start_is_light_and_prints_help():
    code = (
        "import sys; from diffalign.cli import main; assert main(['--help']) == 0;"
        "assert not {'torch', 'numpy', 'diffusers', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = run_module("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("diffalign ")


def test_help_into_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m diffalign --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


def test_help_needs_no_torch():
    light = [name for name in cli.COMMANDS if name.startswith("calibrate ")] + ["sample", "bench samplers"]
    code = (
        "import sys; from diffalign.cli import main\n"
        f"for name in {light}: assert main([*name.split(), '--help']) == 0, name\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- sample


def test_lists_name_everything_with_what_it_is(capsys):
    from diffalign.losses import LIST_LOSSES, LOSSES
    from diffalign.rewards import REWARDS
    from diffalign.solvers import SOLVERS

    for what, names in (("solvers", SOLVERS), ("losses", [*LOSSES, *LIST_LOSSES]), ("rewards", REWARDS)):
        assert cli.main(["list", what]) == 0
        lines = capsys.readouterr().out.splitlines()
        told = {
            name.split("  ")[0]: text for name, text in itertools.pairwise(lines) if text.startswith("    ")
        }
        assert set(names) <= set(told)
        assert all(len(told[name].split()) > 3 for name in names)


def test_sample_writes_images_grid_and_settings(tiny_folder, tmp_path, capsys):
    from PIL import Image

    from diffalign.data import open_images

    out = tmp_path / "out"
    base = ["sample", "--model", tiny_folder, "--output_dir", str(out), "--device", "cpu", "--steps", "3"]
    args = [*base, "--prompts", "a", "b", "--seeds", "5", "6", "--solver", "dpm-solver++"]
    assert cli.main([*args, "--solver_options.solver_order", "3"]) == 0
    files = sorted(f.name for f in out.iterdir())
    assert files == [*(f"0000{i}.png" for i in range(4)), "grid.png", "metadata.jsonl", "settings.json"]
    assert open_images(out).prompts == ["a", "a", "b", "b"]
    record = json.loads((out / "settings.json").read_text())
    assert record["nfe_per_image"] == 3
    assert record["scheduler"] == "DPMSolverPPScheduler"
    assert record["scheduler_config"]["solver_order"] == 3
    assert [(i["prompt"], i["seed"]) for i in record["images"]] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert Image.open(out / "00000.png").size == (32, 32)
    assert str(out / "grid.png") in capsys.readouterr().out

    assert cli.main([*base, "--prompts", "a"]) == 2  # in use
    assert "is not empty; add --overwrite" in capsys.readouterr().err
    assert sorted(f.name for f in out.iterdir()) == files

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n\n  b \n")
    again = [*base, "--prompt_file", str(prompts), "--solver", "EulerDiscreteScheduler", "--overwrite"]
    assert cli.main(again) == 0
    assert len(list(out.glob("0*.png"))) == 2  # pictures of the first run are gone
    assert json.loads((out / "settings.json").read_text())["scheduler"] == "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--prompts", "a", "--model", "./nowhere"], ["no model at './nowhere'"]),
        (["--prompts", "a", "--solver", "dpm-solver+"], ["unknown solver 'dpm-solver+'", "'dpm-solver++'"]),
        (["--prompts", "a", "--solver", "EulerDiscretScheduler"], ["did you mean 'EulerDiscreteScheduler'?"]),
        (["--prompts", "a", "--solver", "ddim", "--solver_options.etta", "1"], ["no option 'etta'", "'eta'"]),
        (["--prompts", "a", "--lora", "/nowhere"], ["no LoRA at '/nowhere'"]),
        (["--prompts", "a", "--device", "warp"], ["device 'warp' cannot be used here"]),
        (["--prompt_file", "nowhere.txt"], ["cannot read the prompt file 'nowhere.txt'"]),
        ([], ["no prompts; give --prompts"]),
        (["--prompts", "a", "--batch_size", "0"], ["--batch_size must be at least 1"]),
    ],
)
def test_sample_refuses_bad_input(tiny_folder, tmp_path, capsys, args, parts):
    base = ["sample", "--model", tiny_folder, "--output_dir", str(tmp_path / "out")]
    assert cli.main([*base, *args]) == 2
    shown = capsys.readouterr().err
    for part in parts:
        assert part in shown
    assert "Traceback" not in shown


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path, capsys, tiny_folder):
    (tmp_path / "file").write_text("")
    args = ["sample", "--model", tiny_folder, "--prompts", "a", "--output_dir", str(tmp_path / "file")]
    assert cli.main(args) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_earlier_file(tmp_path):
    from diffalign.output import write_text

    target = tmp_path / "a.json"
    target.write_text("before")
    (tmp_path / ".a.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        write_text(target, "after" * 10)
    assert describe(caught.value)[1] == 3
    assert target.read_text() == "before"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.slow
def test_ctrl_c_gives_one_sentence_and_130(tiny_folder, tmp_path):
    import signal

    args = ["sample", "--model", tiny_folder, "--prompts", "a", "--steps", "900", "--device", "cpu"]
    args += ["--output_dir", str(tmp_path / "o"), "--seeds", *map(str, range(200))]
    reading, writing = os.pipe()
    child = os.fork()  # a copy of this process has all libraries loaded
    if not child:
        # A suite in the background of a shell inherits that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = os.fdopen(writing, "w", buffering=1)
        code = cli.main(args)
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as said:
        while "step" not in (line := said.readline(200)):
            assert line, "it ended before it drew"
        os.kill(child, signal.SIGINT)
        rest = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130, rest
    assert "Traceback" not in rest
    assert rest.rstrip().endswith("diffalign: interrupted; what was saved before is kept")
