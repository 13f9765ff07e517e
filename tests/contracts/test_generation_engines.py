"""Generation engines keep their contract: one as a user might write it, and one that does not is told why."""

from __future__ import annotations

import asyncio

import pytest

from flowrl.engines.contract import broken_laws
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow
HERE = "tests.support.plain_engine"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning")
@pytest.mark.parametrize("engine", [f"{HERE}:PlainEngine", "flowrl.engines.vllm:VllmEngine"])
def test_an_engine_keeps_its_contract(engine, model):
    assert asyncio.run(broken_laws(engine, model)) == []


def test_a_careless_engine_is_told_which_laws_it_breaks(model):
    seeds, canary = asyncio.run(broken_laws(f"{HERE}:CarelessEngine", model))
    assert seeds == "sample i is drawn with seed + i, the same alone and among others"
    assert canary == "weights that the canary contradicts are not served"
