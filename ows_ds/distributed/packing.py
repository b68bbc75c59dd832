"""How large a matrix in few bits is, as codes and scales: without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 32  # entries of nf4 that share a scale
SCALE = {"int8": 4, "fp8": 4, "nf4": 2}  # bytes of a scale: float32, bfloat16
SHARE = 0.018  # of bfloat16's bytes: what the factors of nf4 may add
MOST_DIRECTIONS = 16
SCALES = "_scales"  # what follows the name of a weight in its scales' name


@dataclass(frozen=True)
class Packing:
    """How one matrix, or a stack of them under one name, is held in few bits.

    name: of the format. shape: of a matrix as stored. inputs_first: the matrix is stored as (C_in, C_out). experts: E
    of a stack (E, *shape); None: it is one matrix.
    """

    name: str
    shape: tuple[int, int]
    inputs_first: bool = False
    experts: int | None = None

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return (*self._stack, *self.shape)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return (*self._stack, self._blocks * BLOCK // 2) if self.name == "nf4" else self.full_shape

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Of the bytes of scales and factors."""
        number = self._blocks if self.name == "nf4" else self.shape[self.inputs_first]
        return (*self._stack, (number + self.directions * sum(self.shape)) * SCALE[self.name])

    @property
    def directions(self) -> int:
        """r, the number of input directions on which nf4 is exact. 0 for experts in stacks, each of which sees few
        tokens of a calibration."""
        if self.name != "nf4" or self.experts is not None:
            return 0
        return min(MOST_DIRECTIONS, int(SHARE * math.prod(self.shape) / sum(self.shape)))

    @property
    def in_features(self) -> int:
        """C_in."""
        return self.shape[not self.inputs_first]

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return math.prod(self.codes_shape) + math.prod(self.scales_shape)

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.experts is None else (self.experts,)

    @property
    def _blocks(self) -> int:
        return math.ceil(math.prod(self.shape) / BLOCK)
