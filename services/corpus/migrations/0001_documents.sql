-- Documents, their revisions, and what the stages made of them. The tenant is first in every key,
-- since row-level security asks for it in every statement.

CREATE TABLE documents (
  tenant      text        NOT NULL,
  uid         uuid        NOT NULL,
  collection  text        NOT NULL,
  document_id text        NOT NULL,
  -- The latest revision; the one that jobs work on.
  revision    bigint      NOT NULL,
  -- Set first when a document is deleted: it is gone for everybody while the rest is removed.
  deleted     boolean     NOT NULL DEFAULT false,
  created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant, uid)
);
CREATE UNIQUE INDEX documents_name ON documents (tenant, collection, document_id) WHERE NOT deleted;
CREATE INDEX documents_newest ON documents (tenant, created_at DESC, uid DESC) WHERE NOT deleted;

CREATE TABLE revisions (
  tenant            text        NOT NULL,
  uid               uuid        NOT NULL,
  revision          bigint      NOT NULL,
  file_name         text        NOT NULL,
  media_type        text        NOT NULL,
  size_bytes        bigint      NOT NULL,
  sha256            bytea       NOT NULL,
  metadata          jsonb       NOT NULL,
  bucket            text        NOT NULL,
  object_name       text        NOT NULL,
  object_owned      boolean     NOT NULL,
  project           text        NOT NULL,
  request_id        text        NOT NULL,
  traceparent       text        NOT NULL,
  -- Where its job stands, also while it is deferred or after it failed.
  stage             text        NOT NULL DEFAULT 'parse',
  -- Where it stands for people.
  state             text        NOT NULL DEFAULT 'STORED',
  reason            text        NOT NULL DEFAULT '',
  message           text        NOT NULL DEFAULT '',
  retry_at          timestamptz,
  -- Part of the ids of paid calls; raised before one may be authorized anew.
  tries             integer     NOT NULL DEFAULT 0,
  -- Attempts of this stage that may have been paid for in vain.
  faults            integer     NOT NULL DEFAULT 0,
  waiting_since     timestamptz,
  pages_done        integer     NOT NULL DEFAULT 0,
  pages_total       integer     NOT NULL DEFAULT 0,
  chunks_done       integer     NOT NULL DEFAULT 0,
  chunks_total      integer     NOT NULL DEFAULT 0,
  charged_nanos_usd bigint      NOT NULL DEFAULT 0,
  space             jsonb,
  parsed_by         jsonb,
  embedded_by       jsonb,
  updated_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant, uid, revision)
);

CREATE TABLE pages (
  tenant   text    NOT NULL,
  uid      uuid    NOT NULL,
  revision bigint  NOT NULL,
  number   integer NOT NULL,
  markdown text    NOT NULL,
  PRIMARY KEY (tenant, uid, revision, number)
);

CREATE TABLE chunks (
  tenant   text    NOT NULL,
  uid      uuid    NOT NULL,
  revision bigint  NOT NULL,
  ordinal  integer NOT NULL,
  page     integer NOT NULL,
  page_end integer NOT NULL,
  -- Offsets in characters into the pages' Markdown, joined by an empty line.
  starts   integer NOT NULL,
  ends     integer NOT NULL,
  headings text[]  NOT NULL,
  context  text    NOT NULL,
  body     text    NOT NULL,
  PRIMARY KEY (tenant, uid, revision, ordinal)
);

-- Batches whose vectors are written, so that a job that starts again leaves them out.
CREATE TABLE batches (
  tenant   text    NOT NULL,
  uid      uuid    NOT NULL,
  revision bigint  NOT NULL,
  batch    integer NOT NULL,
  PRIMARY KEY (tenant, uid, revision, batch)
);

DO $$
DECLARE
  name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['documents', 'revisions', 'pages', 'chunks', 'batches'] LOOP
    EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
    EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
    EXECUTE format(
      'CREATE POLICY tenant ON %I USING (tenant = current_setting(''tollgate.tenant'', true))', name
    );
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %I TO tollgate_corpus', name);
  END LOOP;
END $$;
