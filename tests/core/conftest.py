"""The tiny model and images for it, new for every test."""

import pytest
import torch
from tiny import random_images, tiny_addp

from addp_core.method.addp import ADDP


@pytest.fixture
def model() -> ADDP:
    return tiny_addp()


@pytest.fixture
def images() -> torch.Tensor:
    return random_images()
