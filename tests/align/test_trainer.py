"""Diffusion-DPO from options to weights on a tiny model."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffalign import losses
from diffalign.data import PairDataset, open_pairs, write_pairs
from diffalign.errors import RunFailed, UserError, describe
from diffalign.likelihood import Errors, add_noise, evaluate
from diffalign.losses import LOSSES
from diffalign.models import ModelAdapter
from diffalign.models.reference import frozen_copy
from diffalign.trainers import DiffusionDPOConfig, DiffusionDPOTrainer
from diffalign.trainers.diffusion_dpo import LossTerm

LORA = "pytorch_lora_weights.safetensors"


def unet_output(pipe):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 4, 4, generator=generator)
    text = torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([10, 600]), encoder_hidden_states=text, return_dict=False)[0]


def judged(count, gap=0.0):
    """What a batch of so many pairs says of them."""
    return SimpleNamespace(preference=torch.ones(count), gap=torch.full((count,), gap))


def load(folder):
    return StableDiffusionPipeline.from_pretrained(folder)


# -------------------------------------------------------------------- the first step


@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"mixed_precision": "bf16"}], ids=str)
def test_the_first_loss_is_log_two(trainer, log, tmp_path, options):
    trainer(max_train_steps=2, **options).train()
    first, second = log(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/accuracies"] == 0.5
    assert first["rewards/margins"] == 0
    assert first["grad_norm"] > 0
    assert second["loss"] != first["loss"]


def test_log_names_follow_trl(trainer, log, tmp_path):
    trainer(max_train_steps=1, proportion_empty_prompts=0.5).train()
    record = log(tmp_path / "run")[0]
    assert {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} <= set(record)
    assert {"errors/chosen", "errors/reference_rejected", "gradient_factor", "learning_rate"} <= set(record)
    assert len(record["errors_by_time"]["chosen"]) == 4
    assert 0 < record["empty_captions"] < 1


def test_metrics_agree_with_the_pairs_they_describe(trainer, log, tmp_path):
    trainer(max_train_steps=3, learning_rate=1e-2).train()
    last = log(tmp_path / "run")[-1]
    beta = 2000
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert last["rewards/margins"] == pytest.approx(margin, abs=1e-3)
    gain = last["errors/reference_chosen"] - last["errors/chosen"]
    assert last["rewards/chosen"] == pytest.approx(0.5 * beta * gain, rel=1e-3, abs=1e-3)
    assert len([v for v in last["errors_by_time"]["chosen"] if v is not None]) > 1


# -------------------------------------------------------------------- what comes out


def test_a_lora_reloads_to_equal_outputs(trainer, tmp_path, model_folder):
    run = trainer(learning_rate=1e-2)
    result = run.train()
    trained = unet_output(run.pipeline)
    fresh = load(model_folder)
    base = unet_output(fresh)
    fresh.load_lora_weights(result.output_dir)
    torch.testing.assert_close(unet_output(fresh), trained, rtol=0, atol=0)
    assert (trained - base).abs().max() > 1e-3
    config = fresh.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (4, 4)
    fresh.disable_lora()
    torch.testing.assert_close(unet_output(fresh), base, rtol=0, atol=0)
    card = (result.output_dir / "README.md").read_text()
    assert "pipe.load_lora_weights" in card
    assert str(tmp_path) not in card.split("Options that differ")[1]


def test_all_weights_come_out_as_a_pipeline_folder(trainer, model_folder):
    run = trainer(rank=0)
    result = run.train()
    again = load(result.output_dir)
    torch.testing.assert_close(unet_output(again), unet_output(run.pipeline), rtol=0, atol=0)
    assert (unet_output(again) - unet_output(load(model_folder))).abs().max() > 1e-4
    vae = "vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(model_folder / vae), load_file(result.output_dir / vae)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_average_of_the_weights_is_the_result(trainer):
    plain = load_file(trainer("plain").train().output_dir / LORA)
    averaged = load_file(trainer("ema", use_ema=True, ema_decay=0.5).train().output_dir / LORA)
    assert plain.keys() == averaged.keys()
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)


def test_a_pipeline_in_memory_is_trained_in_place(trainer, model_folder, pairs_folder):
    pipe = load(model_folder)
    before = unet_output(pipe)
    run = trainer(model=pipe, dataset=str(pairs_folder), learning_rate=1e-2)
    run.train()
    assert run.pipeline is pipe
    assert not torch.equal(unet_output(pipe), before)
    with pytest.raises(UserError, match="already carries the adapters"):
        trainer("second", model=pipe).train()


def test_going_on_from_a_lora_starts_at_it_and_keeps_it_as_reference(trainer, log, tmp_path, model_folder):
    first = trainer("first", learning_rate=1e-2).train().output_dir
    stripped = tmp_path / "stripped"  # a file without metadata, as other programs write it
    stripped.mkdir()
    save_file(load_file(first / LORA), stripped / LORA)
    for number, source in enumerate((first, stripped)):
        run = trainer(f"more{number}", init_lora=str(source), max_train_steps=2)
        run.train()
        assert log(run.folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        fresh = load(model_folder)
        fresh.load_lora_weights(first)
        with run.adapter.reference(run.adapter.module):
            torch.testing.assert_close(unet_output(run.pipeline), unet_output(fresh), rtol=0, atol=0)
        assert not torch.equal(unet_output(run.pipeline), unet_output(fresh))
        keys = load_file(run.folder / LORA).keys()
        assert not any("reference" in key for key in keys)


@pytest.mark.parametrize("patterns", [False, True])
def test_an_alpha_other_than_the_rank_goes_into_the_weights(
    trainer, tmp_path, model_folder, caplog, patterns
):
    pipe = load(model_folder)
    some = {"alpha_pattern": {"attn1.to_q": 8}, "rank_pattern": {"attn1.to_q": 3}} if patterns else {}
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, use_rslora=patterns, **some))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.manual_seed(parameter.numel()))
    metadata = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in pipe.unet.peft_config["default"].to_dict().items()
    }
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(tmp_path / "given", layers, unet_lora_adapter_metadata=metadata)
    run = trainer(init_lora=str(tmp_path / "given"), max_train_steps=1, learning_rate=0.0)
    run.train()
    assert "alpha other than its rank" in caplog.text
    stripped = tmp_path / "stripped"  # of what was given away, without the metadata that has alpha
    stripped.mkdir()
    save_file(load_file(run.folder / LORA), stripped / LORA)
    fresh = load(model_folder)
    fresh.load_lora_weights(stripped)
    torch.testing.assert_close(unet_output(fresh), unet_output(pipe), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(unet_output(run.pipeline), unet_output(pipe), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- equalities


def weights(folder):
    return load_file(folder / LORA)


def test_micro_batches_do_not_change_the_step(trainer, log):
    whole = trainer("whole", train_batch_size=8).train().output_dir
    split = trainer("split", train_batch_size=2, gradient_accumulation_steps=4).train().output_dir
    for one, other in zip(log(whole), log(split), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(split)[name], rtol=1e-2, atol=1e-4)


def test_runs_are_a_function_of_the_seed(trainer):
    one, same, other = (trainer(n, seed=s).train().output_dir for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(v, weights(same)[k]) for k, v in weights(one).items())
    assert any(not torch.equal(v, weights(other)[k]) for k, v in weights(one).items())


@pytest.mark.parametrize("options", [{}, {"random_flip": True, "proportion_empty_prompts": 0.5}], ids=str)
def test_the_reference_computed_beforehand_equals_the_live_one(trainer, options):
    run = trainer(reference_draws=3, max_train_steps=2, **options)
    run.train()
    assert run.adapter.reference is None
    run.weights.use_as_reference()
    seen = set()
    for step in (0, 1):
        batch = run.batch(step, range(8))
        seen |= set(batch.draws)
        noised = add_noise(run.adapter.schedule, "epsilon", batch.latents, batch.noise, batch.t)
        with torch.no_grad():
            live = evaluate(run.adapter.denoise, noised, batch.cond).reference
        torch.testing.assert_close(run._reference_errors(batch), live, rtol=1e-5, atol=1e-6)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("every", "way"), [(1, "latest goes on from checkpoint-2"), (5, "no checkpoint yet")]
)
def test_an_interrupted_run_says_where_it_goes_on(trainer, monkeypatch, every, way):
    run = trainer("run", max_train_steps=5, checkpointing_steps=every)
    step = DiffusionDPOTrainer._optimiser_step

    def interrupted(self, at):
        if at == 2:
            raise KeyboardInterrupt
        return step(self, at)

    monkeypatch.setattr(DiffusionDPOTrainer, "_optimiser_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=way) as caught:
        run.train()
    assert describe(caught.value)[0].startswith("interrupted; ")


@pytest.fixture
def asked(monkeypatch):
    """How many rows the network was asked for without gradient, per run."""
    counts = []
    prepare, denoise = DiffusionDPOTrainer.prepare, ModelAdapter.denoise

    def counted(self):
        counts.append(0)
        prepare(self)

    def counting(self, x_t, *rest, **more):
        counts[-1] += 0 if torch.is_grad_enabled() else len(x_t)
        return denoise(self, x_t, *rest, **more)

    monkeypatch.setattr(DiffusionDPOTrainer, "prepare", counted)
    monkeypatch.setattr(ModelAdapter, "denoise", counting)
    return counts


def test_the_reference_is_asked_once_for_all_runs(trainer, asked, pairs, tmp_path):
    options = {"reference_draws": 2, "cache_dir": str(tmp_path / "cache")}
    first = trainer("first", dataset=pairs[:8], **options)
    first.train()
    trainer("more", dataset=pairs.select(range(15, -1, -1)), **options).train()
    again = trainer("again", **options, rank=0)
    again.train()
    trainer("other", **options, seed=1).train()
    # A LoRA's base network is the reference of full training as well; the order of the data does not matter.
    assert asked == [2 * 2 * 8, 2 * 2 * 8, 0, 2 * 2 * 16]
    assert torch.equal(first._table, again._table[:8])


def test_a_table_that_was_cut_short_goes_on_where_it_stopped(trainer, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.trainers.table.ROWS", 4)
    whole = trainer("whole", reference_draws=2, cache_dir=str(tmp_path / "whole"))
    whole.train()
    cut = trainer("cut", reference_draws=2, cache_dir=str(tmp_path / "cut"))
    compute = cut._fixed_errors

    def failing(data, rows, *rest, **more):
        if 8 in rows:
            raise KeyboardInterrupt
        return compute(data, rows, *rest, **more)

    cut._fixed_errors = failing
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    rest = trainer("rest", reference_draws=2, cache_dir=str(tmp_path / "cut"))
    rest.train()
    assert asked == [64, 32, 32]
    assert torch.equal(rest._table, whole._table)
    assert all(torch.equal(v, weights(rest.folder)[k]) for k, v in weights(whole.folder).items())


def test_a_reference_that_is_not_finite_is_named(trainer, tmp_path):
    run = trainer(reference_draws=1, cache_dir=str(tmp_path / "cache"))
    run._fixed_errors = lambda data, rows, *rest, **more: torch.full((len(rows), 1, 2), math.nan)
    with pytest.raises(RunFailed, match="reference's error is not finite"):
        run.train()


def test_flips_are_drawn_per_pair_whatever_the_micro_batch(trainer):
    run = trainer(random_flip=True, max_train_steps=1)
    run.train()
    whole = run.batch(0, range(8)).latents
    parts = [run.batch(0, range(i, i + 2)).latents for i in range(0, 8, 2)]
    chosen, rejected = (torch.cat([p.chunk(2)[side] for p in parts]) for side in (0, 1))
    assert torch.equal(whole, torch.cat([chosen, rejected]))
    plain = trainer("plain", max_train_steps=1)
    plain.train()
    same = (plain.batch(0, range(8)).latents == whole).flatten(1).all(1)
    assert 0 < int(same.sum()) < 16


@pytest.mark.parametrize(("draws", "limit"), [(0, 1.36), (2, 1.05)])
def test_what_a_step_costs_against_fine_tuning(trainer, draws, limit):
    """In operations, all weights trained: a live reference is one forward more, a known one nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    run = trainer(rank=0, reference_draws=draws, max_train_steps=1)
    run.train()
    batch = run.batch(0, range(8))
    noised = add_noise(run.adapter.schedule, "epsilon", batch.latents, batch.noise, batch.t)
    with FlopCounterMode(display=False) as tuning:
        run.adapter.denoise(noised.x_t, noised.t, batch.cond).square().mean().backward()
    with FlopCounterMode(display=False) as aligning:
        run.losses(0, range(8))[0].mean().backward()
    assert 1.0 <= aligning.get_total_flops() / tuning.get_total_flops() <= limit


