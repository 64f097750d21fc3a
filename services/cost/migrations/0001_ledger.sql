-- The ledger. There are no foreign keys: the tables that every call writes must not wait on others.

-- One row: what every batch looks at to know whether the limits and prices it remembers still hold.
CREATE TABLE state (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    version bigint NOT NULL DEFAULT 1,
    price_version bigint NOT NULL DEFAULT 0
);
INSERT INTO state DEFAULT VALUES;

-- A limit has a number of its own, so that one made again under an old id starts anew.
-- matches and match_values follow tenant, project, service, provider, model, simulated.
CREATE TABLE limits (
    id text COLLATE "C" PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    display_name text NOT NULL,
    matches smallint[] NOT NULL CHECK (cardinality(matches) = 6),
    match_values text[] NOT NULL CHECK (cardinality(match_values) = 6),
    metric smallint NOT NULL,
    time_window smallint NOT NULL,
    time_zone text NOT NULL,
    maximum bigint NOT NULL CHECK (maximum >= 0),
    enforcement smallint NOT NULL,
    alert_percents smallint[] NOT NULL DEFAULT '{}',
    revision bigint NOT NULL DEFAULT 1,
    counts_from timestamptz NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    update_time timestamptz NOT NULL DEFAULT now()
);

-- A fresh install spends little: each tenant, genuine use only.
INSERT INTO limits (
    id, display_name, matches, match_values, metric, time_window, time_zone, maximum, enforcement,
    alert_percents, counts_from
) VALUES
    ('default-day', 'Each tenant: 10 USD a day', '{3,2,2,2,2,1}', '{"","","","","","false"}',
     1, 3, 'UTC', 10000000000, 1, '{80,100}', 'epoch'),
    ('default-hour', 'Each tenant: 5 USD an hour', '{3,2,2,2,2,1}', '{"","","","","","false"}',
     1, 2, 'UTC', 5000000000, 1, '{80,100}', 'epoch');

-- Lines are never changed. origin: 0 came with Tollgate, 1 is an operator's.
CREATE TABLE prices (
    provider text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    operation text COLLATE "C" NOT NULL,
    unit smallint NOT NULL,
    effective_time timestamptz NOT NULL,
    origin smallint NOT NULL,
    nanos_usd_per_million bigint NOT NULL CHECK (nanos_usd_per_million >= 0),
    source text NOT NULL,
    version bigint NOT NULL,
    PRIMARY KEY (provider, model, operation, unit, effective_time, origin)
);

-- Every scope that ever asked, under a number: holds, entries and rollups stay narrow.
CREATE TABLE accounts (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    project text COLLATE "C" NOT NULL,
    service text COLLATE "C" NOT NULL,
    provider text COLLATE "C" NOT NULL,
    model text COLLATE "C" NOT NULL,
    operation text COLLATE "C" NOT NULL,
    simulated boolean NOT NULL,
    UNIQUE (tenant, project, service, provider, model, operation, simulated)
);

-- Hold ids, claimed by their primary key, with what became of each. used_* are null until settled.
-- One table: each call touches it three times, and partitions made that a tenth slower.
-- state: 1 held, 2 settled, 3 released, 4 expired, 5 denied.
CREATE TABLE holds (
    id uuid NOT NULL,
    account bigint NOT NULL,
    tokens bigint NOT NULL CHECK (tokens >= 0),
    pages bigint NOT NULL CHECK (pages >= 0),
    bytes bigint NOT NULL CHECK (bytes >= 0),
    requests bigint NOT NULL CHECK (requests >= 0),
    held_nanos_usd bigint NOT NULL CHECK (held_nanos_usd >= 0),
    price_version bigint NOT NULL,
    create_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    used_tokens bigint,
    used_pages bigint,
    used_bytes bigint,
    used_requests bigint,
    charged_nanos_usd bigint NOT NULL DEFAULT 0 CHECK (charged_nanos_usd >= 0),
    overrun_nanos_usd bigint NOT NULL DEFAULT 0,
    state smallint NOT NULL,
    unconfirmed boolean NOT NULL DEFAULT false,
    tenant text COLLATE "C" NOT NULL,
    request_id text COLLATE "C" NOT NULL,
    denial jsonb,
    PRIMARY KEY (id, tenant)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.5);

