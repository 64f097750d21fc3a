"""Corpus: a document in; parsed, chunked, embedded and stored by durable jobs; text in, hits out.

RPCs     CorpusService: AddDocument, GetDocument, ListDocuments, WatchDocument, DeleteDocument,
         Search.
State    PostgreSQL, schema `corpus` (documents, revisions, pages, chunks, batches; row-level
         security by tenant) and schema `corpus_jobs` (PgQueuer). Every stage's job is enqueued in
         the transaction that commits the stage before it, so a crash resumes where it stopped.
         Bytes and vectors belong to storage.
Peers    the router, and through it the parser, the embedder and storage: every call that the
         corpus makes is metered and held for the tenant whose document it is.
Promise  a document becomes READY, or FAILED with a reason; a revision is searched whole or not at
         all, and the one before it serves until then; what was paid for is not paid for again
         unless its outcome was lost.
Modules  core (words and rules), chunking, pipeline (the stages), jobs (PgQueuer), store, clients,
         service, main.
"""
