"""What goes into a model's products with its weights, and what comes back to them: recorded while any code runs.

A product is found by the storage of its weight, whatever module multiplies and however: ``nn.Linear``, GPT-2's
``Conv1D``, one expert's matrix out of a tensor of all experts, an output layer tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvpack.errors import NotSupportedError

# So many columns of xᵀx at once: what is below the diagonal is not computed twice.
_STRIP = 512

# Functions of torch that multiply → which of their arguments are x and the weight.
_PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    torch.nn.functional.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.Tensor.addmm: ((1, "mat1"), (2, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.mm: ((0, "input"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    torch.Tensor.bmm: ((0, "input"), (1, "mat2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.matmul: ((0, "input"), (1, "other")),
    torch.Tensor.__matmul__: ((0, "input"), (1, "other")),
}


def symmetric_sum(x: torch.Tensor, into: torch.Tensor) -> None:
    """Add xᵀx of x [tokens, K] to fp64 ``into`` [K, K], on and above the diagonal's blocks alone.

    The products of one call are summed in fp32.
    """
    x = x.float()
    for first in range(0, x.shape[1], _STRIP):
        rows = slice(first, first + _STRIP)
        into[rows, first:] += x[:, rows].T @ x[:, first:]


def completed(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of what :func:`symmetric_sum` left."""
    return upper.triu() + upper.triu(1).T


@dataclass
class Sums:
    """Of one product's weight: fp64 sums over tokens, of each of its matrices.

    Attributes:
        tensor: the weight; [E, …] for E matrices.
        owner: the product whose inputs these are too: the first one that had them.
        second_moment: matrix → [K, K], on and above the diagonal's blocks; empty unless it is the owner.
        tokens: matrix → how many.
        squares: matrix → of the gradients at the outputs, [rows].
    """

    tensor: torch.Tensor
    owner: str
    second_moment: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    squares: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def matrices(self) -> int:
        return self.tensor.shape[0] if self.tensor.ndim == 3 else 1


@dataclass
class LookUps:
    """Of an embedding: fp64 sum over the rows that were looked up.

    Attributes:
        gradient_moment: of g gᵀ, on and above the diagonal's blocks: [K, K].
        tokens: how many rows.
    """

    gradient_moment: torch.Tensor
    tokens: int = 0


class ProductRecorder(TorchFunctionMode):
    """Records products with some weights while it is entered, and gradients at rows of embeddings.

    One forward pass after the other is recorded, each ended by :meth:`end_of_pass`.

    Attributes:
        found: name of a weight → its sums.
        looked_up: name of an embedding → its sums.

    Args:
        tensors: name → weight, of 2 dimensions or 3 (the first of them over matrices).
        moments: whether second moments are summed.
        squares: whether squares of gradients are, as they come in a backward pass.
        embeddings: name → table. While gradients are enabled, they begin at the rows that are looked up in it.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        moments: bool = True,
        squares: bool = False,
        embeddings: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.found: dict[str, Sums] = {}
        self.looked_up: dict[str, LookUps] = {}
        self._moments, self._squares = moments, squares
        self._embeddings = {table.untyped_storage().data_ptr(): name for name, table in (embeddings or {}).items()}
        self._names = {
            tensor.untyped_storage().data_ptr(): (name, tensor)
            for name, tensor in tensors.items()
            if tensor.ndim in (2, 3) and tensor.is_floating_point()
        }
        # Inputs of this pass, kept so that no other tensor gets their memory: what they are → who had them first.
        self._inputs: dict[tuple[object, ...], tuple[str, torch.Tensor]] = {}

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        places = _PRODUCTS.get(function)
        if places is not None:
            x, weight = (args[at] if at < len(args) else kwargs.get(name) for at, name in places)
            if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor):
                known = self._names.get(weight.untyped_storage().data_ptr())
                if known is not None:
                    self._note(*known, x, weight, result)
        elif function is torch.nn.functional.embedding and self._embeddings:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self._embeddings.get(weight.untyped_storage().data_ptr())
            if name is not None and torch.is_grad_enabled():
                self._note_rows(name, result.requires_grad_())
        return result

    def end_of_pass(self) -> None:
        """Forget which inputs are whose."""
        self._inputs.clear()

    def _note(self, name: str, tensor: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor) -> None:
        if tensor.ndim == 2:
            self._note_matrix(name, tensor, 0, x, y)
        elif weight.ndim == 2:
            matrix = (weight.storage_offset() - tensor.storage_offset()) // tensor.stride(0)
            self._note_matrix(name, tensor, matrix, x, y)
        else:  # all at once: a matrix reads the rows that are not zero
            for matrix in range(tensor.shape[0]):
                self._note_matrix(name, tensor, matrix, x[matrix], y, part=matrix)

    def _note_matrix(
        self, name: str, tensor: torch.Tensor, matrix: int, x: torch.Tensor, y: torch.Tensor, part: int | None = None
    ) -> None:
        what = (matrix, x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x._version)
        owner, _ = self._inputs.setdefault(what, (name, x))
        sums = self.found.setdefault(name, Sums(tensor, owner))
        if sums.owner != owner and sums.owner != name:
            raise NotSupportedError(
                f"{name} shares its inputs with {sums.owner} in one place, and has others in another one: its moments "
                "cannot be told"
            )
        rows = x.detach().reshape(-1, x.shape[-1])
        if part is not None:
            rows = rows[rows.any(-1)]
        sums.tokens[matrix] = sums.tokens.get(matrix, 0) + len(rows)
        if self._moments and sums.owner == name:
            if matrix not in sums.second_moment:
                size = rows.shape[1]
                sums.second_moment[matrix] = torch.zeros((size, size), dtype=torch.float64, device=rows.device)
            symmetric_sum(rows, sums.second_moment[matrix])
        if self._squares and y.requires_grad:

            def add(gradient: torch.Tensor) -> None:
                of_matrix = gradient if part is None else gradient[part]
                squares = of_matrix.float().square().reshape(-1, gradient.shape[-1]).sum(0).double()
                held = sums.squares.get(matrix)
                sums.squares[matrix] = squares if held is None else held + squares

            y.register_hook(add)

    def _note_rows(self, name: str, rows: torch.Tensor) -> None:
        """Let the gradients at rows [..., K] that were looked up be summed."""
        size = rows.shape[-1]

        def add(gradient: torch.Tensor) -> None:
            if name not in self.looked_up:
                zeros = torch.zeros((size, size), dtype=torch.float64, device=gradient.device)
                self.looked_up[name] = LookUps(zeros)
            sums = self.looked_up[name]
            symmetric_sum(gradient.detach().reshape(-1, size), sums.gradient_moment)
            sums.tokens += gradient.numel() // size

        rows.register_hook(add)
