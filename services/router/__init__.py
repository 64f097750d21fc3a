"""The gate: the one address for clients. It holds the worst price of a call before it forwards it.

Purpose   meters every call, chooses a backend by mode and health, asks the ledger for a hold,
          forwards the bytes untouched, settles what was used, and says where the answer came from.
RPCs      RouterService (ListBackends, GetMode, SetMode), and all of ParserService, EmbedderService,
          ObjectService, VectorService and CorpusService as far as `service/meters.py` bounds them.
State     the modes, in the schema `router`; everything else is asked for again after a restart.
Peers     cost (the ledger), and whatever `backends` are set: parser, embedder, storage, corpus.
Read on   `core/routes.py` (modes, backends, choosing, attempts), `core/holds.py` (ids, expected
          charges, refusals), `service/meters.py` (the most that a call may use), `service/gate.py`
          (a call's way through), `clients.py` (the ledger, the backends, their health and models),
          `authenticate.py`, `modes.py` over `store.py`, `service/operators.py`, `main.py`.
"""
