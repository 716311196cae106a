"""Sequences as they enter a layer or stack: which positions are padding, and whether they run packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tfm.errors import AssertedArgument, BadArgument
from tfm.graphs import rehearsing
from tfm.nn.masks import PaddedMask, check_attention_mask, check_mask_dtype, merge_masks
from tfm.ops.checks import check_integers
from tfm.sequences import Layout, offsets, valid_positions

Lengths = Sequence[int] | Tensor


@dataclass(frozen=True)
class SequenceInput:
    """A batch of sequences as the caller gave it.

    Attributes:
        x: [B, S, E] (batch_first) or [S, B, E]; an unbatched [S, E] becomes [1, S, E].
        batch_first: which of the two.
        batched: False where the caller's tensor was [S, E].
        padding_mask: [B, S], torch's: bool (True = padding) or floating point, added to the scores of its key.
        lengths: [B] integer, in place of a mask.
        tokens: the sum of the lengths where it is known without asking a device.
    """

    x: Tensor
    batch_first: bool
    batched: bool
    padding_mask: Tensor | None = None
    lengths: Tensor | None = None
    tokens: int | None = None

    @classmethod
    def of(
        cls, name: str, x: Tensor, batch_first: bool, padding_mask: Tensor | None = None, lengths: Lengths | None = None
    ) -> SequenceInput:
        """Checks the sequences, called `name` in messages.

        Raises:
            ValueError: shapes or dtypes that do not fit, lengths outside [0, S] (on CPU), both a mask and lengths.
        """
        if x.dim() not in (2, 3):
            raise AssertedArgument(f"{name}: expected [length, dim] or a batch of three dimensions, got {x.dim()}")
        if padding_mask is not None and lengths is not None:
            raise ValueError(f"{name}: expected a padding mask or lengths, got both")
        if padding_mask is not None and padding_mask.dim() != x.dim() - 1:
            found = f"{x.dim() - 1}-D but found {padding_mask.dim()}-D tensor instead"
            raise AssertedArgument(f"{name}: expected `key_padding_mask` to be `None` or {found}")
        batched = x.dim() == 3
        if not batched:
            x, batch_first = x[None], True
            padding_mask = None if padding_mask is None else padding_mask[None]
        batch, length = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        if padding_mask is not None:
            if padding_mask.shape != (batch, length):
                came = tuple(padding_mask.shape)
                raise AssertedArgument(f"{name}: expected a padding mask of ({batch}, {length}), got shape {came}")
            check_mask_dtype(padding_mask)
        if lengths is None:
            return cls(x, batch_first, batched, padding_mask)
        tensor, tokens = _lengths(name, lengths, batch, length, x.device)
        return cls(x, batch_first, batched, None, tensor, tokens)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return (self.x.shape[0], self.x.shape[1]) if self.batch_first else (self.x.shape[1], self.x.shape[0])

    @property
    def is_ragged(self) -> bool:
        """True where the caller said that there may be padding."""
        return self.padding_mask is not None or self.lengths is not None

    def padding(self) -> Tensor | None:
        """Returns bool [B, S], True where a position is padding. A float mask says so by -inf."""
        if self.lengths is not None:
            return ~valid_positions(self.lengths, self.shape[1])
        if self.padding_mask is None or self.padding_mask.dtype == torch.bool:
            return self.padding_mask
        return self.padding_mask == float("-inf")

    def callers_mask(self) -> Tensor | None:
        """Returns the padding mask in torch's form, [B, S] or [S], made from the lengths where those were given."""
        mask = self.padding_mask if self.lengths is None else self.padding()
        return mask if mask is None or self.batched else mask[0]

    def blank(self, x: Tensor) -> Tensor:
        """Returns `x`, laid out as `self.x`, with zeros at padding."""
        padding = self.padding()
        if padding is None:
            return x
        return x.masked_fill((padding if self.batch_first else padding.t())[..., None], 0)

    def enter(self, x: Tensor) -> Tensor:
        """Lays out a tensor in the caller's form as `self.x`."""
        return x if self.batched else x[None]

    def leave(self, x: Tensor) -> Tensor:
        """Returns `x`, laid out as `self.x`, blanked and in the caller's form."""
        x = self.blank(x)
        return x if self.batched else x[0]

    def pack(self, layout: Layout) -> Tensor:
        """Returns the valid tokens [N, E]."""
        return layout.pack(self.x if self.batch_first else self.x.transpose(0, 1))

    def unpack(self, packed: Tensor, layout: Layout) -> Tensor:
        """Turns [N, E] into the caller's form, zeros at padding."""
        x = layout.unpack(packed)
        if not self.batched:
            return x[0]
        return x if self.batch_first else x.transpose(0, 1).contiguous()

    def questions(self) -> list[Tensor]:
        """Asks the device what packing needs: whether padding stands at the right only, and the count of tokens."""
        if self.padding_mask is not None:
            padding = self.padding()
            assert padding is not None
            lengths = (~padding).sum(dim=1)
            right = padding == ~valid_positions(lengths, padding.shape[1])
            if self.padding_mask.is_floating_point():
                right = right & (padding | (self.padding_mask == 0))
            return [right.all().long(), lengths.sum()]
        if self.lengths is not None and self.tokens is None:
            inside = (self.lengths >= 0) & (self.lengths <= self.shape[1])
            return [inside.all().long(), self.lengths.sum()]
        return []

    def layout(self, answers: list[int]) -> Layout | None:
        """Returns the layout, given the answers to `questions`; None where padding is not at the right only."""
        batch, length = self.shape
        if not self.is_ragged:
            cu_seq = torch.arange(batch + 1, dtype=torch.int32, device=self.x.device) * length
            return Layout.of(cu_seq, length, batch * length)
        fits, tokens = answers or (1, self.tokens)
        assert tokens is not None
        if self.lengths is not None:
            if not fits:
                raise ValueError(f"lengths: expected numbers in [0, {length}], got others")
            return Layout.of(offsets(self.lengths), length, tokens)
        padding = self.padding()
        assert padding is not None
        return Layout.of(offsets((~padding).sum(dim=1)), length, tokens) if fits else None


