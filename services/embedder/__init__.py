"""The embedder: texts in, vectors out.

Purpose   turns texts into unit vectors, in spaces that never mix: every model says which space its
          vectors are in, and simulated ones say so.
RPCs      EmbedderService: Embed, ListModels, CountTokens.
State     none but a cache of the built MiniLM graph in the state directory, which may be deleted.
Peers     none; the router stands before it.
Providers one file each in `providers/`: `minilm` (ONNX Runtime, local) and `mock`.
Read on   `core.py` (what is refused, how concurrent calls share batches), then `bert.py` (the
          network), `providers/`, `service.py` (the wire), `main.py` (the wiring).
"""