# -------------------------------------------------------------------- it learns


def test_two_hundred_steps_overfit_sixteen_pairs(trainer, log):
    # All weights: they are random, which leaves a LoRA on attention little to hold on to.
    run = trainer(train_batch_size=16, max_train_steps=200, learning_rate=1e-2, rank=0)
    run.train()
    wins = [record["rewards/accuracies"] for record in log(run.folder)]
    assert sum(wins[:10]) / 10 < 0.8
    assert sum(wins[-20:]) / 20 > 0.95


def test_a_loss_without_reference_runs_none(trainer, log):
    run = trainer(loss_type="simpo", loss_options={"gamma": 0.0}, beta_dpo=100.0)
    run.train()
    assert run.adapter.reference is None
    assert "errors/reference_chosen" not in log(run.folder)[0]


def test_even_votes_train_towards_even_odds(trainer, log, pairs):
    even = PairDataset.from_lists(
        [pairs[i].prompt for i in range(8)],
        [pairs[i].chosen for i in range(8)],
        [pairs[i].rejected for i in range(8)],
        preferences=[0.5] * 8,
        ties="soft",
    )
    run = trainer(dataset=even, ties="soft", max_train_steps=2)
    run.train()
    assert log(run.folder)[0]["grad_norm"] == pytest.approx(0, abs=1e-5)
    sure = trainer("sure", max_train_steps=1, ties="soft")
    sure.train()
    assert log(sure.folder)[0]["grad_norm"] > 1e-2


