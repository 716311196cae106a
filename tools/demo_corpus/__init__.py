"""The grammar that wrote the bundled corpus: French sentences, each with its one English translation.

    python -m tools.demo_corpus        # writes tfm/demo's files anew

The words, their forms and the constructions are in this package; nothing is read from a file.
"""
