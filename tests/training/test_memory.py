"""Models that cannot fit into memory are refused."""

import pytest

from posenc_jax.schema import ConfigError
from posenc_jax.training import memory
from tests.small import run_config


def test_a_model_that_cannot_fit_is_refused_by_its_largest_dimension_or_its_encoding(monkeypatch):
    config = run_config("fire", encoding__width=2**30)
    monkeypatch.setattr(memory, "device_memory", lambda _: 2**30)
    memory.check_fits(config, None)
    with pytest.raises(ConfigError, match=r"config.encoding.name = 'fire': .* 1 device has 1.0 GiB"):
        memory.check_fits(config, None, 2**32)
