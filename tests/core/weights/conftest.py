"""Fixtures of the tests of weights."""

import pytest
from golden_weights import golden_state
from torch import Tensor


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """The tensors of a small ADDP checkpoint in the published layout."""
    return golden_state()
