#!/usr/bin/env bash
# Runs helm with the given arguments, built from Go modules into target/tools/ the first time (about two minutes).
# HELM=/path/to/helm uses another one.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
helm=${HELM:-$root/target/tools/helm}
if [[ ! -x $helm || (-z ${HELM:-} && $root/deploy/helm/go.sum -nt $helm) ]]; then
    export PATH=$PATH:/usr/local/go/bin
    command -v go >/dev/null || { echo "error: there is neither helm nor go; install one, or set HELM" >&2; exit 1; }
    mkdir -p "$(dirname "$helm")"
    (cd "$root/deploy/helm" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$helm" helm.sh/helm/v4/cmd/helm)
fi
# It neither reads nor writes the user's own configuration.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
HELM_CACHE_HOME=$scratch HELM_CONFIG_HOME=$scratch HELM_DATA_HOME=$scratch "$helm" "$@"
