"""Random steps over several connections against a model of the promises (tests/model.py)."""

from __future__ import annotations

import pytest

from tests.model_steps import Seed
from tests.servers import Database

SEEDS = 12
STEPS = 300


@pytest.mark.one_backend
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_steps_keep_the_promises(database: Database, seed: int) -> None:
    Seed(lambda: database.connect(autocommit=True), seed).run(STEPS)


def test_random_steps_keep_the_promises_on_every_server(database: Database) -> None:
    Seed(lambda: database.connect(autocommit=True), 1000).run(STEPS)
