"""The bundled corpus: a French-English grammar that writes its own parallel text.

`corpus()` draws a training and a held-out part. The words, their forms and the constructions are in this package;
nothing is read from a file, and one French sentence always has one English translation.
"""

from tfm.demo.sampling import PHENOMENA, Pair, accuracy_by_phenomenon, corpus

__all__ = ["PHENOMENA", "Pair", "accuracy_by_phenomenon", "corpus"]
