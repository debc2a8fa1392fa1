"""The command line: ``diffalign <command> [options]``.

Every command is a dataclass of options and a function that takes it; this file only finds them, reads the
options (YAML file, then command line) and turns errors into one sentence and an exit code:
0 done, 2 bad input, 3 a run that failed, 130 interrupted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffalign.errors import UserError, describe, suggestion


@dataclass(frozen=True)
class Command:
    """One command: where it lives, a line for the list, and an example line for its ``--help``."""

    config: str  # "module:Dataclass"
    run: str  # "module:function", called with an instance of the dataclass
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "diffalign.demo:DemoConfig",
        "diffalign.demo:run",
        "sample faster and align on the embedded playground; leaves an HTML report",
        "diffalign demo --output_dir outputs/demo",
    ),
    "sample": Command(
        "diffalign.sample:SampleConfig",
        "diffalign.sample:run",
        "draw images from a pipeline folder with any of the samplers",
        'diffalign sample --model playground/sd --prompts "[a red star]" --solver dpm-solver++ --steps 10',
    ),
    "list solvers": Command(
        "diffalign.listing:ListConfig",
        "diffalign.listing:run_solvers",
        "the samplers by name",
        "diffalign list solvers",
    ),
    "list losses": Command(
        "diffalign.listing:ListConfig",
        "diffalign.listing:run_losses",
        "the losses by name: formula, source and options",
        "diffalign list losses",
    ),
    "list rewards": Command(
        "diffalign.listing:ListConfig",
        "diffalign.listing:run_rewards",
        "the rewards by name",
        "diffalign list rewards",
    ),
    "train diffusion-dpo": Command(
        "diffalign.trainers.diffusion_dpo:DiffusionDPOConfig",
        "diffalign.trainers.diffusion_dpo:run",
        "Diffusion-DPO on preference pairs, LoRA or full",
        "diffalign train diffusion-dpo --config configs/train/diffusion_dpo_playground.yaml --beta_dpo 2000",
    ),
    "train dcpo": Command(
        "diffalign.trainers.dcpo:DCPOConfig",
        "diffalign.trainers.dcpo:run",
        "DCPO: Diffusion-DPO with a caption of its own for each image",
        "diffalign train dcpo --pretrained_model_name_or_path playground/sd --dataset_name captioned_pairs/",
    ),
    "train mapo": Command(
        "diffalign.trainers.mapo:MaPOConfig",
        "diffalign.trainers.mapo:run",
        "MaPO on preference pairs: no reference model",
        "diffalign train mapo --pretrained_model_name_or_path playground/sd --dataset_name my_pairs/",
    ),
    "train flow-dpo": Command(
        "diffalign.trainers.flow_dpo:FlowDPOConfig",
        "diffalign.trainers.flow_dpo:run",
        "Flow-DPO: Diffusion-DPO for flow models, SD3, Flux and video",
        "diffalign train flow-dpo --config configs/train/flow_dpo_sd3.yaml --dataset_name my_pairs/",
    ),
    "train list-dpo": Command(
        "diffalign.trainers.list_dpo:ListDPOConfig",
        "diffalign.trainers.list_dpo:run",
        "DPO on lists of scored images of one prompt: rankings, soft targets",
        "diffalign train list-dpo --pretrained_model_name_or_path playground/sd --dataset_name scored_lists/ "
        "--list_length 4",
    ),
    "train sft": Command(
        "diffalign.trainers.sft:SFTConfig",
        "diffalign.trainers.sft:run",
        "fine-tuning on the chosen images of preference pairs, the baseline",
        "diffalign train sft --pretrained_model_name_or_path playground/sd --dataset_name my_pairs/",
    ),
    "train diffusion-kto": Command(
        "diffalign.trainers.kto:DiffusionKTOConfig",
        "diffalign.trainers.kto:run",
        "Diffusion-KTO on images that were judged one by one, good or bad",
        "diffalign train diffusion-kto --pretrained_model_name_or_path playground/sd --dataset_name judged/",
    ),
    "train flow-rwr": Command(
        "diffalign.trainers.flow_rwr:FlowRWRConfig",
        "diffalign.trainers.flow_rwr:run",
        "Flow-RWR: fine-tuning on scored images, better ones counting for more",
        "diffalign train flow-rwr --config configs/train/flow_rwr_sd3.yaml --dataset_name scored/ --tau 0.5",
    ),
    "train seppo": Command(
        "diffalign.trainers.seppo:SePPOConfig",
        "diffalign.trainers.seppo:run",
        "SePPO: good images alone, against samples of the model's earlier selves",
        "diffalign train seppo --pretrained_model_name_or_path playground/sd --dataset_name good_images/",
    ),
    "train ddo": Command(
        "diffalign.trainers.ddo:DDOConfig",
        "diffalign.trainers.ddo:run",
        "DDO: real images against the model's own samples, the likelihood ratio as discriminator",
        "diffalign train ddo --pretrained_model_name_or_path playground/sd --dataset_name real_images/",
    ),
    "train pso-offline": Command(
        "diffalign.trainers.pso:PSOOfflineConfig",
        "diffalign.trainers.pso:run_offline",
        "teach a few-step distilled model a subject or style from pairs",
        "diffalign train pso-offline --pretrained_model_name_or_path models/sdxl-turbo "
        "--dataset_name targets_and_samples/",
    ),
    "train d3po": Command(
        "diffalign.trainers.d3po:D3POConfig",
        "diffalign.trainers.d3po:run",
        "learn from comparisons of one's own samples",
        "diffalign train d3po --pretrained_model_name_or_path playground/sd --dataset_name prompts.txt "
        "--rewards '[playground/scorer]'",
    ),
    "train spo": Command(
        "diffalign.trainers.spo:SPOConfig",
        "diffalign.trainers.spo:run",
        "learn from comparisons of single steps of one's own samples",
        "diffalign train spo --pretrained_model_name_or_path playground/sd --dataset_name prompts.txt "
        "--rewards '[playground/scorer]'",
    ),
    "train pso": Command(
        "diffalign.trainers.pso:PSOConfig",
        "diffalign.trainers.pso:run",
        "align a few-step distilled model on its own samples",
        "diffalign train pso --pretrained_model_name_or_path models/sdxl-turbo --dataset_name prompts.txt "
        "--rewards '[pickscore=models/PickScore_v1]'",
    ),
    "train ddpo": Command(
        "diffalign.trainers.ddpo:DDPOConfig",
        "diffalign.trainers.ddpo:run",
        "policy gradient on one's own samples",
        "diffalign train ddpo --pretrained_model_name_or_path playground/sd --dataset_name prompts.txt "
        "--rewards '[playground/scorer]'",
    ),
    "train flow-grpo": Command(
        "diffalign.trainers.ddpo:FlowGRPOConfig",
        "diffalign.trainers.ddpo:run_flow_grpo",
        "policy gradient on a flow model's own samples",
        "diffalign train flow-grpo --pretrained_model_name_or_path models/sd3.5-medium "
        "--dataset_name prompts.txt --rewards '[pickscore=models/PickScore_v1]'",
    ),
    "train flow-dpo-online": Command(
        "diffalign.trainers.flow_online:FlowDPOOnlineConfig",
        "diffalign.trainers.flow_online:run_dpo",
        "Flow-DPO on the best and the worst of the model's own samples",
        "diffalign train flow-dpo-online --pretrained_model_name_or_path models/stable-diffusion-3.5-medium "
        "--dataset_name prompts.txt --rewards '[pickscore=models/PickScore_v1]'",
    ),
    "train flow-rwr-online": Command(
        "diffalign.trainers.flow_online:FlowRWROnlineConfig",
        "diffalign.trainers.flow_online:run_rwr",
        "Flow-RWR on the model's own samples, better ones counting for more",
        "diffalign train flow-rwr-online --pretrained_model_name_or_path models/stable-diffusion-3.5-medium "
        "--dataset_name prompts.txt --rewards '[pickscore=models/PickScore_v1]' --tau 0.5",
    ),
    "train step-aware": Command(
        "diffalign.trainers.step_aware:StepAwareConfig",
        "diffalign.trainers.step_aware:run",
        "a preference model that judges what is predicted at noisy times, for spo",
        "diffalign train step-aware --pretrained_model_name_or_path playground/sd --dataset_name my_pairs/ "
        "--reward_model playground/scorer",
    ),
    "train latent-reward": Command(
        "diffalign.trainers.latent_reward:LatentRewardConfig",
        "diffalign.trainers.latent_reward:run",
        "a small reward of noisy latents, for guidance by it (Flow-NRG)",
        "diffalign train latent-reward --pretrained_model_name_or_path playground/flow "
        "--dataset_name my_scored/",
    ),
    "rollout": Command(
        "diffalign.rollout:RolloutConfig",
        "diffalign.rollout:run",
        "sample images and keep the trajectories behind them, for people to judge and D3PO to learn from",
        "diffalign rollout --model playground/sd --dataset_name prompts.txt --output_dir outputs/rollout",
    ),
    "vote": Command(
        "diffalign.vote:VoteConfig",
        "diffalign.vote:run",
        "judge images by hand on a local page; its file of votes is a preference set",
        "diffalign vote --images outputs/samples --annotator anna",
    ),
    "data check": Command(
        "diffalign.data.check:CheckConfig",
        "diffalign.data.check:run",
        "read a whole preference set and report every bad row",
        "diffalign data check --dataset my_pairs/",
    ),
    "data stats": Command(
        "diffalign.data.stats:StatsConfig",
        "diffalign.data.stats:run",
        "sizes, score gaps, caption lengths, repeated prompts and generators of a preference set",
        "diffalign data stats --dataset my_pairs/ --html stats.html",
    ),
    "data convert": Command(
        "diffalign.data.convert:ConvertConfig",
        "diffalign.data.convert:run",
        "write a preference set as folder, parquet or tar",
        "diffalign data convert --dataset hf://owner/name --output_dir my_pairs --format tar",
    ),
    "data score": Command(
        "diffalign.score:ScoreConfig",
        "diffalign.score:run",
        "score both images of every pair, or single images, with rewards ('diffalign score' for short)",
        "diffalign data score --dataset my_pairs/ --output_dir scored --rewards playground/scorer",
    ),
    "data caption": Command(
        "diffalign.data.caption:CaptionConfig",
        "diffalign.data.caption:run",
        "describe both images of every pair with a captioning model",
        "diffalign data caption --dataset my_pairs/ --output_dir captioned --captioner blip/",
    ),
    "data perturb": Command(
        "diffalign.data.perturb:PerturbConfig",
        "diffalign.data.perturb:run",
        "rewrite the captions of rejected images, for dual-caption training",
        "diffalign data perturb --dataset my_pairs/ --output_dir captioned_pairs/ --level medium",
    ),
    "data synth": Command(
        "diffalign.playground.synth:SynthConfig",
        "diffalign.playground.synth:run",
        "render playground pairs with the columns of Pick-a-Pic, ties and damage included if asked for",
        "diffalign data synth --output_dir outputs/synth --pairs 200 --ties 0.1",
    ),
    "playground pairs": Command(
        "diffalign.playground.pairs:PairsConfig",
        "diffalign.playground.pairs:run",
        "sample the playground model and label pairs with its scorer",
        "diffalign playground pairs --output_dir outputs/pairs --prompts 200",
    ),
    "playground build": Command(
        "diffalign.playground.build:BuildConfig",
        "diffalign.playground.build:run",
        "train the playground models from nothing",
        "diffalign playground build sd --output_dir outputs/playground",
    ),
    "calibrate dc": Command(
        "diffalign.calibrate.dc:CalibrateDCConfig",
        "diffalign.calibrate.dc:run",
        "find DC-Solver's compensation ratios for a pipeline",
        "diffalign calibrate dc --model playground/sd --num_inference_steps 5 8 --guidance_scale 5",
    ),
    "calibrate ems": Command(
        "diffalign.calibrate.ems:CalibrateEMSConfig",
        "diffalign.calibrate.ems:run",
        "estimate DPM-Solver-v3's statistics for a pipeline",
        "diffalign calibrate ems --model playground/sd --guidance_scale 4 --intervals 60 --samples 32",
    ),
    "calibrate plan": Command(
        "diffalign.calibrate.plan:CalibratePlanConfig",
        "diffalign.calibrate.plan:run",
        "fit a sampler to a pipeline: times and weights of every step",
        "diffalign calibrate plan --model playground/sd --num_inference_steps 5 8 --guidance_scale 4",
    ),
    "calibrate timesteps": Command(
        "diffalign.calibrate.timesteps:CalibrateTimestepsConfig",
        "diffalign.calibrate.timesteps:run",
        "search the times at which a solver asks a pipeline's network",
        "diffalign calibrate timesteps --model playground/sd --solver unipc --num_inference_steps 5 "
        "--guidance_scale 4",
    ),
    "calibrate schedule": Command(
        "diffalign.calibrate.schedule:CalibrateScheduleConfig",
        "diffalign.calibrate.schedule:run",
        "search how each step of a pipeline's sampler is made: order, form, derivatives, corrector",
        "diffalign calibrate schedule --model playground/sd --num_inference_steps 5 --guidance_scale 4",
    ),
    "bench samplers": Command(
        "diffalign.bench.samplers_report:SamplersConfig",
        "diffalign.bench.samplers_report:run",
        "compare samplers at equal network evaluations, on a mixture or any pipeline",
        "diffalign bench samplers --solvers dpm-solver++ UniPCMultistepScheduler --steps 5 10 20",
    ),
    "bench grids": Command(
        "diffalign.bench.grids:GridsConfig",
        "diffalign.bench.grids:run",
        "measure the default grid against every grid of diffusers",
        "diffalign bench grids --steps 5 10 20 --guidance 1 7.5 --mixtures 2",
    ),
    "bench plans": Command(
        "diffalign.bench.plans:PlansConfig",
        "diffalign.bench.plans:run",
        "compare fitted samplers with the best uncalibrated one of any library",
        "diffalign bench plans --problems mixture-0 mixture-7 --steps 5 8 --seeds 0",
    ),
    "bench step": Command(
        "diffalign.bench.step:StepConfig",
        "diffalign.bench.step:run",
        "time scheduler.step() against diffusers' class of the same order",
        "diffalign bench step --shapes 1x4x64x64 --repeats 50",
    ),
    "bench align": Command(
        "diffalign.bench.align:AlignConfig",
        "diffalign.bench.align:run",
        "compare alignment methods on the playground: verifier, scorer, implicit accuracy, against SFT",
        "diffalign bench align --methods sft diffusion-dpo diffusion-kto --seeds 0 1 2",
    ),
    "bench train": Command(
        "diffalign.bench.train:BenchTrainConfig",
        "diffalign.bench.train:run",
        "cost of a DPO step against plain fine-tuning of the same images",
        "diffalign bench train --networks tiny --train lora --repeats 10",
    ),
    "bench rollout": Command(
        "diffalign.bench.rollout:BenchRolloutConfig",
        "diffalign.bench.rollout:run",
        "cost of sampling with all states kept against the plain pipeline",
        "diffalign bench rollout --model playground/sd --guidance 5 --batch_sizes 8 --repeats 3",
    ),
}


#: Other names of commands.
ALIASES = {"score": "data score"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output left, as in `diffalign --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, code = describe(error)
        print(f"diffalign: {sentence}", file=sys.stderr)
        return code


def _dispatch(args: list[str]) -> int:
    if args and args[0] == "--version":
        from diffalign import __version__

        print(f"diffalign {__version__}")
        return 0
    if args and args[0] in ALIASES:
        args = [*ALIASES[args[0]].split(), *args[1:]]
    words = [a for a in args[:2] if not a.startswith("-")]
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return _run(name, args[length:])
    group = words[0] if words else ""
    members = [name for name in COMMANDS if name.split()[0] == group]
    if not words or (members and len(words) == 1):
        print(_overview(members or list(COMMANDS)))
        return 0 if "-h" in args or "--help" in args else 2
    wanted = " ".join(words) if members else group
    known = members or sorted({name.split()[0] for name in COMMANDS})
    # `train dpo` is spelt nearly as `train ddpo` and means `train diffusion-dpo`; `check` is `data check`.
    has = [name for name in members or COMMANDS if wanted.split()[-1] in re.split("[ -]", name)][:3]
    near = f"; did you mean {' or '.join(map(repr, has))}?" if has else suggestion(wanted, known)
    raise UserError(f"unknown command {wanted!r}{near} (known: {', '.join(known)})")


def _overview(names: list[str]) -> str:
    width = max(len(name) for name in names)
    groups = [name.split()[0] for name in names]
    rows = ""
    for last, group, name in zip([groups[0], *groups], groups, names, strict=False):
        if group != last and max(groups.count(group), groups.count(last)) > 1:
            rows += "\n"
        rows += f"  {name:<{width}}  {COMMANDS[name].summary}\n"
    example = COMMANDS[names[0]].example
    return (
        "usage: diffalign <command> [options]\n\n"
        f"commands:\n{rows}\n"
        "Every command takes --help, --config FILE.yaml, --print_config and --debug.\n"
        f"example:\n  {example}"
    )


def _run(name: str, args: list[str]) -> int:
    command = COMMANDS[name]
    config_class: type = _load(command.config)
    config = parse(config_class, args, prog=f"diffalign {name}", example=command.example)
    if config is None:
        return 0
    run: Callable[[Any], object] = _load(command.run)
    run(config)
    return 0


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse(config_class: type, args: Sequence[str], *, prog: str, example: str) -> Any:
    """Read a dataclass of options from ``args``: defaults < YAML of ``--config`` < single options.

    Lists take words (``--seeds 0 1 2``) or YAML (``--seeds [0,1,2]``); a boolean alone means true. The
    help of each option is the line about it under ``Attributes:`` in the docstring of the dataclass.

    Returns None when the arguments asked only for help or for the configuration to be printed.

    Raises:
        UserError: an unknown option (the nearest known one is named), a wrong type, a missing file, or a
            value that the dataclass itself refuses with a ``ValueError``.
    """
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

    from diffalign.configs import resolve

    class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the line breaks of the description and of the example."""

    hints = get_type_hints(config_class)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [options]",
        formatter_class=Help,
        description=_description(config_class),
        epilog=f"example:\n  {example}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    # A command whose one required option reads as a word of it says so: `diffalign playground build sd`.
    parser.add_class_arguments(config_class, as_positional=getattr(config_class, "POSITIONAL", False))
    try:
        namespace = parser.parse_args(resolve(_spell_out(list(args), hints)))
        values = parser.instantiate(namespace).as_dict()
        values.pop("config", None)
        return config_class(**values)
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise
    except (ArgumentError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_one_sentence(str(error), hints, prog)) from error