def test_the_chosen_image_is_held_by_sft_weight(trainer, log):
    run = trainer(sft_weight=1.0, max_train_steps=1)
    run.train()
    record = log(run.folder)[0]
    assert record["loss"] == pytest.approx(math.log(2) + 0.5 * 2000 * record["errors/chosen"], rel=1e-5)


# -------------------------------------------------------------------- bad input, failures


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(trainer, monkeypatch, log):
    run = trainer(max_train_steps=5)
    honest = run.pair_loss

    def poisoned(errors, batch):
        per_pair, logit = honest(errors, batch)
        bad = float("nan") if len(log(run.folder)) == 2 else 1.0
        return per_pair * bad, logit

    monkeypatch.setattr(run, "pair_loss", poisoned)
    with pytest.raises(RunFailed, match="not finite in step 3"):
        run.train()
    assert [p.name for p in run.folder.glob("checkpoint-*")] == ["checkpoint-2"]
    rest = trainer(max_train_steps=5, resume_from_checkpoint="latest").train()
    whole = trainer("whole", max_train_steps=5).train()
    assert all(torch.equal(v, weights(whole.output_dir)[k]) for k, v in weights(rest.output_dir).items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"loss_options": {"gama": 1.0}, "loss_type": "simpo"}, "did you mean 'gamma'"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "hinge has no setting 'label_smoothing'"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, but is 0"),
        ({"beta_dpo": -1.0}, "beta_dpo must be above 0"),
        ({"weighting": "min_snr"}, "weighting must be one of native"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler must be one of"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "use constant_with_warmup"),
        ({"overwrite": True, "resume_from_checkpoint": "latest"}, "give one of the two"),
        ({"use_8bit_adam": True, "use_adafactor": True}, "two optimisers"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint in"),
        (
            {"resume_from_checkpoint": "checkpoint-7"},
            r"no checkpoint: .*run: none\)",
        ),
        ({"reference_draws": 2, "loss_type": "simpo"}, "needs no reference"),
        ({"rank": 0, "init_lora": "x"}, "rank 0 trains all weights"),
        ({"model": "/nowhere/model"}, "no model at '/nowhere/model'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_sentence(trainer, options, words):
    with pytest.raises(UserError, match=words) as caught:
        trainer(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_targets": ["to_nothing"]}, "no layer of this model is called"),
        ({"init_lora": "/nowhere"}, "no LoRA at /nowhere"),
        ({"dataset": "/nowhere/pairs"}, "/nowhere/pairs"),
    ],
    ids=str,
)
def test_what_only_loading_can_tell(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options).train()


def test_no_model_and_no_data_are_named():
    with pytest.raises(UserError, match="--pretrained_model_name_or_path"):
        DiffusionDPOTrainer(DiffusionDPOConfig())
    with pytest.raises(UserError, match="--dataset_name"):
        DiffusionDPOTrainer(DiffusionDPOConfig(pretrained_model_name_or_path="owner/name"))


def test_a_folder_in_use_is_not_touched_unless_told(trainer, tmp_path):
    run = trainer(checkpointing_steps=1, checkpoints_total_limit=2)
    run.train()
    assert sorted(p.name for p in run.folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    (run.folder / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"not empty.*--resume_from_checkpoint latest"):
        trainer()
    trainer(overwrite=True, max_train_steps=1).train()
    assert not list(run.folder.glob("checkpoint-*"))
    assert len((run.folder / "log.jsonl").read_text().splitlines()) == 1
    assert (run.folder / "mine.txt").read_text() == "keep"


def test_trackers_get_the_metrics(trainer, tmp_path):
    trainer(report_to="tensorboard", max_train_steps=1).train()
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))


def test_label_smoothing_reaches_the_loss(trainer):
    run = trainer(label_smoothing=0.2, loss_type="robust")
    errors = Errors(torch.tensor([-0.002, 0.002]), torch.zeros(2))
    got, logit = run.pair_loss(errors, judged(1))
    assert logit.item() == pytest.approx(4.0)
    wanted = losses.robust(torch.tensor([0.001]), torch.tensor([-0.001]), 2000.0, label_smoothing=0.2)
    assert torch.equal(got, wanted)


def test_options_survive_json(trainer):
    run = trainer(checkpointing_steps=1, max_train_steps=1)
    run.train()
    state = json.loads((run.folder / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["step"] == 1
    assert state["options"]["loss_type"] == "sigmoid"


def test_other_column_names_and_a_damaged_row_are_let_through_on_request(trainer, pairs_folder, tmp_path):
    rows = [json.loads(line) for line in (pairs_folder / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"], row["good"] = row.pop("prompt"), str(pairs_folder / row.pop("chosen"))
        row["rejected"] = str(pairs_folder / row["rejected"])
    rows[0]["good"] = str(tmp_path / "missing.png")
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "text", "chosen": "good"}
    with pytest.raises(UserError, match="max_bad"):
        trainer(dataset=str(data), columns=columns).train()
    run = trainer("second", dataset=str(data), columns=columns, max_bad=0.5, max_train_steps=1)
    run.train()
    assert len(run.pairs) == len(rows)
    with pytest.raises(UserError, match="between 0 and 1"):
        trainer("third", max_bad=2.0)


# -------------------------------------------------------------------- one image at a time


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 4},
        {"rank": 0, "loss_type": "dpop", "weighting": "v"},
        {"rank": 0, "loss_type": "mapo", "beta_dpo": 0.1},
        {"rank": 0, "reference_draws": 2},
        {"rank": 0, "sft_weight": 0.3},
    ],
    ids=str,
)
def test_low_memory_gives_the_gradient_of_both_images_together(trainer, options):
    """In double precision: in single, the margin of two errors is mostly rounding."""
    gradients = []
    for low in (False, True):
        run = trainer(f"run{low}", low_memory=low, max_train_steps=1, learning_rate=0.0, **options)
        run.train()
        run.adapter.module.double()
        parameters = [p for p in run.adapter.module.parameters() if p.requires_grad]
        run.weights.trainable = parameters
        if options["rank"] == 0 and run.adapter.reference:
            run.adapter.reference = frozen_copy(run.adapter.module)
        for p in parameters:
            p.data += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=torch.manual_seed(p.numel()))
        made = run.batch
        run.batch = lambda *a, made=made: replace(made(*a), latents=made(*a).latents.double())
        sums = run.accumulate(0, range(4), 8, last=False) + run.accumulate(0, range(4, 8), 8, last=True)
        gradients.append([sums, *(p.grad for p in parameters)])
    (sums, *wanted), (low_sums, *got) = gradients
    torch.testing.assert_close(low_sums, sums, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max()))
    assert max(float(g.abs().max()) for g in wanted) > 0


