"""A training step on the Laplacian of a network in its input, as physics-informed networks take.

Run `python experiments/benchmarks/input_derivatives.py`; it prints the time of each activation over that of plain tanh.
"""

import functools

from experiments.cli import run_program, table_head, table_row

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from anact_jax.linen import NTanh
from experiments.benchmarks.measuring import ratios, seconds

PLAIN = "tanh"
SIDES = (PLAIN, "NTanh, stop_gradient=True", "NTanh", "BatchNorm, tanh")
ROUNDS = 15
_POINTS, _WIDTH, _DEPTH = 1024, 64, 4


class Solution(nn.Module):
    """A function of a point in the plane, whose statistics are those of all points of the batch."""

    side: str

    @nn.compact
    def __call__(self, x: Float[Array, " 2"]) -> Float[Array, ""]:
        """Its value."""
        for _ in range(_DEPTH):
            x = nn.Dense(_WIDTH)(x)
            if self.side.startswith("NTanh"):
                held = self.side != "NTanh"
                x = NTanh(stop_gradient=held, use_running_average=False, axis_name="points")(x)
            elif "BatchNorm" in self.side:
                x = jnp.tanh(nn.BatchNorm(use_running_average=False, axis_name="points")(x))
            else:
                x = jnp.tanh(x)
        return nn.Dense(1)(x)[0]


def main() -> int:
    """Runs the program and returns its exit status."""
    points = jax.random.uniform(jax.random.key(0), (_POINTS, 2))
    print(table_head("second derivatives by", *SIDES))
    for way in ("jvp of jvp", "hessian"):
        programs = {}
        for side in SIDES:
            model = Solution(side)
            variables = model.init(jax.random.key(1), points[0])
            step = jax.jit(functools.partial(jax.grad(_loss), model=model, way=way))
            programs[side] = functools.partial(step, variables, points)
        taken = ratios(seconds(programs, ROUNDS), PLAIN)
        print(table_row(way, *(str(taken[side]) for side in SIDES)))
    return 0


def _loss(variables: dict[str, dict[str, Array]], points: Array, *, model: nn.Module, way: str) -> Float[Array, ""]:
    def u(point: Array) -> Array:
        value: Array = model.apply(variables, point, mutable=["batch_stats"])[0]
        return value

    def second(point: Array, direction: Array) -> Array:
        along: Array = jax.jvp(lambda at: jax.jvp(u, (at,), (direction,))[1], (point,), (direction,))[1]
        return along

    def laplacian(point: Array) -> Array:
        if way == "hessian":
            return jnp.trace(jax.hessian(u)(point))
        return jnp.sum(jnp.stack([second(point, direction) for direction in jnp.eye(2)]))

    return jnp.mean(jax.vmap(laplacian, axis_name="points")(points) ** 2)


if __name__ == "__main__":
    run_program(main)
