"""The gate: the one address for clients. It holds the worst price of a call before it forwards it.

Purpose   meters every call, chooses a backend by mode and health, asks the ledger for a hold,
          forwards the bytes untouched, settles what was used, and says where the answer came from.
RPCs      RouterService (ListBackends, GetMode, SetMode), and all of ParserService, EmbedderService,
          ObjectService, VectorService and CorpusService as far as `meters.py` can bound them.
State     the modes, in the schema `router`; everything else is asked for again after a restart.
Peers     cost (the ledger), and whatever `backends` are set: parser, embedder, storage, corpus.
Read on   `core.py` (modes, backends, choosing), `holds.py` (ids, receipts, refusals), `meters.py`
          (what a call may use at most), `gate.py` (a call's way through), `clients.py` (the ledger
          and the backends on the wire), `authenticate.py`, `service.py`, `store.py`, `main.py`.
"""