def peak_of_saved_bytes(run):
    """What autograd keeps at once for one pair, counted as it comes and goes; weights are there anyway."""
    weights = {p.data_ptr() for p in run.adapter.module.parameters()}
    alive, peak = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            self.size = 0 if tensor.data_ptr() in weights else tensor.numel() * tensor.element_size()
            alive += self.size
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor):
        run.accumulate(0, range(1), 1, last=True)
    return peak


def test_low_memory_keeps_half_of_the_activations(trainer):
    peaks = []
    for low in (False, True):
        run = trainer(f"run{low}", low_memory=low, max_train_steps=1, rank=4)
        run.train()
        peaks.append(peak_of_saved_bytes(run))
    assert peaks[1] <= 0.55 * peaks[0]


def test_low_memory_trains_and_resumes(trainer, log):
    run = trainer(low_memory=True, max_train_steps=4, checkpointing_steps=2, learning_rate=1e-3)
    run.train()
    records = log(run.folder)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[-1]["rewards/margins"] != 0
    again = trainer(
        low_memory=True, max_train_steps=4, resume_from_checkpoint=str(run.folder / "checkpoint-2")
    )
    again.train()
    for p, q in zip(run.weights.trainable, again.weights.trainable, strict=True):
        assert torch.equal(p, q)


