"""Translation with a trained model: beam search over a key-value cache; greedy decoding is a beam of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tfm import ops
from tfm.model import DecoderLayer, Sequences, State, Transformer
from tfm.sequences import Layout, offsets
from tfm.tokenizer import BOS, EOS, PAD, Tokenizer

# A translation may be this much longer than its source (section 6.1 of the paper).
EXTRA_LENGTH = 50


@dataclass(frozen=True)
class Search:
    """How translations are looked for.

    Attributes:
        beam: hypotheses kept for each sentence; 1 is greedy decoding.
        length_penalty: a hypothesis scores log p / length ** length_penalty.
        batch_tokens: sentences x longest source sentence of a batch.
    """

    beam: int = 1
    length_penalty: float = 1.0
    batch_tokens: int = 4096


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    lines: list[str],
    search: Search = Search(),
    on_truncated: Callable[[int, int], None] | None = None,
) -> list[str]:
    """One line of translation for each line given, in order; a blank line stays blank.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        lines: any text.
        search: how to look.
        on_truncated: told (index of the line, its tokens) of each line longer than the model takes, which is cut.
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
        found = beam_search(model, [sources[index] for index in indices], search)
        for index, text in zip(indices, tokenizer.decode_lines(found), strict=True):
            translations[index] = text
    return translations


