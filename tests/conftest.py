"""Set-up of all tests: one thread each, and reproducible random numbers."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # The tests run side by side and start processes of their own; more threads would only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
