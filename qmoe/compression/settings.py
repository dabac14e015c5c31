"""What a user chooses for a compression: `Settings`, and what follows from them alone."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qmoe.calib import default_text
from qmoe.compression.rate import check_target
from qmoe.errors import QmoeError
from qmoe.quantize import Method, get_method

DEFAULT_BITS = 0.8
MOST_UNSEEN = 16  # tokens that a model says for each of the text
DENSE_BITS = (3, 8)  # range of --dense-bits
# no byte of a weight depends on these
_MACHINE = ("memory", "source_cache", "device", "trust_remote_code", "fresh", "with_code")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output, and how the run may use the machine.

    Attributes:
        method: "rd", "qmoe", "rtn" or "gptq2" .. "gptq4".
        bits: stored bits per expert weight to hit, for rd; see `target`.
        delta: global step of rd, in place of a target.
        dense_bits: stored bits per weight of every large matrix outside of the experts, 3 to 8; 16
            leaves it as it is.
        model_bits: stored bits per weight of the whole file, instead of `bits` and `dense_bits`.
        calib: calibration text; None is the one that comes with the package.
        calib_tokens: at most this many tokens of it.
        calib_rows: how it is read: `pack`, `chat`, `column`, `bos` of qmoe.calib.text.windows.
        unseen: tokens that the model says by itself for each token of the text, so that what the
            text does not reach counts too: see `qmoe.calib.own_words`.
        ctx: tokens of a window, None for the model's own length, at most 2048.
        seed: of everything random.
        solver_options: of rd, for experiments: parameters of `qmoe.quantize.rd.method` but `delta`.
        memory: bytes that a process may use; what activations find no room for goes to mapped
            files.
        source_cache: "keep" or "drop" downloaded source files when no block needs them any more.
        device: where solvers and forwards run.
        trust_remote_code: run the source's own model code.
        fresh: discard an unfinished run on the same output.
        with_code: add the file that lets ``trust_remote_code=True`` load the output without an
            ``import qmoe``, see `qmoe.models.code`.
    """

    method: str = "rd"
    calib: str | None = None
    calib_tokens: int = 131072
    calib_rows: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None
    delta: float | None = None
    dense_bits: float = 16
    model_bits: float | None = None
    unseen: float = 1.0
    ctx: int | None = None
    seed: int = 0
    solver_options: Mapping[str, float] = field(default_factory=dict)
    memory: int = 8 * 2**30
    source_cache: str = "keep"
    device: str = "auto"
    trust_remote_code: bool = False
    fresh: bool = False
    with_code: bool = False

    @property
    def target(self) -> float | None:
        """Stored bits per expert weight to hit: 0.8 where rd is given no bits and no step."""
        plain = self.method == "rd" and self.delta is None and self.model_bits is None
        return DEFAULT_BITS if plain and self.bits is None else self.bits

    def recorded(self) -> dict[str, Any]:
        """The part that decides the bytes, for the manifest and for resuming."""
        out = {name: value for name, value in asdict(self).items() if name not in _MACHINE}
        out["knobs"] = out.pop("solver_options")  # the name under which manifests keep them
        if self.dense_bits == int(self.dense_bits):
            out["dense_bits"] = int(self.dense_bits)
        if self.model_bits is None:
            del out["model_bits"]
        if not self.calib_rows:
            del out["calib_rows"]
        out["bits"] = self.target
        out["calib"] = default_text.NAME if self.calib is None else Path(self.calib).name
        return out

    def context(self, config: Any) -> int:
        """Tokens of a window for the model of a config."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        longest = getattr(text, "max_position_embeddings", None) or 2048
        return self.ctx or min(longest, 2048)

    def solver(self) -> Method:
        """The method that the settings name.

        Raises:
            QmoeError: settings that exclude each other or that the method does not know.
        """
        self._check_numbers()
        self._check_dense()
        name, params = self.method, self._solver_params()
        if name.startswith("gptq"):
            name, params = "gptq", {"bits": int(name.removeprefix("gptq"))}
        try:
            return get_method(name, **params)
        except (TypeError, ValueError) as e:
            raise QmoeError(f"{name} does not take {params}: {e}") from e

    def _check_numbers(self) -> None:
        given = {n: v for n, v in vars(self).items() if isinstance(v, int | float)}
        for name, value in {**given, **self.solver_options}.items():
            if not math.isfinite(value):
                raise QmoeError(f"{name} is {value}; give a number that is finite")
        if not 0 <= self.unseen <= MOST_UNSEEN:
            raise QmoeError(f"--unseen {self.unseen:g}: choose between 0 and {MOST_UNSEEN}")
        if self.method != "rd" and self.unseen not in (0, Settings.unseen):
            raise QmoeError(f"--unseen belongs to --method rd, not to {self.method}")
        if not 0 <= self.seed < 2**63:
            raise QmoeError(f"--seed {self.seed}: choose between 0 and 2^63 - 1")

    def _check_dense(self) -> None:
        low, high = DENSE_BITS
        if self.dense_bits != 16 and not low <= self.dense_bits <= high:
            raise QmoeError(
                f"--dense-bits {self.dense_bits:g}: choose between {low} and {high} bits per "
                "weight, or 16 to leave what is not an expert as it is"
            )
        if self.model_bits is None:
            return
        if self.method != "rd":
            raise QmoeError(f"--model-bits belongs to --method rd, not to {self.method}")
        if self.bits is not None or self.delta is not None or self.dense_bits != 16:
            raise QmoeError(
                "--model-bits decides the bits of experts and of everything else; give it without "
                "--bits, --delta and --dense-bits"
            )
        if not self.model_bits > 0:
            raise QmoeError(f"--model-bits {self.model_bits:g}: give a positive number")

    def _solver_params(self) -> dict[str, float]:
        if self.method == "rd":
            if self.bits is not None and self.delta is not None:
                raise QmoeError("--bits and --delta exclude each other; give one of them")
            if self.target is not None:
                check_target(self.target)
            if self.delta is not None and not self.delta > 0:
                raise QmoeError(f"--delta {self.delta:g}: give a positive number")
            step = {} if self.delta is None else {"delta": self.delta}
            return {**self.solver_options, **step}
        if self.solver_options:
            given = dict(self.solver_options)
            raise QmoeError(f"--method {self.method} has no solver options, got {given}")
        if self.bits is not None or self.delta is not None:
            raise QmoeError(
                f"--method {self.method} has a fixed grid; --bits and --delta belong to --method rd"
            )
        return {}
