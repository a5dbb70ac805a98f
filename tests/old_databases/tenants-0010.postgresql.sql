CREATE TABLE tenant_meta (
	key VARCHAR COLLATE "C" NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (key)
)
;;
CREATE TABLE tenants (
	name VARCHAR COLLATE "C" NOT NULL, 
	weight FLOAT NOT NULL, 
	enabled BOOLEAN NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (name)
)
;;
CREATE TABLE tenant_grants (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	pattern VARCHAR COLLATE "C" NOT NULL, 
	PRIMARY KEY (tenant, pattern)
)
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
CREATE TABLE tenant_prices (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	prompt BIGINT NOT NULL, 
	cached BIGINT NOT NULL, 
	completion BIGINT NOT NULL, 
	PRIMARY KEY (tenant, adapter)
)
;;
CREATE TABLE tenant_training (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	price BIGINT NOT NULL, 
	budget BIGINT, 
	jobs BIGINT, 
	PRIMARY KEY (tenant)
)
;;
CREATE TABLE tenant_moves (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	route VARCHAR COLLATE "C" NOT NULL, 
	move INTEGER NOT NULL, 
	before INTEGER, 
	at FLOAT NOT NULL, 
	who TEXT NOT NULL, 
	spec TEXT NOT NULL, 
	PRIMARY KEY (tenant, route, move)
)
;;
CREATE TABLE tenant_routes (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	route VARCHAR COLLATE "C" NOT NULL, 
	current INTEGER NOT NULL, 
	PRIMARY KEY (tenant, route)
)
;;
CREATE TABLE tenant_lines (
	server VARCHAR COLLATE "C" NOT NULL, 
	request VARCHAR COLLATE "C" NOT NULL, 
	part INTEGER NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	name VARCHAR COLLATE "C" NOT NULL, 
	digest VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	strength FLOAT NOT NULL, 
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
	PRIMARY KEY (server, request, part)
)
;;
CREATE INDEX tenant_lines_open ON tenant_lines (server) WHERE state = 'open'
;;
CREATE INDEX ix_tenant_lines_opened ON tenant_lines (opened)
;;
CREATE TABLE tenant_sums (
	day VARCHAR COLLATE "C" NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	done BIGINT NOT NULL, 
	interrupted BIGINT NOT NULL, 
	prompt BIGINT NOT NULL, 
	cached BIGINT NOT NULL, 
	completion BIGINT NOT NULL, 
	queued FLOAT NOT NULL, 
	prefill FLOAT NOT NULL, 
	decode FLOAT NOT NULL, 
	cost BIGINT NOT NULL, 
	PRIMARY KEY (day, tenant, adapter)
)
;;
CREATE TABLE tenant_slots (
	width INTEGER NOT NULL, 
	slot BIGINT NOT NULL, 
	server VARCHAR COLLATE "C" NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	adapter VARCHAR COLLATE "C" NOT NULL, 
	requests BIGINT NOT NULL, 
	tokens BIGINT NOT NULL, 
	PRIMARY KEY (width, slot, server, tenant, adapter)
)
;;
CREATE TABLE tenant_servers (
	server VARCHAR COLLATE "C" NOT NULL, 
	seen FLOAT NOT NULL, 
	PRIMARY KEY (server)
)
;;
CREATE TABLE tenant_shadows (
	id SERIAL NOT NULL, 
	at FLOAT NOT NULL, 
	tenant VARCHAR COLLATE "C" NOT NULL, 
	route VARCHAR COLLATE "C" NOT NULL, 
	request VARCHAR COLLATE "C" NOT NULL, 
	target VARCHAR COLLATE "C" NOT NULL, 
	shadow VARCHAR COLLATE "C" NOT NULL, 
	same BOOLEAN NOT NULL, 
	first_difference INTEGER, 
	distance FLOAT, 
	target_sha256 TEXT NOT NULL, 
	shadow_sha256 TEXT NOT NULL, 
	target_tokens INTEGER NOT NULL, 
	shadow_tokens INTEGER NOT NULL, 
	target_seconds FLOAT NOT NULL, 
	shadow_seconds FLOAT NOT NULL, 
	PRIMARY KEY (id)
)
;;
CREATE INDEX ix_tenant_shadows_route ON tenant_shadows (route)
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
CREATE TABLE tenant_feedback_terms (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	days FLOAT NOT NULL, 
	names TEXT NOT NULL, 
	PRIMARY KEY (tenant)
)
;;
CREATE TABLE tenant_answers (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	id VARCHAR COLLATE "C" NOT NULL, 
	at FLOAT NOT NULL, 
	expires FLOAT NOT NULL, 
	whose VARCHAR COLLATE "C" NOT NULL, 
	name VARCHAR COLLATE "C" NOT NULL, 
	adapters TEXT NOT NULL, 
	asked TEXT NOT NULL, 
	choices TEXT NOT NULL, 
	PRIMARY KEY (tenant, id)
)
;;
CREATE INDEX tenant_answers_whose ON tenant_answers (tenant, whose)
;;
CREATE INDEX ix_tenant_answers_expires ON tenant_answers (expires)
;;
CREATE TABLE tenant_feedback (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	answer VARCHAR COLLATE "C" NOT NULL, 
	choice INTEGER NOT NULL, 
	at FLOAT NOT NULL, 
	up BOOLEAN, 
	corrected TEXT, 
	rejected TEXT, 
	PRIMARY KEY (tenant, answer, choice)
)
;;
CREATE TABLE tenant_forgotten (
	tenant VARCHAR COLLATE "C" NOT NULL, 
	what VARCHAR COLLATE "C" NOT NULL, 
	at FLOAT NOT NULL, 
	PRIMARY KEY (tenant, what)
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
INSERT INTO tenant_meta VALUES ('revision', '0')
;;
CREATE FUNCTION tenant_audit_fixed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$
;;
CREATE TRIGGER tenant_audit_fixed BEFORE UPDATE OR DELETE ON tenant_audit FOR EACH ROW EXECUTE FUNCTION tenant_audit_fixed()
;;
CREATE TABLE tenant_version (
	version_num VARCHAR(32) NOT NULL, 
	PRIMARY KEY (version_num)
)
;;
INSERT INTO tenant_version VALUES ('0010')
