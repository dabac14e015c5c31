"""Solvers: weights and statistics of their inputs -> integers and scales. One file per method.

types     `Problem`, `Solution`, `Method`
rd        rate-distortion, the default
qmoe      QMoE's recipe
gptq      GPTQ, for reference
rtn       round to nearest
dense     dense matrices at a few bits
feedback  error feedback along columns
linalg    Cholesky factors of damped Hessians
"""

from collections.abc import Callable
from typing import Any

from qmoe.quantize import gptq, qmoe, rd, rtn
from qmoe.quantize.types import Method, Problem, Solution

METHODS: dict[str, Callable[..., Method]] = {
    "rtn": rtn.method,
    "qmoe": qmoe.method,
    "gptq": gptq.method,
    "rd": rd.method,
}


def get_method(name: str, **params: Any) -> Method:
    """A method by its name on the command line.

    Args:
        name: a key of METHODS.
        params: what the method's own `method` function takes.

    Raises:
        ValueError: unknown name, or a parameter out of range; TypeError: a parameter that the
            method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name](**params)


__all__ = ["METHODS", "Method", "Problem", "Solution", "get_method"]
