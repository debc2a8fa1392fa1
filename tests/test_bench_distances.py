"""Distances to the converged images."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from diffalign.bench.distances import LPIPS_NETWORKS, load_distances, lpips_distance
from diffalign.errors import UserError

MODELS = dict(zip(LPIPS_NETWORKS, ("alexnet", "vgg16", "squeezenet1_1"), strict=True))


@pytest.fixture
def images():
    """Noise of more and more contrast, and the grey it is added to."""
    noise = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
    exact = np.full((40, 64, 64, 3), 128, np.uint8)
    return (exact + np.linspace(0, 60, 40)[:, None, None, None] * noise).clip(0, 255).astype(np.uint8), exact


@pytest.fixture
def untrained(monkeypatch):
    """torchvision's networks with random weights in place of downloaded ones."""
    for name in MODELS.values():
        made = getattr(torchvision.models, name)
        monkeypatch.setattr(torchvision.models, name, lambda pretrained, made=made: made(weights=None))
    torch.manual_seed(0)


def test_lpips_is_that_of_the_package_for_any_number_of_images(untrained, images):
    import lpips

    found = lpips_distance()(*images)
    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", verbose=False)
    ours, exact = (torch.from_numpy(one).permute(0, 3, 1, 2) / 127.5 - 1 for one in images)
    with torch.no_grad():
        expected = model(ours, exact).flatten().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found[0] == 0
    assert (np.diff(found[[0, 10, 20, 39]]) > 0).all()


def test_distances_have_the_names_of_their_metrics(untrained, images):
    found = load_distances(["lpips=squeeze", "playground/scorer"])
    assert list(found) == ["lpips", "feature_distance"]
    for distance in found.values():
        values = distance(*images)
        assert values.shape == (40,)
        assert abs(values[0]) < 1e-6 < values[-1]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["lpips=alx"], "did you mean 'alex'"),
        (["lpip"], "no distance 'lpip'; did you mean 'lpips'"),
        (["playground/verifier"], "no image features"),
        (["lpips", "lpips=vgg"], "two for the metric lpips"),
    ],
)
def test_what_cannot_be_measured_is_refused(untrained, specs, words):
    with pytest.raises(UserError, match=words):
        load_distances(specs)


def test_weights_that_are_not_there_are_named(monkeypatch):
    def offline(pretrained):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "alexnet", offline)
    with pytest.raises(UserError, match=r"ImageNet weights of alex.*checkpoints.*no network"):
        lpips_distance()
