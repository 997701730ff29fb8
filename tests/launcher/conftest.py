from __future__ import annotations

import pytest
from runs import STEPS, Runs
from support import Site


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A site with one finished, exported run that tests read but leave as it is."""
    site = Site.create(tmp_path_factory.mktemp("site"))
    for package in ("configs", "cluster", "launcher", "trainer"):
        (site.root / package).mkdir()
        (site.root / package / "__init__.py").write_text("raise ImportError('a decoy was imported')\n")
    runs = Runs(site.root)
    outcome = runs.trainyard(
        "train", *runs.overrides(STEPS), "checkpoint.every_steps=20", "run.name=first", "run.export=true"
    )
    assert outcome.returncode == 0, outcome.stderr
    return runs
