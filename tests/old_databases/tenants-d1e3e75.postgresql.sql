CREATE TABLE tenant_aliases (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	alias VARCHAR COLLATE "C" NOT NULL, 
	current INTEGER NOT NULL, 
	PRIMARY KEY (tenant, alias)
)
;;
CREATE TABLE tenant_audit (
	number INTEGER NOT NULL, 
	at TEXT NOT NULL, 
	who TEXT NOT NULL, 
	what VARCHAR COLLATE "C" NOT NULL, 
	subject VARCHAR COLLATE "C" NOT NULL, 
	before TEXT NOT NULL, 
	after TEXT NOT NULL, 
	previous TEXT NOT NULL, 
	hash TEXT NOT NULL, 
	PRIMARY KEY (number)
)
;;
CREATE TABLE tenant_grants (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	pattern VARCHAR COLLATE "C" NOT NULL, 
	PRIMARY KEY (tenant, pattern)
)
;;
CREATE TABLE tenant_ledger (
	server VARCHAR COLLATE "C" NOT NULL, 
	request VARCHAR COLLATE "C" NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	name VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	opened FLOAT NOT NULL, 
	closed FLOAT, 
	day VARCHAR COLLATE "C" NOT NULL, 
	state VARCHAR COLLATE "C" NOT NULL, 
	asked_prompt BIGINT NOT NULL, 
	asked_completion BIGINT NOT NULL, 
	prompt BIGINT NOT NULL, 
	cached BIGINT NOT NULL, 
	completion BIGINT NOT NULL, 
	queued FLOAT NOT NULL, 
	prefill FLOAT NOT NULL, 
	decode FLOAT NOT NULL, 
	price_prompt BIGINT NOT NULL, 
	price_cached BIGINT NOT NULL, 
	price_completion BIGINT NOT NULL, 
	cost BIGINT NOT NULL, 
	PRIMARY KEY (server, request)
)
;;
CREATE INDEX ix_tenant_ledger_opened ON tenant_ledger (opened)
;;
CREATE INDEX tenant_ledger_day ON tenant_ledger (day, tenant, adapter)
;;
CREATE INDEX tenant_ledger_open ON tenant_ledger (server) WHERE state = 'open'
;;
CREATE TABLE tenant_limits (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	requests_per_minute BIGINT, 
	requests_per_day BIGINT, 
	tokens_per_minute BIGINT, 
	tokens_per_day BIGINT, 
	concurrency BIGINT, 
	PRIMARY KEY (tenant, adapter)
)
;;
CREATE TABLE tenant_meta (
	key VARCHAR COLLATE "C" NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (key)
)
;;
CREATE TABLE tenant_moves (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	alias VARCHAR COLLATE "C" NOT NULL, 
	move INTEGER NOT NULL, 
	before INTEGER, 
	at FLOAT NOT NULL, 
	who TEXT NOT NULL, 
	spec TEXT NOT NULL, 
	PRIMARY KEY (tenant, alias, move)
)
;;
CREATE TABLE tenant_prices (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	prompt BIGINT NOT NULL, 
	cached BIGINT NOT NULL, 
	completion BIGINT NOT NULL, 
	PRIMARY KEY (tenant, adapter)
)
;;
CREATE TABLE tenant_shadows (
	id SERIAL NOT NULL, 
	at FLOAT NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	alias VARCHAR COLLATE "C" NOT NULL, 
	request VARCHAR COLLATE "C" NOT NULL, 
	target VARCHAR COLLATE "C" NOT NULL, 
	shadow VARCHAR COLLATE "C" NOT NULL, 
	same BOOLEAN NOT NULL, 
	first_difference INTEGER, 
	target_sha256 TEXT NOT NULL, 
	shadow_sha256 TEXT NOT NULL, 
	target_tokens INTEGER NOT NULL, 
	shadow_tokens INTEGER NOT NULL, 
	target_seconds FLOAT NOT NULL, 
	shadow_seconds FLOAT NOT NULL, 
	PRIMARY KEY (id)
)
;;
CREATE INDEX ix_tenant_shadows_alias ON tenant_shadows (alias)
;;
CREATE TABLE tenants (
	name VARCHAR COLLATE "C" NOT NULL, 
	weight FLOAT NOT NULL, 
	enabled BOOLEAN NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (name)
)
;;
CREATE TABLE tenant_keys (
	id VARCHAR COLLATE "C" NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	hash TEXT NOT NULL, 
	label TEXT NOT NULL, 
	created FLOAT NOT NULL, 
	expires FLOAT, 
	revoked FLOAT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(tenant) REFERENCES tenants (name) ON DELETE CASCADE
)
;;
CREATE INDEX ix_tenant_keys_tenant ON tenant_keys (tenant)
;;
CREATE FUNCTION tenant_audit_fixed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$
;;
CREATE TRIGGER tenant_audit_fixed BEFORE UPDATE OR DELETE ON tenant_audit FOR EACH ROW EXECUTE FUNCTION tenant_audit_fixed()
;;