def test_low_memory_refuses_losses_over_the_batch(trainer):
    with pytest.raises(UserError, match="low_memory takes one by one"):
        trainer(low_memory=True, loss_type="aot")


# -------------------------------------------------------------------- automatic beta


def test_an_automatic_beta_holds_the_gradient_factor_and_resumes(trainer, log):
    options = {
        "beta_target": 0.3,
        "max_train_steps": 40,
        "checkpointing_steps": 20,
        "train_batch_size": 16,
        "rank": 0,
    }
    run = trainer(**options)
    run.train()
    records = log(run.folder)
    assert records[0]["beta"] == records[1]["beta"] == 2000.0  # a policy at its reference has no margin yet
    assert len({r["beta"] for r in records[2:]}) == 38
    # The target is met at the running size of the margins.
    assert run.beta * run._margin == pytest.approx(math.log(1 / 0.3 - 1), rel=1e-6)
    again = trainer(**options, resume_from_checkpoint=str(run.folder / "checkpoint-20"))
    again.train()
    assert again.beta == run.beta
    for p, q in zip(run.weights.trainable, again.weights.trainable, strict=True):
        assert torch.equal(p, q)


# -------------------------------------------------------------------- several losses at once, scores


def test_a_single_loss_and_its_guard_are_a_sum_of_two(trainer):
    short = trainer("short", loss_type="robust", label_smoothing=0.2, sft_weight=0.3)
    terms = [LossTerm(name="robust", options={"label_smoothing": 0.2}), LossTerm(name="sft", weight=0.3)]
    long = trainer("long", losses=terms)
    assert short.terms == long.terms
    short.train()
    long.train()
    assert all(torch.equal(v, weights(long.folder)[k]) for k, v in weights(short.folder).items())


