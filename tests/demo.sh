#!/usr/bin/env bash
# Boots a local Kubernetes, installs tpd into it, uses it from a laptop that has no other way to pods and Services, and has
# production's traffic come to that laptop while an autoscaler changes the pods under it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kubernetes/lib.sh"

cluster=$here/cluster

# The Ingress controller's port of the node, as it is reached from outside the cluster.
INGRESS=http://$NODE4:30081/

title() {
    printf '\n== %s\n' "$*"
}

# Prints a command as one would type it on the laptop.
prompt() {
    local word line=
    for word in "$@"; do
        [[ $word != *\ * ]] || word="\"$word\""
        line+=" $word"
    done
    printf '\nlaptop#%s\n' "$line"
}

# Shows a command, runs it on the laptop and times it.
laptop() {
    local began=$EPOCHREALTIME
    prompt "$@"
    "$cluster" laptop -- "$@"
    printf '        (%s s)\n' "$(elapsed "$began")"
}

# The reverse: it has to fail.
laptop_cannot() {
    prompt "$@"
    if "$cluster" laptop -- "$@"; then
        fail "this should not have worked without tpd: $*"
    fi
}

# Ends what the demo has started, the local process too.
disconnect() {
    [[ -z ${local_process-} ]] || kill "$local_process" 2>/dev/null || true
    rm -f "$run/demo-load"
    "$cluster" laptop -- tpd down >/dev/null 2>&1 || true
}

# What a customer's browser does: a request to the Ingress, from outside the cluster.
customer() {
    in_net "$WAN_NS" curl --silent --show-error --fail --max-time 5 --header "Host: store.example" "$INGRESS"
}

# The process that is being developed: it listens on the laptop only, and answers with its own name.
start_local_process() {
    prompt tpd-echo http -name laptop 127.0.0.1:9090 "&"
    "$cluster" laptop -- tpd-echo http -name laptop 127.0.0.1:9090 &
    local_process=$!
    await 5 "it listens" "$cluster" laptop -- curl --silent --fail http://127.0.0.1:9090/healthz
}

# autoscale REPLICAS: through the HorizontalPodAutoscaler, as load would.
autoscale() {
    admin --namespace store patch hpa web --type=merge \
        --patch "{ \"spec\": { \"minReplicas\": $1, \"maxReplicas\": $1 } }" >/dev/null
    await 60 "the autoscaler has scaled the Deployment to $1" replicas_are "$1"
}

replicas_are() {
    [[ $(admin --namespace store get deployment web -o jsonpath='{.status.replicas} {.status.readyReplicas}') == "$1 $1" ]]
}

# Connections that the Ingress has opened straight to the apps, while their agents had nothing to do, stay there until they are
# closed; those that are not used are, after some seconds.
none_is_older() {
    [[ $("$cluster" laptop -- tpd status -o json | jq '[.intercepts[].status.pods[]?.stragglers // 0] | add') == 0 ]]
}

# Customers, all the while: 8 kept-alive connections through the Ingress, one request in ten with the header x-intercept: dev.
start_customers() {
    touch "$run/demo-load"
    in_net "$WAN_NS" tpd-echo load -connections 8 -rate 400 -seconds 120 -while "$run/demo-load" \
        -header Host=store.example -mark x-intercept=dev "$INGRESS" >"$run/demo-load.json" &
    customers=$!
}

# end_customers: prints what became of their requests, and fails if one failed.
end_customers() {
    rm "$run/demo-load"
    wait "$customers"
    jq --raw-output '"\(.requests) requests, \(.failed) failed",
        "  with x-intercept: dev, answered by  \(.marked | to_entries | map("\(.key) (\(.value))") | join(", "))",
        "  without it, answered by             \(.unmarked | to_entries | map("\(.key) (\(.value))") | join(", "))"' "$run/demo-load.json"
    [[ $(jq .failed "$run/demo-load.json") == 0 ]] || fail "a customer's request failed"
}

need_root
cd "$root"
stage "packages and toolchains" "$here/prerequisites.sh"
stage "tpd's command line" make --no-print-directory build
stage "tpd's image" make --no-print-directory images
stage "the local Kubernetes" "$cluster" up
stage "a shop to reach and a store to intercept, behind an Ingress" "$cluster" samples
stage "tpd, installed as an administrator would" "$here/install.sh"
trap disconnect EXIT
disconnect

export PGCONNECT_TIMEOUT=5 PAGER=cat
title "Before: the laptop knows neither the names nor the addresses of the cluster"
laptop_cannot curl --silent --show-error --max-time 3 http://web.shop

title "Connect, with a developer's kubeconfig that may do nothing but this"
laptop tpd up --namespace shop

title "Names resolve as they do in a pod"
laptop getent ahosts web
laptop dig +short web.shop.svc.cluster.local A web.shop.svc.cluster.local AAAA
laptop dig +short _http._tcp.ring.shop.svc.cluster.local SRV

title "Services and pods answer"
laptop curl --silent --show-error --max-time 5 http://web.shop
laptop psql --host db.shop --username postgres --command "select 'PostgreSQL in a pod' as hello, inet_server_addr()"
laptop ping -c 3 -i 0.2 ring-0.ring.shop

title "What is not the cluster's goes where it always went"
laptop dig +short www.example.com

title "How it is connected, and by which path"
laptop tpd status

title "Production: an Ingress, a Service, and three pods under an autoscaler"
autoscale 3
for _ in 1 2 3; do customer | jq --raw-output '"customer: answered by \(.server)"'; done

title "A process on the laptop, which nothing but the laptop reaches"
start_local_process

title "Intercept: all traffic of every pod comes to that process"
laptop tpd intercept web --namespace store --port 9090:http --yes
for _ in 1 2 3; do customer | jq --raw-output '"customer: answered by \(.server)"'; done

await 60 "connections from before the intercept are closed" none_is_older

title "Customers go on while the autoscaler goes from 3 pods to 4, 2 and 1"
start_customers
for replicas in 4 2 1; do autoscale "$replicas"; done
end_customers

title "Only requests with a header: one customer in ten"
autoscale 3
laptop tpd intercept web --namespace store --port 9090:http --header x-intercept=dev --yes
start_customers
sleep 3
end_customers
laptop tpd list

title "Leave: the pods serve again, and no request was lost"
start_customers
laptop tpd leave web --namespace store
sleep 1
end_customers
kill "$local_process"
local_process=

title "Disconnect: all is as before"
laptop tpd down
laptop_cannot curl --silent --show-error --max-time 3 http://web.shop
trap - EXIT

cat <<END

That was all of it, in $SECONDS s. The cluster is left running, so that the next run is quick:
  make laptop         a shell on that laptop, to try things by hand
  make cluster-down   takes the cluster down and leaves nothing behind

On your own cluster (Kubernetes 1.33 or newer) it is the same:
  make build images
  skopeo copy docker-archive:target/images/tpd-manager.tar docker://YOUR-REGISTRY/tpd-manager:0.1.0
  target/release/tpd install --image YOUR-REGISTRY/tpd-manager:0.1.0 --developers-group YOUR-DEVELOPERS
  sudo target/release/tpd up
  curl http://SERVICE.NAMESPACE
  target/release/tpd intercept DEPLOYMENT --port LOCAL_PORT --header x-intercept=dev
  sudo target/release/tpd down
END
