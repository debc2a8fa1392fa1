"""Steering at inference: published numbers, seeds, searches that find what they look for, loading."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.utils.dynamic_modules_utils import find_pipeline_class
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.bench.networks import tiny_pipeline
from diffalign.errors import RunFailed, UserError
from diffalign.models import load_adapter
from diffalign.pipelines import best_of, code_edit, zo_rank
from diffalign.pipelines import flow_nrg as flow_nrg_module
from diffalign.pipelines import reno as reno_module
from diffalign.pipelines.best_of import best_of_n, candidate_seeds, search_steps
from diffalign.pipelines.code_edit import clip_to_confidence, depth_grid
from diffalign.pipelines.code_edit import code_edit as edit
from diffalign.pipelines.flow_nrg import flow_nrg, tilt
from diffalign.pipelines.load import load_pipeline
from diffalign.pipelines.reno import ReNOPipeline, norm_penalty, optimise_noise, reno
from diffalign.pipelines.steering import Drawing, frozen
from diffalign.pipelines.zo_rank import line_search_points, rank_direction, ranked_by, zo_rank_sgd
from diffalign.playground.captions import draw_captions
from diffalign.playground.verifier import accuracy
from diffalign.rewards import load_reward
from diffalign.solvers import SOLVERS, NoiseSchedule
from diffalign.solvers.prediction import PREDICTIONS, convert
from diffalign.vote.ranker import ranked_by_person

GOLDENS = Path(__file__).parent.parent / "goldens" / "losses_online"


def golden(file, case):
    with np.load(GOLDENS / f"{file}.npz") as arrays:
        names = {key.split("__")[-1]: key for key in arrays.files if key.startswith(f"{case}__")}
        return {name: torch.tensor(arrays[key]) for name, key in names.items()}


#: times that depend on the size of the image
SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 30.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def redness(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def plain(pipe, prompts, seeds, steps, guidance=1.0):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = pipe(
        prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
    )
    return torch.from_numpy(drawn.images).permute(0, 3, 1, 2)


# ------------------------------------------------------------ drawing


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (3, 1.0), (3, 4.0)])
def test_a_drawing_is_what_the_pipeline_draws(pipe, steps, guidance):
    prompts, seeds = ["a", "b"], [3, 4]
    drawing = Drawing(pipe, prompts, seeds, steps=steps, guidance=guidance)
    images = drawing.images(drawing.noise, [0, 1], batch_size=2)
    torch.testing.assert_close(images, plain(pipe, prompts, seeds, steps, guidance), rtol=1e-4, atol=1e-4)
    again = drawing.images(drawing.noise[1:], [1], batch_size=2)
    torch.testing.assert_close(again, images[1:], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "align/families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("family", "shift"), [("sdxl", {}), ("sd3", {}), ("sd3", SHIFT), ("flux", {}), ("flux", SHIFT)]
)
def test_every_family_draws_as_its_pipeline_and_has_a_gradient(families, family, shift):
    pipe = families.build(family)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **shift)
    pipe.set_progress_bar_config(disable=True)
    drawing = Drawing(pipe, ["a", "b"], [3, 4], steps=2, guidance=1.0)
    noise = drawing.noise.requires_grad_()
    images = drawing(noise, [0, 1])
    torch.testing.assert_close(images.detach(), plain(pipe, ["a", "b"], [3, 4], 2), rtol=1e-3, atol=1e-3)
    (gradient,) = torch.autograd.grad(images[0].sum(), noise)
    assert gradient[0].norm() > 0
    assert gradient[1].norm() == 0


def test_models_without_a_way_are_refused(families):
    with pytest.raises(UserError, match="WanPipeline makes videos"):
        best_of_n(families.build("wan"), "a", redness)


def test_weights_are_frozen_only_meanwhile(pipe):
    before = [w.requires_grad for w in pipe.unet.parameters()]
    assert any(before)
    with frozen(pipe):
        assert not any(w.requires_grad for w in pipe.unet.parameters())
    assert [w.requires_grad for w in pipe.unet.parameters()] == before


def test_prompts_and_seeds_belong_together(pipe):
    with pytest.raises(UserError, match="2 prompts but 1 seeds"):
        best_of_n(pipe, ["a", "b"], redness, seeds=[1])
    with pytest.raises(UserError, match="num_inference_steps must be at least 1"):
        best_of_n(pipe, "a", redness, num_inference_steps=0)


# ------------------------------------------------------------ ReNO


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_the_penalty_is_the_published_one(dtype, tolerance):
    case = golden("reno", f"reno_regulariser__{dtype}")
    x = case["latents"].requires_grad_()
    value = 0.01 * norm_penalty(x)
    torch.testing.assert_close(value.squeeze(), case["regularisation"], rtol=tolerance, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    # The released code takes the norm in the latents' precision, which float16 shows threefold here.
    torch.testing.assert_close(gradient, case["grad"], rtol=3 * tolerance, atol=1e-6)


def test_the_ascent_is_the_published_one():
    case = golden("reno", "reno_trajectory")
    path, norms = [case["init"]], []

    def after(_, x, gradient_norms):
        path.append(x.clone())
        norms.append(gradient_norms)

    _, history = optimise_noise(
        lambda x, rows: -(case["a"] * x.tanh()).flatten(1).sum(1), case["init"], iterations=4, after=after
    )
    torch.testing.assert_close(torch.stack(path), case["trajectory"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-history[:, 0].double(), case["reward_losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.cat(norms).double(), case["grad_norms_before_clip"], rtol=1e-4, atol=1e-5
    )


def test_rows_do_not_see_each_other_and_stop_by_themselves():
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    calls = []

    def reward(x, rows):  # row 1 cannot get better
        calls.extend(rows.tolist())
        return torch.where(rows == 1, 0.0, 1.0) * x.sum(1)

    together, history = optimise_noise(reward, noise, iterations=9, patience=3, batch_size=2)
    assert calls.count(0) == calls.count(2) == 9
    assert calls.count(1) == 4  # the start, then three in vain
    assert history[:, 1].isnan().sum() == 5
    assert torch.equal(together[1], noise[1])
    alone, _ = optimise_noise(lambda x, rows: x.sum(1), noise[2:], iterations=9)
    torch.testing.assert_close(together[2:], alone)


def test_a_gradient_that_is_not_finite_ends_the_run():
    with pytest.raises(RunFailed, match="not finite in iteration 1"):
        optimise_noise(lambda x, rows: (x - x).sqrt().sum(1), torch.ones(2, 4))


@pytest.mark.parametrize("steps", [1, 3])
def test_reno_finds_images_with_more_reward(pipe, steps):
    out = reno(
        pipe,
        ["a", "b"],
        redness,
        seeds=[3, 4],
        num_inference_steps=steps,
        iterations=4,
        checkpoints=2,
        progress=False,
        output_type="pt",
    )
    first = plain(pipe, ["a", "b"], [3, 4], steps)
    torch.testing.assert_close(out.first_rewards, redness(first, None), rtol=1e-3, atol=1e-3)
    assert (out.rewards > out.first_rewards).all()
    torch.testing.assert_close(redness(out.images, None), out.rewards, rtol=1e-3, atol=1e-3)
    assert all(w.grad is None for w in pipe.unet.parameters())
    assert out.history.shape == (4, 2)


@pytest.mark.parametrize("iterations", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_reno_makes_more_captions_true_by_a_judge_that_it_does_not_see(iterations):
    captions = draw_captions(4242, 24, held_out=True)
    scorer = load_reward("playground/scorer").score
    options = {"seeds": range(24), "batch_size": 24, "output_type": "np", "progress": False}

    def true(iterations):
        found = reno(load_pipeline("playground/few-step"), captions, scorer, iterations=iterations, **options)
        return accuracy(captions, (255 * found.images).round().astype(np.uint8))["true"]

    assert true(iterations) >= true(1) + 0.15


def test_reno_refuses_what_cannot_work(pipe):
    with pytest.raises(UserError, match="needs a reward with a gradient"):
        reno(pipe, "a", lambda images, prompts: redness(images, prompts).detach(), progress=False)
    with pytest.raises(UserError, match=r"momentum must lie in \[0, 1\)"):
        reno(pipe, "a", redness, momentum=1.0)
    with pytest.raises(UserError, match="iterations must be at least 1"):
        reno(pipe, "a", redness, iterations=0)
    with pytest.raises(UserError, match="output_type must be pil, np or pt"):
        reno(pipe, "a", redness, iterations=1, output_type="tensor", progress=False)


def test_a_steering_pipeline_loads_as_any_other(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    options = {"iterations": 2, "progress": False, "seeds": [3], "output_type": "np"}
    expected = reno(pipe, "a", redness, **options).images
    for loaded in (ReNOPipeline.from_pretrained(tmp_path / "model"), ReNOPipeline.from_pipe(pipe)):
        assert type(loaded) is ReNOPipeline
        np.testing.assert_allclose(loaded("a", redness, **options).images, expected, atol=1e-4)


@pytest.mark.parametrize("module", [best_of, code_edit, flow_nrg_module, reno_module, zo_rank])
def test_a_module_is_a_custom_pipeline_of_diffusers(module, pipe, tmp_path):
    assert find_pipeline_class(module).__module__ == module.__name__
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=module.__file__, trust_remote_code=True
    )
    assert type(loaded).__name__ == find_pipeline_class(module).__name__
    assert loaded.unet.config.sample_size == pipe.unet.config.sample_size


#: every search and guidance, with few steps
SEARCHES = {
    "best_of_n": lambda pipe, prompts, **o: best_of_n(pipe, prompts, redness, n=3, **o),
    "search_steps": lambda pipe, prompts, **o: search_steps(
        pipe, prompts, redness, candidates=2, transition_options={"eta": 1.0}, **o
    ),
    "reno": lambda pipe, prompts, **o: reno(pipe, prompts, redness, iterations=2, **o),
    "zo_rank_sgd": lambda pipe, prompts, **o: zo_rank_sgd(
        pipe, prompts, ranked_by(redness), rounds=2, queries=3, **o
    ),
    "flow_nrg": lambda pipe, prompts, **o: flow_nrg(pipe, prompts, redness, weight=30.0, **o),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_an_image_of_a_batch_is_the_one_drawn_alone(pipe, name, capsys):
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    together = SEARCHES[name](
        pipe, ["a", "b", "a"], seeds=[3, 4, 5], batch_size=2, progress=False, **options
    ).images
    assert not capsys.readouterr().err
    alone = SEARCHES[name](pipe, ["b"], seeds=[4], batch_size=1, progress=True, **options).images
    assert "100%" in capsys.readouterr().err  # a bar that gets to its end
    torch.testing.assert_close(alone, together[1:2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-3)  # another seed


# ------------------------------------------------------------ ZO-RankSGD


@pytest.mark.parametrize("case", ["top6of6", "top3of6"])
def test_direction_and_line_search_are_the_published_ones(case):
    numbers = golden("zo_ranksgd", f"zo_ranksgd__{case}")
    ranking = (numbers["ranking"] - 1).tolist()
    direction = rank_direction(numbers["queries"], numbers["start"], ranking, "published")
    torch.testing.assert_close(direction, numbers["direction"], rtol=1e-9, atol=1e-12)
    points = line_search_points(numbers["start"], direction, 1.0, 4)
    torch.testing.assert_close(points, numbers["linesearch_codes"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(points[numbers["linesearch_choice"][0] - 1], numbers["new_best"])


@given(st.integers(2, 7), st.data())
@settings(max_examples=30, deadline=None)
def test_the_direction_averages_the_known_pairs(m, data):
    k = data.draw(st.integers(1, m))
    ranking = data.draw(st.permutations(range(m)))[:k]
    generator = torch.Generator().manual_seed(m)
    queries, start = torch.randn(m, 3, generator=generator), torch.randn(3, generator=generator)
    rest = [q for q in range(m) if q not in ranking]
    pairs = [(a, b) for i, a in enumerate(ranking) for b in [*ranking[i + 1 :], *rest]]
    mean = torch.stack([queries[a] - queries[b] for a, b in pairs]).mean(0)
    torch.testing.assert_close(rank_direction(queries, start, ranking), mean, rtol=1e-4, atol=1e-5)


def test_rankings_alone_lead_uphill(pipe):
    out = zo_rank_sgd(
        pipe,
        ["a", "b"],
        ranked_by(redness),
        seeds=[3, 4],
        num_inference_steps=1,
        guidance_scale=1.0,
        rounds=4,
        smoothing=0.3,
        progress=False,
        output_type="pt",
    )
    assert (redness(out.images, None) > redness(plain(pipe, ["a", "b"], [3, 4], 1), None)).all()


def test_without_success_the_image_stays(pipe):
    shown = []

    def stubborn(images, prompt, count):
        shown.append((len(images), prompt, count))
        return [0, 1, 2] if count == 3 else [len(images) - 1]  # never another image

    out = zo_rank_sgd(
        pipe, "a", stubborn, num_inference_steps=1, rounds=9, top_k=3, patience=2, progress=False
    )
    assert shown == [(6, "a", 3), (6, "a", 1)] * 2
    assert torch.equal(out.noise, Drawing(pipe, "a", None, steps=1, guidance=1.0).noise)


def test_a_person_ranks_on_the_voting_page(tmp_path, monkeypatch):
    picks = iter([[2, 0], None])

    def serve(ballot, **_):  # the person clicks on images 2 and 0, wherever the page shows them
        (number,) = ballot.coming
        shown = [int(path.stem) for path in ballot.tasks[number].images]
        chosen = next(picks)
        ballot.cast(number, None if chosen is None else [shown.index(image) for image in chosen])

    monkeypatch.setattr("diffalign.vote.server.serve", serve)
    rank = ranked_by_person(tmp_path, annotator="anna")
    images = torch.rand(4, 3, 8, 8)
    assert rank(images, "a red dot", 3) == [2, 0]
    assert (tmp_path / "round-0000" / "votes.jsonl").exists()
    with pytest.raises(UserError, match="were not ranked"):
        rank(images, "a red dot", 3)
    with pytest.raises(UserError, match="9 images at most"):
        rank(torch.rand(10, 3, 8, 8), "a red dot", 3)


def test_bad_rankings_and_options_are_refused(pipe):
    with pytest.raises(UserError, match="names one or more of 6 images"):
        zo_rank_sgd(pipe, "a", lambda images, prompt, count: [6], num_inference_steps=1, progress=False)
    for options, match in (
        ({"top_k": 7}, "top_k must not exceed queries"),
        ({"queries": 2}, "queries must be at least 3"),
        ({"smoothing": 0.0}, "must be above 0"),
        ({"variant": "other"}, "variant must be one of pairs, published"),
    ):
        with pytest.raises(UserError, match=match):
            zo_rank_sgd(pipe, "a", ranked_by(redness), **options)


# ------------------------------------------------------------ searches and guidance


def test_best_of_n_keeps_the_best_and_knows_the_first(pipe):
    out = best_of_n(
        pipe,
        ["a", "b"],
        redness,
        seeds=[3, 4],
        n=4,
        num_inference_steps=1,
        guidance_scale=1.0,
        progress=False,
        output_type="pt",
    )
    first = redness(plain(pipe, ["a", "b"], [3, 4], 1), None)
    torch.testing.assert_close(out.first_rewards, first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out.rewards, out.history.amax(0))
    torch.testing.assert_close(redness(out.images, None), out.rewards, rtol=1e-3, atol=1e-3)
    assert len(set(candidate_seeds(3, 50))) == 50
    assert candidate_seeds(3, 50)[:4] == candidate_seeds(3, 4)


def test_more_candidates_at_every_step_give_more_reward(pipe):
    def search(candidates):
        out = search_steps(
            pipe,
            ["a", "b", "a"],
            redness,
            candidates=candidates,
            num_inference_steps=3,
            guidance_scale=1.0,
            transition_options={"eta": 1.0},
            batch_size=2,
            progress=False,
            output_type="pt",
        )
        torch.testing.assert_close(redness(out.images, None), out.rewards, rtol=1e-3, atol=1e-3)
        return out.rewards

    assert search(6).mean() > search(1).mean()


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_tilted_output_is_one_of_the_tilted_score(kind):
    schedule = NoiseSchedule.from_config(
        {"_class_name": "FlowMatchEulerDiscreteScheduler"}
        if kind == "flow_prediction"
        else {"beta_schedule": "scaled_linear"}
    )
    x, output, gradient = torch.randn(3, 2, 4).unbind(0)
    time = 400.0
    alpha, sigma = (float(level) for level in schedule.alpha_sigma(time))
    tilted = tilt(output, gradient, time, schedule, kind, weight=0.3, most=99.0)
    eps, eps_tilted = (convert(o, x, alpha, sigma, source=kind, to="epsilon") for o in (output, tilted))
    torch.testing.assert_close(eps_tilted, eps - 0.3 * sigma * gradient, rtol=1e-4, atol=1e-5)
    if kind == "flow_prediction":  # as the paper has it
        torch.testing.assert_close(tilted, output - 0.3 * sigma / (1 - sigma) * gradient)
        start = tilt(output, gradient, schedule.t_max, schedule, kind, weight=1.0, most=5.0)
        torch.testing.assert_close(start, output - 5 * gradient)


def test_guidance_by_reward_raises_it(pipe):
    scheduler, pipe.scheduler = pipe.scheduler, SOLVERS["ddim"].from_config(pipe.scheduler.config)
    options = {"seeds": [3, 4], "num_inference_steps": 4, "guidance_scale": 1.0, "progress": False}
    try:
        without = flow_nrg(pipe, ["a", "b"], redness, weight=0.0, output_type="pt", **options)
        torch.testing.assert_close(without.images, plain(pipe, ["a", "b"], [3, 4], 4), rtol=1e-3, atol=1e-3)
        with_it = flow_nrg(pipe, ["a", "b"], redness, weight=30.0, **options)
        assert (with_it.rewards > without.rewards).all()
        noisy = flow_nrg(
            pipe,
            ["a", "b"],
            noisy_score=lambda x, t, prompts: 0.01 * x.mean((1, 2, 3)),
            weight=100.0,
            output_type="pt",
            **options,
        )
        assert noisy.rewards is None
        assert not torch.allclose(noisy.images, without.images)
    finally:
        pipe.scheduler = scheduler
    with pytest.raises(UserError, match="either score, of images, or noisy_score"):
        flow_nrg(pipe, "a")
    with pytest.raises(UserError, match="needs a reward with a gradient"):
        flow_nrg(
            pipe,
            "a",
            lambda images, prompts: redness(images, prompts).detach(),
            num_inference_steps=2,
            progress=False,
        )


# ------------------------------------------------------------ editing along the ODE


@pytest.fixture(scope="module")
def pictures(pipe):
    side = load_adapter(pipe).default_resolution
    return torch.randint(256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)) / 255


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_without_updates_an_image_comes_back(families, family, pictures):
    pipe = families.build(family)
    pipe.vae.register_to_config(scaling_factor=4.0)  # the latents of an untrained autoencoder are small
    adapter = load_adapter(pipe)
    side = adapter.default_resolution
    images = pictures[:, :, :side, :side]
    options = {"updates": 0, "confidence": 1.0, "guidance_scale": 1.0, "progress": False}
    kept = adapter.decode(adapter.encode_images(2 * images - 1)["latents"]).div(2).add(0.5).clamp(0, 1)

    def error(steps):
        out = edit(pipe, "a", images, num_inference_steps=steps, output_type="pt", **options)
        assert out.clipped.tolist() == [0, 0, 0]
        return (out.images - kept).abs().mean().item()

    assert error(24) < 0.02
    assert error(24) < error(6)


def test_an_edit_does_not_depend_on_the_batch(pipe, pictures, capsys):
    prompts, options = ["a", "b", "c"], {"num_inference_steps": 4, "depths": [0.6, 0.3], "updates": 2}
    together = edit(pipe, prompts, pictures, batch_size=2, progress=False, output_type="pt", **options)
    alone = edit(pipe, "b", pictures[1:2], batch_size=1, output_type="pt", **options)
    torch.testing.assert_close(alone.images, together.images[1:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.latents, together.latents[1:2], rtol=1e-3, atol=1e-3)
    assert "12/12" in capsys.readouterr().err  # 4 up, 2 at each of two depths, 4 down
    (picture,) = edit(pipe, "b", as_picture(pictures[1]), progress=False, **options).images
    assert np.abs(np.asarray(picture) / 255 - together.images[1].permute(1, 2, 0).numpy()).mean() < 0.02


def as_picture(image):
    return Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def test_updates_follow_the_score(pipe, pictures):
    """One update at one depth is x - step sigma eps; the way back is the same for both."""
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "confidence": 1.0, "order": 1}
    adapter = load_adapter(pipe)
    schedule = adapter.schedule
    outs = [
        edit(pipe, "a", pictures, updates=n, step_size=0.2, progress=False, output_type="pt", **options)
        for n in (0, 1)
    ]
    assert torch.equal(outs[0].latents, outs[1].latents)
    times, places = depth_grid(schedule, [0.5], 1)
    assert places == [1]
    alpha, sigma = schedule.alpha_sigma(times[1])
    alpha_0, sigma_0 = schedule.alpha_sigma(times[0])

    def eps(x):
        t = torch.full((3,), float(times[1]))
        cond = {
            name: value.expand(3, *value.shape[1:]) for name, value in adapter.encode_prompts(["a"]).items()
        }
        with torch.no_grad():
            return adapter.denoise(x, t, cond)

    x = outs[1].latents - 0.2 * float(sigma) * eps(outs[1].latents)
    down = float(alpha_0 / alpha) * (x - float(sigma) * eps(x)) + float(sigma_0) * eps(x)  # DDIM
    expected = adapter.decode(down).div(2).add(0.5).clamp(0, 1)
    torch.testing.assert_close(outs[1].images, expected, rtol=1e-3, atol=1e-3)


@given(st.floats(0.05, 0.99), st.floats(0.0, 1.0), st.floats(0.01, 1.0))
@settings(max_examples=20, deadline=None)
def test_the_interval_holds_the_share_it_is_named_after(confidence, alpha, sigma):
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x = noise * float(np.hypot(alpha, sigma))
    clipped = clip_to_confidence(x, alpha, sigma, confidence)
    assert (clipped == x).float().mean().item() == pytest.approx(confidence, abs=0.02)
    assert torch.equal(clipped, clip_to_confidence(clipped, alpha, sigma, confidence))
    assert clip_to_confidence(x, alpha, sigma, 1.0) is x


def test_what_an_edit_cannot_do_is_refused(pipe, pictures, families):
    for options, match in (
        ({"depths": 1.0}, "depths must lie above 0 and below 1"),
        ({"depths": []}, "depths must lie above 0 and below 1"),
        ({"confidence": 0.0}, "confidence must lie above 0"),
        ({"updates": -1}, "updates must be at least 0"),
        ({"order": 4}, "order must be 1, 2 or 3"),
        ({"source_prompt": ["a", "b"]}, "2 texts in source_prompt but 3 images"),
    ):
        with pytest.raises(UserError, match=match):
            edit(pipe, "a", pictures, progress=False, **options)
    with pytest.raises(UserError, match="2 texts in prompt but 3 images"):
        edit(pipe, ["a", "b"], pictures)
    with pytest.raises(UserError, match="WanPipeline makes videos"):
        edit(families.build("wan"), "a", pictures)