def test_terms_have_weights_and_betas_of_their_own(trainer):
    terms = [LossTerm(name="sigmoid"), LossTerm(name="simpo", weight=0.5, beta=3.0, options={"gamma": 0.1})]
    run = trainer(losses=terms)
    errors = Errors(torch.tensor([0.3, 0.2]), torch.tensor([0.31, 0.2]))
    got, logit = run.pair_loss(errors, judged(1))
    w, l, ref_w, ref_l = (torch.tensor([-0.5 * e]) for e in (0.3, 0.2, 0.31, 0.2))  # noqa: E741
    wanted = losses.sigmoid(w - ref_w, l - ref_l, 2000.0) + 0.5 * losses.simpo(w, l, 3.0, gamma=0.1)
    torch.testing.assert_close(got, wanted)
    assert logit.item() == pytest.approx(10.0)


def test_the_offset_of_bco_is_the_running_mean_of_the_rewards_and_resumes(trainer, log):
    options = {"loss_type": "bco", "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2}
    run = trainer(**options)
    run.train()
    mean = 0.0
    for record in log(run.folder):
        mean = 0.95 * mean + 0.05 * (record["rewards/chosen"] + record["rewards/rejected"]) / 2
    assert 2000 * run._gain == pytest.approx(mean, rel=1e-4)
    assert mean != 0
    errors = Errors(torch.tensor([0.3, 0.2]), torch.tensor([0.31, 0.2]))
    got, _ = run.pair_loss(errors, judged(1))
    wanted = losses.bco_pair(torch.tensor([0.005]), torch.tensor([0.0]), 2000.0, offset=2000 * run._gain)
    torch.testing.assert_close(got, wanted)
    again = trainer(**options, resume_from_checkpoint="checkpoint-2")
    again.train()
    assert again._gain == run._gain


@pytest.mark.parametrize("low_memory", [False, True])
def test_log_ratios_that_are_exponentiated_are_scaled_by_their_running_size(trainer, log, low_memory):
    options = {"loss_type": "forward_kl", "max_train_steps": 5, "checkpointing_steps": 3}
    options |= {"train_batch_size": 1, "learning_rate": 1e-3, "low_memory": low_memory}
    run = trainer(**options)
    run.train()
    records, square = log(run.folder), 0.0
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for record in records:
        scale = 1 / square**0.5 if square else 1.0
        assert record["log_ratio_scale"] == pytest.approx(scale, rel=1e-4)
        now = (record["rewards/chosen"] ** 2 + record["rewards/rejected"] ** 2) / 2 / 2000**2
        square = 0.95 * square + 0.05 * now if square else now  # the first step is at the reference
    assert run._square == pytest.approx(square, rel=1e-4)
    assert square > 0
    errors = Errors(torch.tensor([0.3, 0.2]), torch.tensor([0.31, 0.2]))
    got, _ = run.pair_loss(errors, judged(1))
    scaled = {"divergence": "forward_kl", "scale": run.nats}
    wanted = losses.f_dpo(torch.tensor([0.005]), torch.tensor([0.0]), 2000 / run.nats, **scaled)
    torch.testing.assert_close(got, wanted)
    again = trainer(**options, resume_from_checkpoint="checkpoint-3")
    again.train()
    assert again._square == run._square
    for p, q in zip(run.weights.trainable, again.weights.trainable, strict=True):
        assert torch.equal(p, q)


def test_a_given_scale_is_kept_and_other_losses_have_none(trainer, log):
    for name, options in {"given": {"loss_options": {"scale": 50.0}, "loss_type": "js"}, "plain": {}}.items():
        run = trainer(name, max_train_steps=2, **options)
        run.train()
        assert run._square == 0.0
        assert "log_ratio_scale" not in log(run.folder)[-1]


def test_time_bins_are_quarters_of_the_models_own_schedule(trainer, model_folder, log):
    pipe = load(model_folder)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, num_train_timesteps=200)
    run = trainer(model=pipe, max_train_steps=1, timesteps=[10.0, 60.0])
    run.train()
    bins = log(run.folder)[0]["errors_by_time"]["chosen"]
    assert [value is None for value in bins] == [False, False, True, True]


