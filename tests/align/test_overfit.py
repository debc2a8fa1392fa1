"""Every loss, with the likelihood and a UNet, learns sixteen pairs by heart in at most 200 steps."""

import copy
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffalign.likelihood import add_noise, evaluate
from diffalign.losses import LIST_LOSSES, LOSSES, kto, reference_point
from diffalign.solvers.noise import NoiseSchedule
from diffalign.trainers.list_dpo import in_order

STEPS, IN_A_ROW = 200, 20

# Errors of this network are near 1, so margins come to a few tenths and beta 10 brings z to a few units.
# At the thousands that errors of 1e-3 want, beta d is in the hundreds after one step, and APO and KTO, which
# are flat on both sides, leave every image where that step took it.
BETA = dict.fromkeys(LOSSES, 10.0) | {
    "ipo": 2.0,  # stops at z = 1/2: a margin of 1/4
    "ipo_raw": 2.0,
    "sppo": 2.0,  # stops at beta d = +-1/2
    # The rejected image weighs a tenth, so z is nearly beta d_w: where that makes the loss flat, the two are
    # hardly apart yet.
    "pso": 1.0,
    "discopop": 100.0,
    "mapo": 0.1,  # multiplies the loss, not the margin, and so do the next two
    "orpo": 1.0,
    "sft": 1.0,
}
RATE = dict.fromkeys(LOSSES, 1e-3) | {
    # Its slope is reversed between z = -0.12 and 0.07, where every run begins: steps have to leap over that.
    "discopop": 2e-2,
}
# It makes the rejected image likelier, and nothing else: a term to go with others.
INDIFFERENT = {"prior"}


@pytest.fixture(scope="module")
def unet(model_folder):
    return UNet2DConditionModel.from_pretrained(model_folder, subfolder="unet")


def noised(images):
    """32 latents: so many of each prompt, 80 % alike, under one noise, time and text. Rows are the first
    image of every prompt, then the second of every prompt, and so on.

    Times end at 600: beyond, little of the images is left that could tell them apart.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = 32 // images
    draw = partial(torch.randn, generator=generator)
    latents = 0.8**0.5 * draw(1, prompts, 4, 4, 4) + 0.2**0.5 * draw(images, prompts, 4, 4, 4)
    noise = draw(prompts, 4, 4, 4).repeat(images, 1, 1, 1)
    t = torch.randint(0, 600, (prompts,), generator=generator).repeat(images)
    cond = {"prompt_embeds": draw(prompts, 4, 32).repeat(images, 1, 1)}
    return add_noise(NoiseSchedule.from_config({}), "epsilon", latents.flatten(0, 1), noise, t), cond


def overfit(unet, loss, *, images=2, rate=1e-3, reference=True):
    """The implicit accuracy of each step, until it has been above 0.95 for twenty of them.

    ``loss`` of :class:`~diffalign.likelihood.Errors`.
    """
    data, cond = noised(images)
    unet, accuracy = copy.deepcopy(unet), []

    def denoise(x_t, t, cond, reference=False):
        return unet(x_t, t, cond["prompt_embeds"], return_dict=False)[0]

    with torch.no_grad():
        initial = evaluate(denoise, data, cond, reference=False).policy
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate)
    ranks = -torch.arange(images).expand(32 // images, images)
    for _ in range(STEPS):
        errors = evaluate(denoise, data, cond, reference=initial if reference else False)
        gain = errors.log_ratio().detach().reshape(images, -1).T
        accuracy.append(in_order(gain, ranks, 1.0)[0].mean().item())
        if len(accuracy) >= IN_A_ROW and min(accuracy[-IN_A_ROW:]) > 0.95:
            break
        optimizer.zero_grad()
        loss(errors).mean().backward()
        optimizer.step()
    return accuracy


def assert_learnt(accuracy):
    assert accuracy[0] <= 0.6
    assert min(accuracy[-IN_A_ROW:]) > 0.95


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - INDIFFERENT))
def test_every_loss_on_pairs(unet, name):
    """A loss without a reference is judged by the likelihoods themselves."""
    row = LOSSES[name]

    def loss(errors):
        reference = None if errors.reference is None else -0.5 * errors.reference
        return row(-0.5 * errors.policy, reference, BETA[name], gap=torch.full((16,), 2.0))

    assert_learnt(overfit(unet, loss, rate=RATE[name], reference=row.reference))


def test_labels_that_may_be_wrong(unet):
    """Conservative DPO: at e = 0.1 it stops at z = log 9."""

    def loss(errors):
        reference = -0.5 * errors.reference
        return LOSSES["sigmoid"](-0.5 * errors.policy, reference, 10.0, label_smoothing=0.1)

    assert_learnt(overfit(unet, loss))


# The slope of the risk seeking one dies where an image is lost, so beta keeps all near the middle.
@pytest.mark.parametrize(
    ("utility", "beta"), [("sigmoid", 10.0), ("loss_averse", 10.0), ("risk_seeking", 1.0)]
)
def test_diffusion_kto_on_good_and_bad_images(unet, utility, beta):
    good = torch.arange(32) < 16

    def loss(errors):
        gain = errors.log_ratio()
        return kto(gain, good, beta, kl=reference_point(gain), utility=utility)

    assert_learnt(overfit(unet, loss))


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_every_loss_on_lists(unet, name):
    """Eight lists of four; soft targets aim at differences of 1/2 between the beta d of neighbours."""
    rewards = torch.tensor([1.5, 1.0, 0.5, 0.0]).expand(8, 4)

    def loss(errors):
        return LIST_LOSSES[name](errors.log_ratio().reshape(4, 8).T, 2.0, rewards)

    assert_learnt(overfit(unet, loss, images=4))
