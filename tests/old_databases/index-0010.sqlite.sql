CREATE TABLE library_meta (
	"key" VARCHAR NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
)
;;
CREATE TABLE library_objects (
	path VARCHAR NOT NULL, 
	size BIGINT NOT NULL, 
	touched FLOAT NOT NULL, 
	generation VARCHAR NOT NULL, 
	PRIMARY KEY (path)
)
;;
CREATE TABLE library_names (
	name VARCHAR NOT NULL, 
	latest INTEGER, 
	next INTEGER NOT NULL, 
	PRIMARY KEY (name)
)
;;
CREATE TABLE library_entries (
	id VARCHAR NOT NULL, 
	manifest VARCHAR NOT NULL, 
	digest VARCHAR NOT NULL, 
	format VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	base VARCHAR NOT NULL, 
	base_name VARCHAR NOT NULL, 
	fingerprint VARCHAR NOT NULL, 
	licence VARCHAR NOT NULL, 
	created VARCHAR NOT NULL, 
	size BIGINT NOT NULL, 
	card TEXT NOT NULL, 
	words TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(manifest) REFERENCES library_objects (path)
)
;;
CREATE INDEX ix_library_entries_base_name ON library_entries (base_name)
;;
CREATE INDEX ix_library_entries_manifest ON library_entries (manifest)
;;
CREATE INDEX ix_library_entries_fingerprint ON library_entries (fingerprint)
;;
CREATE INDEX ix_library_entries_base ON library_entries (base)
;;
CREATE INDEX ix_library_entries_digest ON library_entries (digest)
;;
CREATE TABLE library_figures (
	entry VARCHAR NOT NULL, 
	rank INTEGER NOT NULL, 
	gain FLOAT, 
	PRIMARY KEY (entry), 
	FOREIGN KEY(entry) REFERENCES library_entries (id) ON DELETE CASCADE
)
;;
CREATE TABLE library_files (
	entry VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	object VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size BIGINT NOT NULL, 
	PRIMARY KEY (entry, name), 
	FOREIGN KEY(entry) REFERENCES library_entries (id) ON DELETE CASCADE, 
	FOREIGN KEY(object) REFERENCES library_objects (path)
)
;;
CREATE INDEX ix_library_files_object ON library_files (object)
;;
CREATE TABLE library_triggers (
	entry VARCHAR NOT NULL, 
	word VARCHAR NOT NULL, 
	lower VARCHAR NOT NULL, 
	PRIMARY KEY (entry, word), 
	FOREIGN KEY(entry) REFERENCES library_entries (id) ON DELETE CASCADE
)
;;
CREATE INDEX ix_library_triggers_lower ON library_triggers (lower)
;;
CREATE TABLE library_checks (
	entry VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	ok BOOLEAN, 
	detail TEXT NOT NULL, 
	at VARCHAR NOT NULL, 
	PRIMARY KEY (entry, name), 
	FOREIGN KEY(entry) REFERENCES library_entries (id) ON DELETE CASCADE
)
;;
CREATE TABLE library_parents (
	entry VARCHAR NOT NULL, 
	parent VARCHAR NOT NULL, 
	PRIMARY KEY (entry, parent), 
	FOREIGN KEY(entry) REFERENCES library_entries (id) ON DELETE CASCADE
)
;;
CREATE INDEX ix_library_parents_parent ON library_parents (parent)
;;
CREATE TABLE library_versions (
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	entry VARCHAR NOT NULL, 
	added VARCHAR NOT NULL, 
	source VARCHAR NOT NULL, 
	PRIMARY KEY (name, version), 
	FOREIGN KEY(name) REFERENCES library_names (name), 
	FOREIGN KEY(entry) REFERENCES library_entries (id)
)
;;
CREATE INDEX ix_library_versions_entry ON library_versions (entry)
;;
CREATE TABLE library_aliases (
	name VARCHAR NOT NULL, 
	alias VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	FOREIGN KEY(name, version) REFERENCES library_versions (name, version)
)
;;
CREATE INDEX library_aliases_version ON library_aliases (name, version)
;;
CREATE TABLE library_tags (
	name VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	tag VARCHAR NOT NULL, 
	PRIMARY KEY (name, version, tag), 
	FOREIGN KEY(name, version) REFERENCES library_versions (name, version) ON DELETE CASCADE
)
;;
CREATE INDEX library_tags_tag ON library_tags (tag)
;;
CREATE TABLE library_version (
	version_num VARCHAR(32) NOT NULL, 
	PRIMARY KEY (version_num)
)
;;
INSERT INTO library_version VALUES ('0010')