def test_a_sum_without_any_reference_runs_none(trainer):
    run = trainer(losses=[LossTerm(name="cpo", beta=10.0), LossTerm(name="sft", beta=1.0)])
    run.train()
    assert run.adapter.reference is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"losses": [LossTerm(name="sigmod")]}, "did you mean 'sigmoid'"),
        ({"losses": [LossTerm(name="hinge", options={"beta": 1.0})]}, "hinge has no setting 'beta'"),
        ({"losses": [LossTerm(name="hinge", beta=0.0)]}, "beta of hinge must be above 0"),
        ({"losses": [LossTerm(name="hinge")], "sft_weight": 1.0}, "write those as terms"),
        ({"losses": [LossTerm(name="sigmoid"), LossTerm(name="aot")], "low_memory": True}, "one by one"),
        ({"losses": [LossTerm(name="sft")], "reference_draws": 1}, "sft needs no reference"),
    ],
    ids=str,
)
def test_sums_that_cannot_work_are_refused(trainer, options, words):
    with pytest.raises(UserError, match=words):
        trainer(**options)


@pytest.fixture(scope="session")
def scored_pairs(tmp_path_factory, pairs):
    rows = [replace(pairs[i], scores=(0.5 + i / 32, 0.25)) for i in range(len(pairs))]
    return open_pairs(write_pairs(tmp_path_factory.mktemp("scored") / "pairs", rows))


