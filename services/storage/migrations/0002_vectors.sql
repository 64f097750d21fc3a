-- Vectors by space. Each space is a partition with an HNSW index of its own, made while it is
-- empty: so indexing never stands in the way of anybody's writes, and a search touches one space.

CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public;

-- Spaces are properties of models and belong to no tenant.
CREATE TABLE spaces (
    number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text COLLATE "C" NOT NULL UNIQUE,
    dimensions integer NOT NULL CHECK (dimensions BETWEEN 1 AND 4000),
    simulated boolean NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Which revision of a document searches see. One row changes when it does, however many vectors
-- there are. A document without a row has no active revision.
CREATE TABLE revisions (
    tenant text NOT NULL,
    space integer NOT NULL,
    collection text COLLATE "C" NOT NULL,
    document text COLLATE "C" NOT NULL,
    active bigint NOT NULL CHECK (active > 0),
    PRIMARY KEY (tenant, space, collection, document)
);

CREATE TABLE vectors (
    space integer NOT NULL,
    tenant text NOT NULL,
    collection text COLLATE "C" NOT NULL,
    document text COLLATE "C" NOT NULL,
    revision bigint NOT NULL CHECK (revision > 0),
    id text COLLATE "C" NOT NULL,
    text_sha256 bytea NOT NULL CHECK (octet_length(text_sha256) = 32),
    metadata jsonb NOT NULL,
    embedding halfvec NOT NULL,
    PRIMARY KEY (tenant, collection, document, revision, id, space)
) PARTITION BY LIST (space);

CREATE INDEX vectors_by_text ON vectors (tenant, text_sha256);

ALTER TABLE revisions ENABLE ROW LEVEL SECURITY;
ALTER TABLE revisions FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON revisions
    USING (tenant = (SELECT current_setting('tollgate.tenant', true)));

ALTER TABLE vectors ENABLE ROW LEVEL SECURITY;
ALTER TABLE vectors FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON vectors
    USING (tenant = (SELECT current_setting('tollgate.tenant', true)));

GRANT SELECT ON spaces TO tollgate_storage;
GRANT SELECT, INSERT, UPDATE, DELETE ON revisions, vectors TO tollgate_storage;

-- Makes a space with its partition and index where it is missing and fewer than `most` exist.
-- Runs as the owner of the tables, which the daemon is not. The partition is reached through
-- `vectors` alone: nobody is granted anything on it, and it has row-level security without a policy.
CREATE FUNCTION make_space(
    space_id text, space_dimensions integer, is_simulated boolean,
    space_provider text, space_model text, most integer
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = storage, public, pg_temp AS $$
DECLARE
    space_number integer;
    partition_name text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('tollgate.storage.spaces', 0));
    IF EXISTS (SELECT FROM spaces WHERE id = space_id)
        OR (SELECT count(*) FROM spaces) >= most THEN
        RETURN;
    END IF;
    INSERT INTO spaces (id, dimensions, simulated, provider, model)
    VALUES (space_id, space_dimensions, is_simulated, space_provider, space_model)
    RETURNING number INTO space_number;
    partition_name := format('vectors_%s', space_number);
    EXECUTE format('CREATE TABLE %I (LIKE vectors INCLUDING ALL)', partition_name);
    -- Says to ATTACH that it need not look, and holds the dimensions whoever writes.
    EXECUTE format(
        'ALTER TABLE %I ADD CHECK (space = %s), ADD CHECK (vector_dims(embedding) = %s), '
        'ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY',
        partition_name, space_number, space_dimensions
    );
    EXECUTE format(
        'CREATE INDEX %I ON %I USING hnsw ((embedding::halfvec(%s)) halfvec_cosine_ops)',
        partition_name || '_nearest', partition_name, space_dimensions
    );
    -- ATTACH lets reads and writes of the other spaces go on, which PARTITION OF would not.
    EXECUTE format(
        'ALTER TABLE vectors ATTACH PARTITION %I FOR VALUES IN (%s)', partition_name, space_number
    );
END
$$;

REVOKE EXECUTE ON FUNCTION make_space FROM PUBLIC;
GRANT EXECUTE ON FUNCTION make_space TO tollgate_storage;
