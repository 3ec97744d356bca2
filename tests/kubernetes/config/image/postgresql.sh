#!/bin/sh
# A throw-away database that trusts everybody: for tests only.
set -eu
PATH=/usr/lib/postgresql/15/bin:$PATH
PGDATA=${PGDATA:-/tmp/postgresql}
export PATH PGDATA TZ=UTC
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    initdb --no-sync --no-locale --encoding UTF8 --auth trust --username postgres >/dev/null
    echo 'host all all all trust' >>"$PGDATA/pg_hba.conf"
fi
exec postgres -c listen_addresses='*' -c unix_socket_directories=/tmp -c fsync=off -c timezone=UTC -c log_timezone=UTC