def test_score_gaps_reach_the_loss(trainer, scored_pairs, log):
    run = trainer(dataset=scored_pairs, loss_type="modpo", loss_options={"weight": 0.5}, max_train_steps=1)
    run.train()
    batch = run.batch(0, range(8))
    assert batch.gap.tolist() == pytest.approx([0.25 + row / 32 for row in batch.rows])
    # At the reference z = 0, which leaves the offset alone.
    wanted = torch.nn.functional.softplus(batch.gap).mean().item()
    assert log(run.folder)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_scores_that_are_missing_are_named_before_the_model_loads(
    trainer, scored_pairs, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(DiffusionDPOTrainer, "_load_model", lambda self: pytest.fail("the model was loaded"))
    some = [replace(scored_pairs[i], scores=(1.0, None if i else 0.0)) for i in range(16)]
    for number, data in enumerate((pairs, open_pairs(write_pairs(tmp_path / "some", some)))):
        with pytest.raises(UserError, match=r"modpo wants a score .* 1[56] of 16 pairs lack.*data score"):
            trainer(f"run{number}", dataset=data, losses=[LossTerm(name="modpo")]).train()


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "flow_prediction"])
def prepared(request, model_folder, scored_pairs, shared_cache, tmp_path_factory):
    """A trainer of each prediction type that has run one step, to be given other losses."""
    pipe = load(model_folder)
    if request.param == "flow_prediction":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, prediction_type=request.param)
    config = DiffusionDPOConfig(
        output_dir=str(tmp_path_factory.mktemp(request.param)),
        cache_dir=str(shared_cache),
        train_batch_size=8,
        max_train_steps=1,
        learning_rate=1e-3,
        rank=4,
        checkpointing_steps=0,
        progress=False,
    )
    run = DiffusionDPOTrainer(config, model=pipe, dataset=scored_pairs)
    run.train()
    assert run.adapter.prediction_type == request.param
    return run


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_runs_on_every_prediction_type(prepared, name):
    """A gradient step, taken small, lowers the loss of the very same pairs."""
    run = prepared
    run.terms = [LossTerm(name=name)]
    run.needs_reference = LOSSES[name].reference
    run.weights.use_as_reference()
    run.beta = 20.0
    parameters = run.weights.trainable
    before = [p.detach().clone() for p in parameters]
    sums = run.accumulate(0, range(8), 8, last=True)
    norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert 0 < norm < math.inf
    with torch.no_grad():
        for p in parameters:
            p -= 0.002 * p.grad / norm
    after = run.accumulate(0, range(8), 8, last=True)
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
        p.grad = None
    assert after[0] < sums[0]