CREATE INDEX holds_open ON holds (expire_time) WHERE state = 1;
CREATE INDEX holds_request ON holds (tenant, request_id) WHERE request_id <> '';
CREATE INDEX holds_age ON holds USING brin (create_time) WITH (autosummarize = on);

-- What is held and settled of a limit in a window. A row is updated by every batch that touches it.
CREATE TABLE counters (
    limit_number bigint NOT NULL,
    window_start timestamptz NOT NULL,
    name text COLLATE "C" NOT NULL,
    held bigint NOT NULL DEFAULT 0 CHECK (held >= 0),
    settled bigint NOT NULL DEFAULT 0 CHECK (settled >= 0),
    PRIMARY KEY (limit_number, window_start, name)
) WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0.02);

-- Charges, appended and never changed. hold_time is when the hold was made, and counts; write_time
-- is when the line was written. kind: 1 settled, 2 expired, 3 corrected.
CREATE TABLE entries (
    write_time timestamptz NOT NULL DEFAULT now(),
    hold_time timestamptz NOT NULL,
    hold_id uuid NOT NULL,
    account bigint NOT NULL,
    tokens bigint NOT NULL,
    pages bigint NOT NULL,
    bytes bigint NOT NULL,
    requests bigint NOT NULL,
    charged_nanos_usd bigint NOT NULL,
    unconfirmed_nanos_usd bigint NOT NULL,
    overrun_nanos_usd bigint NOT NULL,
    kind smallint NOT NULL,
    charges smallint NOT NULL
) PARTITION BY RANGE (write_time);

CREATE INDEX entries_age ON entries USING brin (write_time) WITH (autosummarize = on);
-- Takes what no day's partition does, so that writing a charge never fails for want of one.
CREATE TABLE entries_default PARTITION OF entries DEFAULT;

-- The sums of entries, by account and quarter of an hour of hold_time.
CREATE TABLE rollups (
    bucket timestamptz NOT NULL,
    account bigint NOT NULL,
    tokens bigint NOT NULL,
    pages bigint NOT NULL,
    bytes bigint NOT NULL,
    requests bigint NOT NULL,
    charged_nanos_usd bigint NOT NULL,
    unconfirmed_nanos_usd bigint NOT NULL,
    charges bigint NOT NULL,
    PRIMARY KEY (bucket, account)
) WITH (fillfactor = 50);

-- Makes the partitions of today and the days ahead, in UTC; returns how many it made. A day whose
-- first entries went to the default partition stays there.
CREATE FUNCTION make_entry_partitions(days_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = cost, pg_temp
SET lock_timeout = '2s'
AS $$
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
    day date;
    part text;
    made integer := 0;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended('tollgate.cost.partitions', 0)) THEN
        RETURN 0;
    END IF;
    FOR ahead IN 0..least(days_ahead, 60) LOOP
        day := today + ahead;
        part := 'entries_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('cost.' || part) IS NOT NULL;
        BEGIN
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF entries FOR VALUES FROM (%L) TO (%L)',
                part, day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC'
            );
            made := made + 1;
        EXCEPTION WHEN check_violation OR lock_not_available THEN
            CONTINUE;
        END;
    END LOOP;
    RETURN made;
END
$$;
REVOKE ALL ON FUNCTION make_entry_partitions(integer) FROM PUBLIC;

GRANT EXECUTE ON FUNCTION make_entry_partitions(integer) TO tollgate_cost;
GRANT SELECT, UPDATE ON state TO tollgate_cost;
GRANT SELECT, INSERT, UPDATE, DELETE ON limits, counters TO tollgate_cost;
GRANT SELECT, INSERT ON prices, accounts, entries TO tollgate_cost;
GRANT SELECT, INSERT, UPDATE ON holds, rollups TO tollgate_cost;
