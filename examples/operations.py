"""An own model on `tfm.ops`: a small language model with RMSNorm, rotary positions and gated feed-forward networks.

Sentences of the bundled corpus, as bytes, lie end to end. Prints the loss of predicting the next byte, from 6 to 2.2.
"""

import torch
from torch import Tensor, nn

from tfm import ops
from tfm.demo import corpus

DIM, HEADS, INNER, BYTES = 64, 4, 160, 256


class Block(nn.Module):
    """Causal attention and a gated feed-forward network, from (normed, residual) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.gate_up, self.down = nn.Linear(DIM, 2 * INNER, bias=False), nn.Linear(INNER, DIM, bias=False)

    def forward(self, x: Tensor, residual: Tensor, offsets: Tensor, longest: int, angles: tuple) -> tuple:
        query, key, value = ops.split_heads(self.qkv(x), 3, HEADS)
        query, key = ops.rotary(query, key, *angles)
        attended = ops.varlen_attention(query, key, value, offsets, offsets, longest, longest, is_causal=True)
        x, residual = ops.residual_rms_norm(self.out(attended.flatten(1)), residual)
        x = ops.gated_feed_forward(x, self.gate_up.weight, None, self.down.weight)
        return ops.residual_rms_norm(x, residual)


def packed(lines: list[bytes]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns all bytes end to end, the place of each in its line, and where each line begins."""
    offsets = torch.tensor([0, *map(len, lines)]).cumsum(0).int()
    return torch.tensor(list(b"".join(lines))), torch.cat([torch.arange(len(line)) for line in lines]), offsets


def main(updates: int = 40) -> None:
    torch.manual_seed(0)
    lines = [f"\n{pair.target}\n".encode() for pair in corpus()[0]]
    embedding, blocks = nn.Parameter(torch.randn(BYTES, DIM) / DIM**0.5), nn.ModuleList([Block(), Block()])
    table = ops.rotary_table(max(map(len, lines)), DIM // HEADS)
    optimizer = torch.optim.AdamW([embedding, *blocks.parameters()], 1e-2)
    for update in range(1, updates + 1):
        chosen = lines[32 * update : 32 * update + 32]
        tokens, places, offsets = packed([line[:-1] for line in chosen])
        target = packed([line[1:] for line in chosen])[0]
        x, residual = ops.rms_norm(embedding[tokens]), embedding[tokens]
        for block in blocks:
            x, residual = block(x, residual, offsets, max(map(len, chosen)), (*table, places))
        loss = ops.linear_cross_entropy(x, embedding, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update == 1 or update % 20 == 0:
            print(f"update {update}: loss {loss.item():.2f}")


if __name__ == "__main__":
    main()
