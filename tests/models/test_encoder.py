"""Encoders: every token attends to all others, masked tokens are predicted, and only positions reveal the order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import bert
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.encodings.base import reads_both_ways
from posenc_jax.schema import ConfigError
from posenc_jax.training.step import abstract_model
from tests.attention.rows import abstract
from tests.encodings.test_contract import kinds
from tests.small import DIMS, forward, split, tokens, transformer

BERT = {"causal": False, "post_norm": True, "use_bias": True, "norm": "layer", "activation": "gelu"}
BOTH_WAYS = [name for name in encodings.names() if reads_both_ways(abstract(name, dims=DIMS))]


def assert_every_token_sees_all_others(name, length):
    model, text = transformer(name, max_length=length, num_layers=1, **BERT), tokens(1, length)
    change = jnp.abs(forward(model, text) - forward(model, text.at[:, length // 2].add(1))).max(axis=(0, 2))
    assert change.min() > 1e-6


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_every_token_sees_all_others(name):
    assert_every_token_sees_all_others(name, 32)


@pytest.mark.parametrize("name", [kind for kind in kinds() if kind.values[0] in BOTH_WAYS])
def test_every_token_sees_all_others_in_blocks(name):
    assert_every_token_sees_all_others(name, 150)


def test_encodings_that_count_what_lies_behind_are_refused():
    both = {"none", "sinusoidal", "learned", "rope", "p_rope", "pope", "fope", "grape_m", "alibi", "kerple"}
    assert both <= set(BOTH_WAYS)
    assert not {"t5", "fox", "path", "selective_rope", "xpos", "shaw", "stick_breaking"} & set(BOTH_WAYS)
    for name in set(encodings.names()) - set(BOTH_WAYS):
        with pytest.raises(ConfigError, match=f"config.encoding.name = '{name}': must be defined for keys ahead"):
            transformer(name, **BERT)
    with pytest.raises(ConfigError, match="must be defined for keys ahead"):
        transformer("grape_m", hyperparameters={"contextual": True}, **BERT)
    with pytest.raises(ConfigError, match=r"; t5 is with config.encoding.bidirectional = True"):
        transformer("t5", **BERT)


def test_t5_tells_the_two_directions_apart():
    hyperparameters = {"bidirectional": True, "stddev": 1.0}
    model, text = transformer("t5", hyperparameters=hyperparameters, num_layers=1, **BERT), tokens(1, 150)
    backwards = forward(model, text[:, ::-1])[:, ::-1]
    assert jnp.abs(forward(model, text) - backwards).max() > 1e-2


@pytest.mark.parametrize(
    ("field", "value"), [("model.window", 8), ("model.canon", True), ("temperature.form", "ssmax")]
)
def test_settings_that_count_what_lies_behind_are_refused(field, value):
    recipe = bert.get_config("size=smoke")
    section, name = field.split(".")
    recipe[section][name] = value
    with pytest.raises(ConfigError, match=f"config.{field}"):
        RunConfig.from_mapping(recipe.to_dict())


def hugging_face(torch, params, heads, vocab_size, max_length):
    """BERT from transformers with our parameters. Its second segment is never used, and the first one adds zero."""
    transformers = pytest.importorskip("transformers")
    width, layers = params["embedding"].shape[1], sum(name.startswith("block_") for name in params)
    config = transformers.BertConfig(
        vocab_size=vocab_size + 1, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=params["block_0"]["feed_forward"]["up"]["kernel"].shape[1],
        max_position_embeddings=max_length, hidden_act="gelu_new", layer_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()

    def linear(module, own):
        return {f"{module}.weight": own["kernel"].T, f"{module}.bias": own["bias"]}

    def norm(module, own):
        return {f"{module}.weight": own["scale"], f"{module}.bias": own["bias"]}

    state = {
        "bert.embeddings.word_embeddings.weight": params["embedding"] * np.sqrt(width),
        "bert.embeddings.position_embeddings.weight": params["encoding_0"]["table"],
        "bert.embeddings.token_type_embeddings.weight": np.zeros((2, width)),
        **norm("bert.embeddings.LayerNorm", params["norm"]),
        **linear("cls.predictions.transform.dense", params["head"]["hidden"]),
        **norm("cls.predictions.transform.LayerNorm", params["head"]["norm"]),
        "cls.predictions.decoder.weight": params["embedding"],
        "cls.predictions.decoder.bias": np.concatenate([params["head"]["bias"], [0]]),
        "cls.predictions.bias": np.concatenate([params["head"]["bias"], [0]]),
    }
    for i in range(layers):
        own, name = params[f"block_{i}"], f"bert.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            state |= linear(f"{name}.attention.self.{part}", own["attention"][part[0]])
        state |= linear(f"{name}.attention.output.dense", own["attention"]["out"])
        state |= norm(f"{name}.attention.output.LayerNorm", own["attention_norm"])
        state |= linear(f"{name}.intermediate.dense", own["feed_forward"]["up"])
        state |= linear(f"{name}.output.dense", own["feed_forward"]["down"])
        state |= norm(f"{name}.output.LayerNorm", own["feed_forward_norm"])
    model.tie_weights = lambda *args, **kwargs: None  # the embeddings are the output layer times sqrt(D)
    model.cls.predictions.decoder.weight = torch.nn.Parameter(torch.zeros(vocab_size + 1, width))
    missing = model.load_state_dict({k: torch.tensor(np.array(v, np.float32)) for k, v in state.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("position_ids" in key for key in missing.missing_keys)
    return model


@pytest.mark.torch
@pytest.mark.parametrize("changes", [{}, {"num_layers": 3, "d_ff": 40}])
def test_logits_and_gradients_equal_those_of_the_reference_library(changes):
    torch = pytest.importorskip("torch")
    graphdef, params, constants = split(transformer("learned", **BERT, **changes))
    noise = np.random.default_rng(0)  # biases initialized to zero would hide where they are added
    params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(noise.normal(size=x.shape), jnp.float32), params)
    text = tokens(2, 24).at[:, 3].set(64)  # includes a mask token
    model = hugging_face(torch, jax.tree.map(np.asarray, params), DIMS.num_heads, 64, 32)

    def logits(params):
        return nnx.merge(graphdef, params, constants)(text)

    @jax.jit
    def gradient_of(params):
        return jax.grad(lambda params: jnp.tanh(logits(params)).mean())(params)

    theirs = model(torch.tensor(np.asarray(text), dtype=torch.long)).logits[..., :64]
    np.testing.assert_allclose(jax.jit(logits)(params), theirs.detach().numpy(), atol=2e-4)
    gradient = gradient_of(params)
    torch.tanh(theirs).mean().backward()
    for i in range(2):
        own, other = gradient[f"block_{i}"], model.bert.encoder.layer[i]
        np.testing.assert_allclose(
            own["feed_forward"]["up"]["kernel"].T, other.intermediate.dense.weight.grad.numpy(), atol=2e-5
        )
        value = other.attention.self.value.weight.grad.numpy()
        np.testing.assert_allclose(own["attention"]["v"]["kernel"].T, value, atol=2e-5)
    positions = model.bert.embeddings.position_embeddings.weight.grad.numpy()
    np.testing.assert_allclose(gradient["encoding_0"]["table"], positions, atol=2e-5)


def test_base_has_as_many_parameters_as_bert_base_without_segments_and_pooler():
    # BERT has 109,482,240 with pooler and two segments, which are constant here. Its 30,522 tokens include [MASK].
    found = abstract_model(RunConfig.from_mapping(bert.get_config("size=base").to_dict()))[1]
    table, pooler, segments, head = (1024 - 512) * 768, 768 * 769, 2 * 768, 768 * 769 + 2 * 768 + 30522
    assert found - table - 768 == 109_482_240 - pooler - segments + head
