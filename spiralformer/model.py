"""The runnable model: straight-line code over the parts of this package.

Shape legend: B batch, L tokens, D model, V vocabulary.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spiralformer import decoding, padding
from spiralformer.decoding import DecodeState, Opening
from spiralformer.generate import Sampling, generate
from spiralformer.halting import Halting

_FUNCTIONS = ("forward", "with_losses", "open", "prefill", "decode")


class Trained(NamedTuple):
    """What a step of training is given."""

    logits: Tensor
    """Of all positions, (B, L, V)."""
    losses: dict[str, Tensor]
    """Of the model's own by name, weighted, to be added to a task's."""
    carried: dict[str, Tensor]
    """By loop with segments, the state (B, L', D) that it ended with, detached."""


class SpiralFormer(nn.Module):
    """A compiled architecture. ``print(model.code)`` shows it as Python.

    Args:
        root: holds the parts, by the names that the code uses.
        code: the functions ``forward``, ``with_losses``, ``open``, ``prefill`` and ``decode`` (`builder.code`).
        undecodable: why it can't decode; empty if it can.
        causal: whether a token sees only the past.

    Shape:
        tokens (B, L) of int64, 1 <= L -> logits (B, L, V).
    """

    def __init__(self, root: nn.Module, code: str, *, undecodable: str, causal: bool) -> None:
        super().__init__()
        for name, part in root.named_children():
            self.add_module(name, part)
        self.code, self.undecodable, self.causal = code, undecodable, causal
        self.sees_padding = not causal or any(isinstance(part, Halting) for part in root.children())
        """Whether it must be told what is padding on the right."""
        self._bind()

    def _bind(self) -> None:
        """Make the code's functions, with lines that a traceback can show."""
        file = f"<spiralformer {hash(self.code):x}>"
        names: dict[str, Any] = {"last_of": decoding.last_of, "visible": padding.visible, "held": torch.no_grad}
        exec(compile(self.code, file, "exec"), names)
        linecache.cache[file] = (len(self.code), None, self.code.splitlines(keepends=True), file)
        self._functions: dict[str, Callable[..., Any]] = {name: names[name] for name in _FUNCTIONS if name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()

    def forward(self, tokens_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Logits of all positions.

        Args:
            tokens_BL: the tokens.
            attention_mask_BL: 1 where there is a token, 0 where there is padding, left or right. Every row then has
                the logits that it would have alone; those of padding hold anything.
        """
        run = self._functions["forward"]
        if attention_mask_BL is None:
            return run(self, tokens_BL)
        aligned = padding.align(tokens_BL, attention_mask_BL)
        if not self.sees_padding and not torch.compiler.is_compiling() and not aligned.first_B.any():
            return run(self, tokens_BL)  # what stands on the right is seen by nobody
        logits_BLV = run(self, aligned.tokens, aligned.lengths_B if self.sees_padding else None)
        return padding.restore(logits_BLV, aligned.first_B)

    @property
    def iterations_used(self) -> list[int]:
        """Of a loop that ends where it has come to rest: how often it ran for each row of the last batch."""
        found = getattr(self, "halting", None)
        return found.used if isinstance(found, Halting) else []

    def with_losses(self, tokens_BL: Tensor, carried: Mapping[str, Tensor] | None = None) -> Trained:
        """What a step of training asks for.

        Args:
            tokens_BL: the tokens.
            carried: by loop with segments, the state (B, L', D) that it begins with; else as ever.
        """
        if "with_losses" not in self._functions:
            return Trained(self(tokens_BL), {}, {})
        return Trained(*self._functions["with_losses"](self, tokens_BL, carried or {}))

    def decode_state(
        self, batch_size: int, max_len: int | None = None, *, cache_dtype: torch.dtype | None = None
    ) -> DecodeState:
        """Nothing decoded yet.

        Args:
            batch_size: sequences; their lengths may differ.
            max_len: tokens each has room for; None: it grows.
            cache_dtype: of the key-value cache; None is the model's own.

        Raises:
            ValueError: if the model can't decode.
        """
        if self.undecodable:
            raise ValueError(f"this model can't decode: {self.undecodable}; run the whole prefix instead")
        weight_VD: Tensor = self.get_parameter("embed.weight")
        opening = Opening(batch_size, max_len, weight_VD[0].detach(), cache_dtype or weight_VD.dtype)
        return DecodeState(self._functions["open"](self, opening), batch_size, max_len)

    @torch.no_grad()
    def prefill(
        self, tokens_BL: Tensor, state: DecodeState, attention_mask_BL: Tensor | None = None, *, keep: int = 1
    ) -> Tensor:
        """Run prompts in parallel into an empty state.

        Args:
            tokens_BL: the prompts.
            state: of `decode_state`.
            attention_mask_BL: as in `forward`, for prompts of different lengths.
            keep: 1: the logits of each row's last token; 0: of all positions, as in `forward`.

        Shape:
            tokens (B, L), L >= 1 -> logits (B, V), or (B, L, V) for ``keep`` 0.

        Raises:
            ValueError: if the state is not empty, or the prompt does not fit.
        """
        first_B = None
        state.check(tokens_BL)
        if attention_mask_BL is None:
            state.begin([tokens_BL.shape[1]] * tokens_BL.shape[0])
        else:
            tokens_BL, lengths_B, first_B = padding.align(tokens_BL, attention_mask_BL)
            state.begin(lengths_B.tolist())
        logits: Tensor = self._functions["prefill"](self, tokens_BL, state, state.lengths, keep)
        if keep:
            return logits[:, -1]
        return logits if first_B is None else padding.restore(logits, first_B)

    @torch.no_grad()
    def decode(self, tokens_B: Tensor, state: DecodeState) -> Tensor:
        """One more token for every sequence.

        Shape:
            tokens (B,) -> logits (B, V); equal to the parallel forward's at these positions.

        Raises:
            ValueError: if the state is full, or the batch is another one.
        """
        state.check(tokens_B[:, None])
        state.check_room(1)
        logits_B1V: Tensor = self._functions["decode"](self, tokens_B[:, None], state)
        state.advance()
        return logits_B1V[:, -1]

    def generate(
        self,
        tokens_BL: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue every row; see `spiralformer.generate.generate`. Raises ValueError where it sees its whole input."""
        if not self.causal:
            raise ValueError("this model sees its whole input (causal: false): it has nothing to continue")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        return generate(self, tokens_BL, max_new_tokens, sampling, attention_mask, seed=seed, use_cache=use_cache)
