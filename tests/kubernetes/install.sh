#!/usr/bin/env bash
# Installs tpd into the local cluster as an administrator would, and gives its role to the developers (group tpd-developers).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/Cargo.toml" | head -1)
image=tpd/manager:$version
agent=tpd/agent:$version

image_id() {
    in_node ctr --namespace k8s.io images list "name==docker.io/$image" | awk 'NR == 2 { print $3 }'
}

# The tag stays the same while the code changes, so pods of an older build have to be told.
replace_old_managers() {
    admin --namespace tpd-system get statefulset tpd-manager >/dev/null 2>&1 || return 0
    admin --namespace tpd-system rollout restart statefulset tpd-manager
}

before=$(image_id)
"$here/images.sh" import "$images/tpd-manager.tar"
"$here/images.sh" import "$images/tpd-agent.tar"
if [[ -n $before && $before != "$(image_id)" ]]; then
    replace_old_managers
fi
KUBECONFIG=$run/admin.kubeconfig "$here/laptop.sh" -- tpd install --image "$image" \
    --agent-image "$agent" --developers-group tpd-developers "$@"
