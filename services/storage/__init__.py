"""Storage: objects in buckets, vectors in spaces.

Purpose   keeps bytes under names and vectors by nearness, for each tenant apart.
RPCs      ObjectService: CreateBucket, ListBuckets, DeleteBucket, PutObject, GetObject, StatObject,
          ListObjects, CopyObject, MoveObject, DeleteObjects.
          VectorService: EnsureSpace, UpsertVectors, ActivateRevision, SearchVectors,
          LookupVectors, DeleteVectors.
State     names and vectors in PostgreSQL (schema `storage`, row-level security by tenant), bytes
          under opaque keys in `objects/` of the state directory.
Peers     none; the router stands before it.
Providers one file each in `providers/`: `filesystem` (objects), `pgvector` (vectors), `mock` (both,
          in memory).
Read on   `names.py` (what names may be), `core.py` (objects), `vectors.py`, `store.py` (all SQL),
          `provider.py` and `providers/`, `service.py` (the wire), `main.py` (the wiring).
"""
