"""Translation with a trained model: beam search over a key-value cache; greedy decoding is a beam of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tfm import ops
from tfm.errors import UserError
from tfm.memory import available, readable
from tfm.model import DecoderLayer, State, Transformer
from tfm.sequences import Ragged
from tfm.tokenizer import BOS, EOS, PAD, Tokenizer

# A translation may be this much longer than its source (section 6.1 of the paper).
EXTRA_LENGTH = 50


@dataclass(frozen=True)
class Search:
    """The settings of the search for translations.

    Attributes:
        beam: hypotheses kept for each sentence; 1 is greedy decoding.
        length_penalty: a hypothesis scores log p / length ** length_penalty.
        batch_tokens: sentences x longest source sentence of a batch.
    """

    beam: int = 1
    length_penalty: float = 1.0
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("beam", "batch_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not -10 <= self.length_penalty <= 10:
            raise UserError(f"length_penalty: expected a number in [-10, 10], got {self.length_penalty}")


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    lines: list[str],
    search: Search = Search(),
    on_truncated: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Returns one line of translation for each line given, in order; a blank line stays blank.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        lines: any text.
        search: how to look.
        on_truncated: told (index of the line, its tokens) of each line longer than the model takes, which is cut.

    Raises:
        UserError: the beam does not fit into memory.
    """
    limit = model.config.max_length - 1
    sources: dict[int, list[int]] = {}
    for index, tokens in enumerate(tokenizer.encode(lines)):
        if not lines[index].strip():
            continue
        if len(tokens) > limit and on_truncated is not None:
            on_truncated(index, len(tokens))
        sources[index] = [*tokens[:limit], EOS]
    translations = [""] * len(lines)
    for indices in _batches(sources, search.batch_tokens):
        _check_memory(model, len(indices), search)
        found = beam_search(model, [sources[index] for index in indices], search)
        for index, text in zip(indices, tokenizer.decode_lines(found), strict=True):
            translations[index] = text
    return translations


