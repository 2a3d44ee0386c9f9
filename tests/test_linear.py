import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.linear import matmul, transposed_matmul


def operands(transpose, dtype="float32", batch=(2, 3)):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*batch, 5, 7), dtype)
    y = jax.random.normal(keys[1], (*batch, *((4, 7) if transpose else (7, 4))), dtype)
    return x, y, jax.random.normal(keys[2], (*batch, 5, 4))


def plain(x, y, transpose):
    return jnp.einsum("...nk,...mk->...nm" if transpose else "...nk,...km->...nm", x, y)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("transpose", [False, True])
def test_value_and_gradients_equal_those_of_a_plain_product(transpose, batch):
    x, y, worth = operands(transpose, batch=batch)
    own = jax.value_and_grad(lambda x, y: (matmul(x, y, transpose) * worth).sum(), argnums=(0, 1))(x, y)
    expected = jax.value_and_grad(lambda x, y: (plain(x, y, transpose) * worth).sum(), argnums=(0, 1))(x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), own, expected)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_have_the_dtype_of_their_operands(transpose):
    x, y, worth = operands(transpose, "bfloat16")
    assert matmul(x, y, transpose).dtype == jnp.bfloat16
    assert matmul(x, y, transpose, jnp.float32).dtype == jnp.float32
    gradients = jax.grad(lambda x, y: (matmul(x, y, transpose, jnp.float32) * worth).sum(), argnums=(0, 1))(x, y)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_the_left_operand_is_copied_into_place_on_cpu_alone():
    x = jnp.ones((5, 7))
    lowered = jax.jit(transposed_matmul).trace(x, x)
    assert "optimization_barrier" in lowered.lower(lowering_platforms=("cpu",)).as_text()
    assert "optimization_barrier" not in lowered.lower(lowering_platforms=("cuda",)).as_text()