def _description(config_class: type) -> str:
    text = inspect.cleandoc(config_class.__doc__ or "")
    return re.split(r"\n\s*(?:Attributes|Args|Raises):", text)[0].strip()


def _spell_out(args: list[str], hints: dict[str, Any]) -> list[str]:
    """From what people type to what the parser reads: ``--flag`` to ``--flag true``, ``1 2`` to ``[1,2]``."""
    spelled: list[str] = []
    rest = list(args)
    while rest:
        option = rest.pop(0)
        spelled.append(option)
        hint = hints.get(option[2:]) if option.startswith("--") else None
        if hint is None:
            continue
        words = []
        while rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        element = _element(hint)
        if hint is bool and not words:
            words = ["true"]
        elif element and words and not (len(words) == 1 and re.fullmatch(r"\[.*\]|null", words[0], re.S)):
            words = [json.dumps(words) if element is str else f"[{', '.join(words)}]"]
        spelled += words
    return spelled


def _element(hint: Any) -> Any:
    """The element type of ``list[T]`` or ``list[T] | None``, else None."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is list:
            return get_args(part)[0]
    return None


def _one_sentence(message: str, hints: dict[str, Any], prog: str) -> str:
    """The parser's message in the words of the command line."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join(message.split()))
    more = f" ('{prog} --help' explains the options)"
    if found := re.search(r"""Parser key "(\w+)".*Option '(\w+)' is not accepted""", text):
        name, setting = found.groups()
        if is_dataclass(item := _element(hints.get(name))):
            known = [field.name for field in fields(item)]
            nearest = suggestion(setting, known)
            return f"--{name}: unknown setting {setting!r}{nearest} (known: {', '.join(known)})"
    if found := re.search(r"unrecognized arguments: --([\w.-]+)|Option '([\w.]+)' is not accepted", text):
        name = found.group(1) or found.group(2)
        same = [known for names in _SAME if name in names for known in names if known in hints]
        nearest = (
            f"; did you mean '--{same[0]}'?" if same else suggestion(f"--{name}", [f"--{k}" for k in hints])
        )
        return f"unknown option --{name}{nearest} ('{prog} --help' lists all)"
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return f"unexpected argument {found.group(1)!r}: options are written --name value{more}"
    if found := re.search(r"arguments are required: (.+)", text):
        return f"missing --{found.group(1).replace(', ', ', --')}{more}"
    if found := re.search(r'Parser key "([\w.]+)".*(?:Got|Given) value: ?(.*)', text):
        name, value = found.groups()
        return f"option --{name} takes {_words(hints.get(name), text)}, not {value!r}{more}"
    if found := re.search(r"File does not exist: '(.+)'", text):
        return f"no such config file: {found.group(1)!r}"
    if found := re.search(r"Problems parsing config: (.+?),? line (\d+)", text):
        return f"the config file is not valid YAML near line {found.group(2)}"
    if found := re.search(r"argument (--[\w.]+)\S*: expected", text):
        return f"option {found.group(1)} needs a value{more}"
    return text + more


