#!/bin/sh
# Writes new random passwords and keys for compose.yaml into secrets/, readable only by you, and prints the admin key.
# It does not replace existing secrets: delete secrets/ and the volumes to start over.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir secrets
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

postgres=$(random) s3=$(random) engine=$(random) admin=$(random)
printf %s "$postgres" > secrets/postgres
printf %s veneer > secrets/s3_user
printf %s "$s3" > secrets/s3_password
echo "$engine" > secrets/engine_keys
printf %s "$admin" > secrets/admin_key
cat > secrets/library.env <<END
VENEER_LIBRARY=s3://veneer/library
VENEER_LIBRARY_INDEX=postgresql://veneer:$postgres@postgres/veneer
AWS_ENDPOINT_URL=http://s3:9000
AWS_ACCESS_KEY_ID=veneer
AWS_SECRET_ACCESS_KEY=$s3
AWS_DEFAULT_REGION=us-east-1
END
echo "VENEER_TENANTS=postgresql://veneer:$postgres@postgres/veneer" > secrets/tenants.env
cat > secrets/door.env <<END
VENEER_REDIS_URL=redis://redis:6379/0
VENEER_UPSTREAM_KEY=$engine
VENEER_ADMIN_KEY_HASH=sha256:$(printf %s "$admin" | sha256sum | cut -d ' ' -f 1)
END
# Containers run as user 1000, and Docker mounts secrets with the permissions of their files.
chmod 444 secrets/postgres secrets/s3_user secrets/s3_password secrets/engine_keys secrets/admin_key
chmod 711 secrets
echo "admin key, for the Studio and veneer tenant: $admin"