def _batches(sources: dict[int, list[int]], batch_tokens: int) -> list[list[int]]:
    """Groups lines of similar length: the indices of each batch."""
    batches: list[list[int]] = []
    # From long to short, so that the first batch tells whether the memory suffices.
    for index in sorted(sources, key=lambda i: -len(sources[i])):
        if batches and (len(batches[-1]) + 1) * len(sources[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _check_memory(model: Transformer, sentences: int, search: Search) -> None:
    """Raises UserError where a step's logits and their probabilities alone are more than is left.

    A CPU's memory is promised before it is there: the system would end the process without a word.
    """
    needed = 2 * sentences * search.beam * model.config.vocab_size * model.embedding.element_size()
    if model.embedding.device.type == "cpu" and needed > (room := available()):
        raise UserError(
            f"a beam of {search.beam:,} for {sentences:,} sentences at once needs {readable(needed)} of memory, "
            f"and {readable(room)} are left: lower --beam or --batch-tokens"
        )


@torch.inference_mode()
def beam_search(model: Transformer, sources: list[list[int]], search: Search) -> list[list[int]]:
    """Returns the best hypothesis found for each source.

    A sentence is done when as many hypotheses as the beam is wide have ended within the beam, or its length limit is
    reached, where every hypothesis must end.

    Args:
        model: in eval mode.
        sources: token ids, each ended by EOS.
        search: how to look.

    Returns:
        For each source its translation's token ids, without BOS and EOS.
    """
    device, beam = model.embedding.device, search.beam
    cache = Cache.of(model, sources, beam)
    limits = [min(len(source) + EXTRA_LENGTH, model.config.max_length) for source in sources]
    limit = torch.tensor(limits, device=device)
    sentence = torch.arange(len(sources), device=device)
    done = torch.zeros(len(sources), dtype=torch.bool, device=device)
    latest = torch.full((len(sources), beam), BOS, device=device)
    running, ended = (Hypotheses.none(len(sources), beam, device) for _ in range(2))
    # At first there is one hypothesis, the empty one.
    running.scores[:, 0] = 0.0
    results: list[list[int]] = [[] for _ in sources]
    for length in range(1, max(limits) + 1):
        log_p = cache.step(latest).log_softmax(dim=-1)
        log_p[..., [PAD, BOS]] = float("-inf")
        if length >= min(limits):
            goes_on = torch.arange(log_p.shape[-1], device=device) != EOS
            log_p.masked_fill_((length >= limit)[:, None, None] & goes_on, float("-inf"))
        grown, parent = running.grow(log_p, 2 * beam)
        ends = grown.tokens[..., -1] == EOS

        # A sentence that is done waits unchanged, so that it does not depend on the others of its batch.
        arrived = grown.where(ends & ~done[:, None]).first(beam)
        ended = ended.joined(replace(arrived, scores=arrived.scores / length**search.length_penalty)).best(beam)[0]
        running, place = grown.where(~ends).best(beam)
        latest, parent = running.tokens[..., -1], parent.gather(1, place)

        done = ended.scores.isfinite().all(dim=1) | (length >= limit)
        finished = int(done.sum())
        # Sentences leave when half of the batch is done: leaving copies the cache.
        if 2 * finished < len(done):
            cache.reorder(parent, None)
            continue
        for row in done.nonzero()[:, 0].tolist():
            tokens = ended.tokens[row, 0].tolist()
            results[int(sentence[row])] = tokens[: tokens.index(EOS)]
        if finished == len(done):
            break
        keep = (~done).nonzero()[:, 0]
        running, ended, latest, parent = running.of(keep), ended.of(keep), latest[keep], parent[keep]
        limit, sentence, done = limit[keep], sentence[keep], done[keep]
        cache.reorder(parent, keep)
    return results


@dataclass(frozen=True)
class Hypotheses:
    """J translations of each of B sentences: `tokens` [B, J, T], and `scores` fp32 [B, J], -inf where there is none."""

    tokens: Tensor
    scores: Tensor

    @classmethod
    def none(cls, sentences: int, count: int, device: torch.device) -> Hypotheses:
        tokens = torch.empty((sentences, count, 0), dtype=torch.int64, device=device)
        return cls(tokens, torch.full((sentences, count), float("-inf"), device=device))

    def grow(self, log_p: Tensor, count: int) -> tuple[Hypotheses, Tensor]:
        """Returns the `count` best with one more token, by `log_p` [B, J, vocab_size], and their parents [B, count].

        Writes over `log_p`: nothing else of a step is as large.
        """
        scores, place = log_p.add_(self.scores[..., None]).flatten(1).topk(count)
        parent, token = place // log_p.shape[-1], place % log_p.shape[-1]
        return Hypotheses(torch.cat((_take(self.tokens, parent), token[..., None]), dim=-1), scores), parent

    def best(self, count: int) -> tuple[Hypotheses, Tensor]:
        """Returns the `count` best of each sentence, best first, and their places [B, count]."""
        scores, place = self.scores.topk(count)
        return Hypotheses(_take(self.tokens, place), scores), place

    def joined(self, longer: Hypotheses) -> Hypotheses:
        """Returns these and `longer`, whose tokens are one more; the difference is filled with EOS."""
        tokens = torch.cat((F.pad(self.tokens, (0, 1), value=EOS), longer.tokens), dim=1)
        return Hypotheses(tokens, torch.cat((self.scores, longer.scores), dim=1))

    def where(self, kept: Tensor) -> Hypotheses:
        """Returns these without those that `kept`, bool [B, J], excludes."""
        return replace(self, scores=self.scores.masked_fill(~kept, float("-inf")))

    def first(self, count: int) -> Hypotheses:
        return Hypotheses(self.tokens[:, :count], self.scores[:, :count])

    def of(self, sentences: Tensor) -> Hypotheses:
        return Hypotheses(self.tokens[sentences], self.scores[sentences])


def _take(hypotheses: Tensor, index: Tensor) -> Tensor:
    """Turns [B, K, T] and [B, J] into [B, J, T]: hypotheses by their place in the beam."""
    return hypotheses.gather(1, index[..., None].expand(-1, -1, hypotheses.shape[-1]))


@dataclass
class Cache:
    """The keys and values of everything decoded so far, and of the memory, for each decoder layer.

    What a hypothesis has decoded stays where it was written. One that continues another takes over that one's ancestry,
    a row of a small table, and sentences that leave take theirs along: the cache itself is never reordered.

    Attributes:
        model: whose cache it is.
        beam: hypotheses K for each of B sentences; they share the keys and values of their memory.
        memory: [layer] of (key, value), [B, heads, S, dim / heads] each.
        memory_lengths: int32 [B].
        past: [layer] of (key, value), [rows, capacity, heads, dim / heads] each: a row for each hypothesis there was at
            first, of which the hypotheses there are now go on with the first ones.
        ancestry: int32 [B * K, capacity], the row of `past` that holds each token so far; None is each one's own.
        length: tokens decoded so far.
    """

    model: Transformer
    beam: int
    memory: list[tuple[Tensor, Tensor]]
    memory_lengths: Tensor
    past: list[tuple[Tensor, Tensor]]
    ancestry: Tensor | None = None
    length: int = 0

    @classmethod
    def of(cls, model: Transformer, sources: list[list[int]], beam: int) -> Cache:
        """Encodes the sources and projects their memory once for the whole search."""
        config = model.config
        memory = model.encode(Ragged.of(sources).to(model.embedding.device), seed=None)
        projected = []
        for key_value in model.decoder.project_memory(memory.values):
            key, value = memory.layout.unpack(key_value).permute(2, 0, 3, 1, 4).contiguous()
            projected.append((key, value))
        empty = projected[0][0].new_empty((len(sources) * beam, 0, config.heads, config.dim // config.heads))
        return cls(model, beam, projected, memory.layout.lengths, [(empty, empty)] * config.decoder_layers)

    def step(self, tokens: Tensor) -> Tensor:
        """Turns each hypothesis's latest token [B, K] into the logits of the next, fp32 [B, K, vocab_size]."""
        sentences, model = len(tokens), self.model
        self._reserve()
        positions = torch.full((tokens.numel(),), self.length, dtype=torch.int32, device=tokens.device)
        lengths = positions + 1
        x = model.embed(tokens.flatten(), positions, seed=None, site=1)
        decoder = model.decoder
        layers = cast(list[DecoderLayer], decoder.layers)
        state = State(x, x if decoder.first_norm is None else decoder.first_norm(x))
        for layer, past, memory in zip(layers, self.past, self.memory, strict=True):
            query, key, value = layer.self_attention.project(state.normed)
            attended = ops.decode_attention(query, *past, lengths, self.ancestry, key=key, value=value)
            state = layer.self_attention_norm(layer.self_attention.output(attended.flatten(1)), state, None)
            # The hypotheses of a sentence are the queries of one attention over its memory.
            query = layer.cross_attention.project(state.normed).unflatten(0, (sentences, self.beam)).transpose(1, 2)
            attended = ops.attention(query, *memory, key_lengths=self.memory_lengths)
            attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
            state = layer.cross_attention_norm(layer.cross_attention.output(attended), state, None)
            state = layer.feed_forward_norm(layer.feed_forward(state.normed, None), state, None)
        if self.ancestry is not None:
            self.ancestry[:, self.length] = _own_rows(len(self.ancestry), tokens.device)
        self.length += 1
        return model.logits(state.normed).float().unflatten(0, (sentences, self.beam))

    def reorder(self, parent: Tensor, keep: Tensor | None) -> None:
        """Has hypothesis k of each sentence continue hypothesis parent[:, k]; of the sentences only `keep` stay."""
        if keep is not None:
            self.memory = [(key[keep], value[keep]) for key, value in self.memory]
            self.memory_lengths = self.memory_lengths[keep]
        elif self.beam == 1:
            return
        sentences = torch.arange(len(parent), device=parent.device) if keep is None else keep
        rows = (sentences[:, None] * self.beam + parent).flatten()
        if self.ancestry is None:
            count, capacity = self.past[0][0].shape[:2]
            self.ancestry = _own_rows(count, parent.device)[:, None].expand(-1, capacity)
        self.ancestry = self.ancestry[rows]

    def _reserve(self) -> None:
        """Makes room for one more token; the capacity doubles, so that appending costs no copy most of the time."""
        capacity = self.past[0][0].shape[1]
        if self.length < capacity:
            return
        more = max(16, capacity)
        self.past = [(_lengthen(key, more), _lengthen(value, more)) for key, value in self.past]
        if self.ancestry is not None:
            self.ancestry = _lengthen(self.ancestry, more)


def _own_rows(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _lengthen(past: Tensor, more: int) -> Tensor:
    """Turns [R, T, ...] into [R, T + more, ...], the new part left unwritten."""
    longer = past.new_empty((len(past), past.shape[1] + more, *past.shape[2:]))
    longer[:, : past.shape[1]] = past
    return longer