# Names of one thing, here and in diffusers, peft and TRL: whoever writes one is told the one that is meant.
_SAME: tuple[tuple[str, ...], ...] = (
    ("pretrained_model_name_or_path", "model", "model_name_or_path", "model_id"),
    ("dataset_name", "dataset", "train_data_dir"),
    ("solver", "solvers", "scheduler", "sampler"),
    ("steps", "num_inference_steps"),
    ("guidance", "guidance_scale"),
    ("prompts", "prompt"),
    ("seeds", "seed"),
    ("max_train_steps", "max_steps", "num_train_epochs"),
    ("train_batch_size", "batch_size", "per_device_train_batch_size"),
    ("checkpointing_steps", "save_steps"),
    ("checkpoints_total_limit", "save_total_limit"),
    ("validation_steps", "eval_steps"),
    ("lr_scheduler", "lr_scheduler_type"),
    ("lr_warmup_steps", "warmup_steps"),
    ("mixed_precision", "fp16", "bf16"),
    ("rank", "lora_rank", "lora_r", "lora_alpha"),
    ("lora_targets", "target_modules", "lora_target_modules"),
    ("init_lora", "lora"),
    ("beta_dpo", "beta"),
)

_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def _words(hint: Any, text: str) -> str:
    """A type hint in plain words; for a nested option only the parser's own words are known."""
    if hint is None:
        expected = re.search(r"Expected an? (.+?)\. Got", text)
        kinds = {kind.__name__: words for kind, words in _KINDS.items()}
        return kinds.get(expected.group(1), expected.group(1)) if expected else "another type"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if element := _element(hint):
        return f"a list ({_words(element, text)} each)"
    if get_args(hint) and get_origin(hint) is not dict:
        return " or ".join(_words(part, text) for part in get_args(hint))
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))
