"""Whether another way of running a language model gives what the model gives by itself.

    own = Reference.of(model)            before anything of the model is replaced
    own.nll_problem(nll)                 "" or which token is off, and by how much
    own.logits_problem(logits)           the same for whole rows of logits

The probe is a few rows of random tokens, padded, through the model's own forward; the other way may lay them beside
one another, so that a leak from row to row shows. Windows are made short for as long as that lasts, so that short rows
reach past them and the price does not grow with the numbers of a config. Compared is token by token, in float32.

What rounding explains is measured, not guessed: every row runs twice in that one batch, and the second time the output
of each layer is moved by a unit of its last place, up or down by chance. On Gemma 3 270M that moves the loss of a token
by 1 in bfloat16 and by 1e-4 in float32: a tolerance from the dtype alone is too wide or too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LENGTHS", "WINDOW", "Reference", "short_windows"]

LENGTHS = (21, 9, 2)
"""Tokens of the probe's rows: past a short window, past it by one, and the shortest that has a loss."""

WINDOW = 8
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size")
_FACTOR = 8
"""How many times as far as its measured rounding another order of the same sums may end up."""


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Windows of attention of WINDOW tokens at most, in the config and in each module that keeps its own."""
    with ExitStack() as undo:
        for holder in (model.config.get_text_config(), *model.modules()):
            for name in _WINDOWS:
                size = getattr(holder, name, None)
                if type(size) is int and size > WINDOW:
                    undo.callback(setattr, holder, name, size)
                    setattr(holder, name, WINDOW)
        yield


@dataclass(frozen=True, eq=False)
class Reference:
    """ids: (N,), rows of LENGTHS one after another. logits: (N, vocabulary), float32. moved: the same with the rounding
    of every layer moved. eps: of the model's dtype."""

    ids: Tensor
    logits: Tensor
    moved: Tensor
    eps: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> Reference:
        """One forward of the model as it is. Raises whatever that raises."""
        weight = model.get_input_embeddings().weight
        vocabulary, device = weight.shape[0], weight.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (sum(LENGTHS),), generator=generator).to(device)
        rows = nn.utils.rnn.pad_sequence(list(ids.split(LENGTHS)), batch_first=True)
        real = torch.arange(rows.shape[1], device=device) < torch.tensor(LENGTHS, device=device)[:, None]
        with short_windows(model), _moved_rounding(model, len(LENGTHS)):
            out = model(input_ids=rows.repeat(2, 1), attention_mask=real.long().repeat(2, 1), use_cache=False)
        own, moved = (half[real].float() for half in out.logits.chunk(2))
        return cls(ids, own, moved, torch.finfo(out.logits.dtype).eps)

    @property
    def trained(self) -> Tensor:
        """(N,) bool: all but the first token of each row."""
        out = torch.ones_like(self.ids, dtype=torch.bool)
        out[[0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]] = False
        return out

    def nll_problem(self, nll: Tensor) -> str:
        """nll: one for each of `trained`, of the rows with short windows. "" where it is the model's own."""
        at = self.trained.nonzero()[:, 0]
        own, moved = (torch.nn.functional.cross_entropy(x[at - 1], self.ids[at], reduction="none") for x in
                      (self.logits, self.moved))  # fmt: skip
        size = self.logits[at - 1].abs().amax(1)
        return self._problem(nll.detach().float()[:, None], own[:, None], moved[:, None], size, "loss")

    def logits_problem(self, logits: Tensor, at: Tensor | None = None) -> str:
        """logits: (tokens, vocabulary) after the tokens `at`, all of them by default."""
        chosen = slice(None) if at is None else at
        own = self.logits[chosen]
        return self._problem(logits.float(), own, self.moved[chosen], own.abs().amax(1), "largest logit")

    def _problem(self, got: Tensor, own: Tensor, moved: Tensor, size: Tensor, what: str) -> str:
        """Each row of `got` against `own`, by its entry that is farthest off. size: (rows,), of what the last rounding
        was a part of."""
        if got.shape != own.shape or not torch.isfinite(got).all():
            return f"its {what} is not finite" if got.shape == own.shape else f"it gives {tuple(got.shape)}"
        off = (got - own).abs().amax(1)
        explained = _FACTOR * (moved - own).abs().max() + 2 * self.eps * size
        worst = int((off - explained).argmax())
        if off[worst] <= explained[worst]:
            return ""
        return (
            f"the {what} of token {worst + 1} of {len(off)} is {float(off[worst]):.3g} off, where rounding explains "
            f"{float(explained[worst]):.2g}"
        )


@contextmanager
def _moved_rounding(model: Any, first: int) -> Iterator[None]:
    """From row `first` of the batch on, every layer's output is off by a unit of its last place."""
    generator = torch.Generator().manual_seed(1)

    def move(_module: nn.Module, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or len(hidden) != 2 * first:
            return out
        signs = torch.randint(0, 2, hidden[first:].shape, generator=generator).to(hidden) * 2 - 1
        hidden = torch.cat([hidden[:first], hidden[first:] * (1 + torch.finfo(hidden.dtype).eps * signs)])
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    depth = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), ())
    with ExitStack() as undo:
        for module in (model.get_input_embeddings(), *layers):
            undo.callback(module.register_forward_hook(move).remove)
        yield
