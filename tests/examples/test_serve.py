"""`examples/serve.py`, with adapters of a few steps: every request is answered, or refused."""

import json

import jax
import jax.numpy as jnp
import pytest
import quickstart
import serve
import two_layers

from jlora import checkpoint

STEPS = 2


@pytest.fixture(scope="module", params=two_layers.ONE)
def out(tmp_path_factory, request):
    """A folder with all adapters, as if an earlier run had trained them."""
    with two_layers.minilm(tmp_path_factory.mktemp("minilm"), request.param):
        yield trained(tmp_path_factory.mktemp("serve"))


def trained(out):
    """With an adapter as it starts for each name."""
    model, variables, _ = quickstart.load()
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    lora = quickstart.adapt(model)
    base, adapter = lora.init(jax.random.key(1), variables, example, example)
    rules = quickstart.make_rules(quickstart.RANK)
    for name in (*serve.AT_FIRST[1:], serve.LATER):
        checkpoint.save(out / "adapters" / f"{name}-{STEPS}", adapter, rules, base=base)
    return out


def test_requests_are_answered_in_one_program(out):
    argv = ["--steps", str(STEPS), "--each", "12", "--batch", "8", "--out", str(out)]
    served = serve.main(argv)
    assert served.compiled == 1
    assert len(served.answers) == 48
    early = [x for x in served.answers if "error" in x]
    assert {x["adapter"] for x in early} == {serve.LATER}
    answered = [x for x in served.answers if "positive" in x]
    assert {x["adapter"] for x in answered} == {*serve.AT_FIRST, serve.LATER}
    assert all(0 <= x["positive"] <= 1 for x in answered)
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == served.answers


def test_requests_come_from_a_file(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"adapter": "movies", "text": "Horrible."}\n\n{"adapter": "x", "text": "y"}\n')
    first, second = serve.read(file)
    assert (first.text, first.label, second.adapter) == ("Horrible.", None, "x")
