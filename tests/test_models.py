"""The models that come with the package: whole, small, and good at what they are for."""

import pytest
import torch

from undiffuse.evals.classifier import load_classifier
from undiffuse.model import Model
from undiffuse.runfolder import SHIPPED, shipped
from undiffuse.train import verify


def test_there_are_three():
    assert shipped() == ("digits", "fashion", "mnist")


@pytest.mark.parametrize("name", ["digits", "fashion", "mnist"])
def test_a_shipped_model_is_whole_small_and_draws_what_it_is_asked_for(name):
    """In ten steps, by the classifier of the same data; chance is 10 %."""
    folder = SHIPPED / name / "model"
    verify(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    model = Model.load(SHIPPED / name)
    assert model.classes == len(model.names) == 10
    asked = torch.arange(60) % 10
    x = model.sample(60, asked, steps=10, guidance=2.0, rows=0)
    judge = load_classifier(model.config.values["data"]["name"])
    with torch.no_grad():
        right = (judge(x.clamp(-1, 1)).argmax(1) == asked).float().mean()
    assert float(right) >= 0.85
    assert float(x.abs().quantile(0.98)) < 1.3  # data lie in [-1, 1]
    assert all(float((a - b).abs().mean()) > 0.01 for a, b in zip(x[:-10], x[10:], strict=True))  # no copies of one