def check_same_batch(**inputs: SequenceInput) -> None:
    """Checks that both, by their names in messages, hold as many sequences, with a batch or without."""
    (first, queries), (name, keys) = inputs.items()
    if queries.batched != keys.batched:
        expected = "a batch" if queries.batched else "a sequence without a batch"
        raise AssertedArgument(
            f"{name}: expected {expected} like {first}, got {keys.x.dim() - (not keys.batched)} dimensions"
        )
    if queries.shape[0] != keys.shape[0]:
        raise BadArgument(f"{name}: expected batch {queries.shape[0]} like {first}, got {keys.shape[0]}")


def padded_mask(
    queries: SequenceInput, keys: SequenceInput, heads: int, attn_mask: Tensor | None, is_causal: bool
) -> PaddedMask:
    """Returns what padded queries see, given torch's mask and its hint.

    As in torch the hint replaces the mask, unless there is a padding mask to merge it with: then the mask rules.
    """
    check_attention_mask(attn_mask)
    causal = is_causal and (attn_mask is None or keys.padding_mask is None)
    shape = (queries.shape[0], heads, queries.shape[1], keys.shape[1])
    mask = merge_masks(None if causal else attn_mask, keys.padding_mask, shape, queries.batched)
    return PaddedMask(queries.batch_first, mask, causal, keys.lengths)


def plan_packing(
    inputs: Sequence[SequenceInput], masks: Sequence[tuple[Tensor | None, bool | None]], packing: bool
) -> tuple[list[bool], list[Layout] | None]:
    """Tells which self-attentions are causal; returns the layouts of `inputs` where the stack shall run packed.

    Reads from the device once where there is padding to measure or a mask to recognise, and not at all where `inputs`
    came with lengths the host knows and the masks with hints.

    Args:
        inputs: of which one at least may be ragged; those with a self-attention first.
        masks: for each self-attention torch's mask and its hint; None = look at the mask.
        packing: whether the stack's layers can run packed.
    """
    readable = may_read(inputs[0].x)
    frozen = not any(given.padding_mask is not None and given.padding_mask.requires_grad for given in inputs)
    packing = packing and readable and frozen and any(given.is_ragged for given in inputs)
    # Where padding is read from the device anyway, the mask is read too, and its hint ignored.
    measured = packing and any(given.padding_mask is not None for given in inputs)
    questions = []
    looked = []
    for given, (mask, hint) in zip(inputs, masks, strict=False):
        check_attention_mask(mask)
        look = mask is not None and readable and _may_be_causal(mask, given) and (hint is None or measured)
        looked.append(look)
        if look and mask is not None:
            questions.append(_equals_causal(mask))
        packing = packing and (look or mask is None or (hint is True and not measured))
    if packing:
        for given in inputs:
            questions += given.questions()
    answers = torch.stack(questions).tolist() if questions else []
    causal = [bool(answers.pop(0)) if look else bool(hint) for look, (_, hint) in zip(looked, masks, strict=True)]
    if not packing or not all(flag or mask is None for flag, (mask, _) in zip(causal, masks, strict=True)):
        return causal, None
    layouts = []
    for given in inputs:
        asked = 2 * (given.is_ragged and given.tokens is None)
        layout = given.layout(answers[:asked])
        del answers[:asked]
        if layout is None:
            return causal, None
        layouts.append(layout)
    return causal, layouts


def may_read(x: Tensor) -> bool:
    """Tells whether values may be read from the device here: not while a graph is traced, captured or rehearsed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta or isinstance(x, FakeTensor):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return not rehearsing() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _may_be_causal(mask: Tensor, given: SequenceInput) -> bool:
    return tuple(mask.shape) == (given.shape[1], given.shape[1]) and not mask.requires_grad


def _equals_causal(mask: Tensor) -> Tensor:
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return (mask == later).all().long()
    return (mask == torch.zeros_like(mask).masked_fill(later, float("-inf"))).all().long()


def _lengths(name: str, lengths: Lengths, batch: int, longest: int, device: torch.device) -> tuple[Tensor, int | None]:
    if isinstance(lengths, Tensor):
        if lengths.shape != (batch,):
            raise ValueError(f"{name}: expected {batch} lengths, got shape {tuple(lengths.shape)}")
        check_integers(lengths=lengths)
        if lengths.device.type != "cpu" or not may_read(lengths):
            return lengths.to(device), None
        lengths = lengths.tolist()
    if len(lengths) != batch:
        raise ValueError(f"{name}: expected {batch} lengths, got {len(lengths)}")
    if not all(0 <= length <= longest for length in lengths):
        raise ValueError(f"{name}: expected lengths in [0, {longest}], got {list(lengths)}")
    # From a list on the host this does not wait for the device.
    return torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True), sum(lengths)
