-- Objects by name. Their bytes are with the provider, under the opaque key `blob`.

CREATE TABLE buckets (
    tenant text NOT NULL,
    provider text NOT NULL,
    name text COLLATE "C" NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, provider, name)
);

CREATE TABLE objects (
    tenant text NOT NULL,
    provider text NOT NULL,
    bucket text COLLATE "C" NOT NULL,
    -- In the C collation names sort by their bytes.
    name text COLLATE "C" NOT NULL,
    blob text NOT NULL,
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    content_type text NOT NULL,
    sha256 bytea NOT NULL CHECK (octet_length(sha256) = 32),
    metadata jsonb NOT NULL,
    etag text NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, provider, bucket, name),
    -- Holds a bucket in place while an object comes into it, and a bucket that has objects.
    FOREIGN KEY (tenant, provider, bucket) REFERENCES buckets (tenant, provider, name)
);

-- Every key that an object names, and no word of whose it is: the sweep, which acts for no tenant,
-- asks here which bytes are named. Written in the transactions that write objects.
CREATE TABLE blobs (
    provider text NOT NULL,
    key text NOT NULL,
    PRIMARY KEY (provider, key)
);

ALTER TABLE buckets ENABLE ROW LEVEL SECURITY;
ALTER TABLE buckets FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON buckets
    USING (tenant = (SELECT current_setting('tollgate.tenant', true)));

ALTER TABLE objects ENABLE ROW LEVEL SECURITY;
ALTER TABLE objects FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON objects
    USING (tenant = (SELECT current_setting('tollgate.tenant', true)));

GRANT SELECT, INSERT, UPDATE, DELETE ON buckets, objects, blobs TO tollgate_storage;