def _batches(sources: dict[int, list[int]], batch_tokens: int) -> list[list[int]]:
    """Lines of similar length together: the indices of each batch."""
    batches: list[list[int]] = []
    # From long to short, so that the first batch tells whether the memory suffices.
    for index in sorted(sources, key=lambda i: -len(sources[i])):
        if batches and (len(batches[-1]) + 1) * len(sources[batches[-1][0]]) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def beam_search(model: Transformer, sources: list[list[int]], search: Search) -> list[list[int]]:
    """The best hypothesis found for each source.

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
    # Hypotheses that run: at first one, the empty one. Those that ended: none.
    tokens = torch.full((len(sources), beam), BOS, device=device)
    scores = torch.full((len(sources), beam), float("-inf"), device=device)
    scores[:, 0] = 0.0
    history = torch.empty((len(sources), beam, 0), dtype=torch.int64, device=device)
    ended_scores = torch.full((len(sources), beam), float("-inf"), device=device)
    ended = torch.empty((len(sources), beam, 0), dtype=torch.int64, device=device)
    results: list[list[int]] = [[] for _ in sources]
    for length in range(1, max(limits) + 1):
        log_p = cache.step(tokens).log_softmax(dim=-1)
        log_p[..., [PAD, BOS]] = float("-inf")
        must_end = (length >= limit)[:, None, None]
        log_p = log_p.masked_fill(must_end & (torch.arange(log_p.shape[-1], device=device) != EOS), float("-inf"))
        best, flat = (scores[..., None] + log_p).flatten(1).topk(2 * beam)
        parent, token = flat // log_p.shape[-1], flat % log_p.shape[-1]
        grown = torch.cat((_take(history, parent), token[..., None]), dim=-1)

        ends = token == EOS
        new_scores = (best / length**search.length_penalty).masked_fill(~ends, float("-inf"))[:, :beam]
        ended_scores, order = torch.cat((ended_scores, new_scores), dim=1).topk(beam)
        padding = ended.new_full((len(ended), beam, length - ended.shape[2]), EOS)
        ended = _take(torch.cat((torch.cat((ended, padding), dim=2), grown[:, :beam]), dim=1), order)

        scores, order = best.masked_fill(ends, float("-inf")).topk(beam)
        tokens, parent, history = token.gather(1, order), parent.gather(1, order), _take(grown, order)

        done = ended_scores.isfinite().all(dim=1) | (length >= limit)
        finished = int(done.sum())
        if finished == len(done) or 2 * finished >= len(done):
            for row in done.nonzero()[:, 0].tolist():
                best_tokens = ended[row, 0].tolist()
                results[int(sentence[row])] = best_tokens[: best_tokens.index(EOS)]
        if finished == len(done):
            break
        keep = None
        if 2 * finished >= len(done):
            keep = (~done).nonzero()[:, 0]
            tokens, scores, history, parent = tokens[keep], scores[keep], history[keep], parent[keep]
            ended_scores, ended, limit, sentence = ended_scores[keep], ended[keep], limit[keep], sentence[keep]
        cache.reorder(parent, keep)
    return results


def _take(hypotheses: Tensor, index: Tensor) -> Tensor:
    """[B, K, T] and [B, J] to [B, J, T]: hypotheses by their place in the beam."""
    return hypotheses.gather(1, index[..., None].expand(-1, -1, hypotheses.shape[-1]))


@dataclass
class Cache:
    """Keys and values of everything decoded so far, and of the memory, for each decoder layer.

    Attributes:
        model: whose cache it is.
        beam: hypotheses K for each of B sentences; they share the keys and values of their memory.
        memory: [layer] of (key, value), [B, heads, S, dim / heads] each.
        memory_lengths: int32 [B].
        past: [layer] of (key, value), [B * K, heads, capacity, dim / heads] each.
        length: tokens decoded so far.
    """

    model: Transformer
    beam: int
    memory: list[tuple[Tensor, Tensor]]
    memory_lengths: Tensor
    past: list[tuple[Tensor, Tensor]]
    length: int = 0

    @classmethod
    def of(cls, model: Transformer, sources: list[list[int]], beam: int) -> Cache:
        """Encodes the sources and projects their memory once for the whole search."""
        device, config = model.embedding.device, model.config
        lengths = torch.tensor([len(source) for source in sources], dtype=torch.int32)
        longest = int(lengths.max())
        cu_seq = offsets(lengths).to(device)
        tokens = torch.tensor([token for source in sources for token in source], device=device)
        positions = torch.tensor([place for source in sources for place in range(len(source))], device=device)
        memory = model.encode(tokens, positions, Sequences(cu_seq, longest), seed=None)
        layout = Layout.of(cu_seq, longest, len(tokens))
        projected = []
        for key_value in model.decoder.project_memory(memory):
            key, value = layout.unpack(key_value).permute(2, 0, 3, 1, 4).contiguous()
            projected.append((key, value))
        shape = (len(sources) * beam, config.heads, 0, config.dim // config.heads)
        empty = memory.new_empty(shape)
        return cls(model, beam, projected, lengths.to(device), [(empty, empty)] * config.decoder_layers)

    def step(self, tokens: Tensor) -> Tensor:
        """The latest token of each hypothesis, [B, K], to the logits of its successor, fp32 [B, K, vocab_size]."""
        sentences, model = len(tokens), self.model
        self._reserve()
        positions = torch.full((tokens.numel(),), self.length, device=tokens.device)
        x = model.embed(tokens.flatten(), positions, seed=None, site=1)
        decoder = model.decoder
        layers = cast(list[DecoderLayer], decoder.layers)
        state = State(x, x if decoder.first_norm is None else decoder.first_norm(x))
        now = self.length
        for layer, (past_key, past_value), memory in zip(layers, self.past, self.memory, strict=True):
            query, past_key[:, :, now], past_value[:, :, now] = layer.self_attention.project(state.normed)
            attended = ops.attention(query[:, :, None], past_key[:, :, : now + 1], past_value[:, :, : now + 1])
            state = layer.self_attention_norm(layer.self_attention.output(attended.flatten(1)), state, None)
            # The hypotheses of a sentence are the queries of one attention over its memory.
            query = layer.cross_attention.project(state.normed).unflatten(0, (sentences, self.beam)).transpose(1, 2)
            attended = ops.attention(query, *memory, key_lengths=self.memory_lengths)
            attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
            state = layer.cross_attention_norm(layer.cross_attention.output(attended), state, None)
            state = layer.feed_forward_norm(layer.feed_forward(state.normed, None), state, None)
        self.length += 1
        return model.logits(state.normed).float().unflatten(0, (sentences, self.beam))

    def reorder(self, parent: Tensor, keep: Tensor | None) -> None:
        """Hypothesis k of each sentence continues hypothesis parent[:, k]; of the sentences only `keep` stay."""
        if keep is not None:
            self.memory = [(key[keep], value[keep]) for key, value in self.memory]
            self.memory_lengths = self.memory_lengths[keep]
        elif self.beam == 1:
            return
        sentences = torch.arange(len(parent), device=parent.device) if keep is None else keep
        rows = (sentences[:, None] * self.beam + parent).flatten()
        self.past = [(key[rows], value[rows]) for key, value in self.past]

    def _reserve(self) -> None:
        """Room for one more token; the capacity doubles, so that appending costs no copy most of the time."""
        capacity = self.past[0][0].shape[2]
        if self.length < capacity:
            return
        more = max(16, capacity)
        self.past = [(_lengthen(key, more), _lengthen(value, more)) for key, value in self.past]


def _lengthen(past: Tensor, more: int) -> Tensor:
    """[R, heads, T, d] to [R, heads, T + more, d], the new part left unwritten."""
    return torch.cat((past, past.new_empty((*past.shape[:2], more, past.shape[3]))), dim=2)
