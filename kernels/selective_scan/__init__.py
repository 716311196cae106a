"""Mamba's selective scan with all that is element-wise around it, a state of N numbers a channel: one pass each way.

With Δ = softplus(delta + delta_bias), the state h before a step, [D, N], and s the logistic function:

    h' = e^(Δ A) h + Δ x B        y = (Σ_n C h' + D x) z s(z)

Backward, from the last step to the first, with g the gradient of h', and q = dy z s(z):

    g += C q        dC = Σ_channels h' q        dD = q x        dz = dy (Σ_n C h' + D x) (z s(z))'
    dB = Σ_channels g Δ x        dx = Δ Σ_n g B + D q        dh = e^(Δ A) g
    dA = h Δ dh        dΔ = x Σ_n g B + Σ_n A h dh        ddelta = dΔ s(delta + delta_bias)

Why it is fast: what is given is read once, the state stays in registers; arithmetic bounds it, e^(Δ A) above all, not
memory. A thread holds four numbers of one channel's state. What is element-wise is computed for several steps at once,
each number by one thread, softplus and SiLU above all, and then handed to the threads of its channel, which take the
steps one after the other. For the backward the forward keeps the state before every 16th step, N / 4 bytes for each
number of x; the backward computes those between again, four at a time, as many as its registers hold. Sums over
channels are formed within a warp at each step, between a program's warps once for several, and leave as a partial sum
for each program, which a second launch adds up in one order; so do sums over steps and sequences. Where sequences and
channels are too few for a GPU, the sequence is cut into chunks that go side by side.

step                a step, and what is computed for several at once
forward, backward   the passes
chunks              chunks of a sequence, side by side
channel_sums        the sums over channels
"""

from tfm.kernels.selective_scan.backward import selective_scan_backward
from tfm.kernels.selective_scan.forward import selective_scan

__all__ = ["selective_scan", "selective_scan_backward"]
