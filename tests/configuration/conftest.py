"""What the tests of configurations share."""

import pytest
from standin import BASE, IMPORTS, Machine

from lmscale import configuration


@pytest.fixture
def load(tmp_path):
    """Loads the text of a gin file (the imports are put before it) with bindings."""

    def load(text=BASE, *bindings, imports="", **options):
        path = tmp_path / "run.gin"
        path.write_text(IMPORTS + imports + text, encoding="utf-8")
        return configuration.load([str(path)], bindings, root=Machine, **options)

    return load
