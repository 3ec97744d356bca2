#!/usr/bin/env bash
# The node's init: pid 1 of its own pid, mount, UTS and network namespaces. When it ends, all that runs on the node ends
# with it, containers and mounts included.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

node=$run/node

mounts() {
    mount --make-rprivate /
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /run
    mkdir -p "$node"/{lib,log,containerd,stopped}
    mount --bind "$node/lib" /var/lib
    mount --bind "$node/log" /var/log
    keep_sysctls
    # Volumes that the kubelet mounts have to appear in containers that already run.
    mount --make-rshared /
}

# The kubelet writes sysctls that belong to the whole machine. It gets files that already hold what it wants.
keep_sysctls() {
    local setting path
    mkdir -p "$node/sysctls"
    for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
        kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
        path=${setting%=*}
        echo "${setting#*=}" >"$node/sysctls/${path//\//.}"
        mount --bind "$node/sysctls/${path//\//.}" "/proc/sys/$path"
    done
}

configure() {
    local file
    hostname node
    for file in containerd.toml kubelet.yaml kube-proxy.yaml; do
        render "$here/config/$file" >"$node/$file"
    done
    # What pods with dnsPolicy Default see, CoreDNS among them.
    printf 'nameserver %s\nnameserver %s\n' "$WAN_NODE4" "$WAN_NODE6" >"$node/resolv.conf"
}

# supervise NAME COMMAND...: restarts it when it ends, unless $node/stopped/NAME exists (`cluster stop NAME`).
supervise() {
    local name=$1
    shift
    while true; do
        if [[ ! -e $node/stopped/$name ]]; then
            "$@" >>"$run/log/$name.log" 2>&1 &
            echo $! >"$node/$name.pid"
            wait $! || echo "$name ended with status $?" >>"$run/log/$name.log"
        fi
        sleep 0.5
    done
}

api_server() {
    local pki=$run/pki
    supervise kube-apiserver kube-apiserver \
        --advertise-address="$NODE4" \
        --allow-privileged=true \
        --authorization-mode=Node,RBAC \
        --client-ca-file="$pki/ca.crt" \
        --enable-admission-plugins=NodeRestriction \
        --etcd-servers=http://127.0.0.1:2379 \
        --kubelet-client-certificate="$pki/apiserver-kubelet-client.crt" \
        --kubelet-client-key="$pki/apiserver-kubelet-client.key" \
        --kubelet-preferred-address-types=InternalIP \
        --proxy-client-cert-file="$pki/front-proxy-client.crt" \
        --proxy-client-key-file="$pki/front-proxy-client.key" \
        --requestheader-allowed-names=front-proxy-client \
        --requestheader-client-ca-file="$pki/front-proxy-ca.crt" \
        --requestheader-extra-headers-prefix=X-Remote-Extra- \
        --requestheader-group-headers=X-Remote-Group \
        --requestheader-username-headers=X-Remote-User \
        --service-account-issuer=https://kubernetes.default.svc.cluster.local \
        --service-account-key-file="$pki/service-account.pub" \
        --service-account-signing-key-file="$pki/service-account.key" \
        --service-cluster-ip-range="$SERVICE_CIDRS" \
        --tls-cert-file="$pki/apiserver.crt" \
        --tls-private-key-file="$pki/apiserver.key"
}

controller_manager() {
    supervise kube-controller-manager kube-controller-manager \
        --kubeconfig="$run/kube-controller-manager.kubeconfig" \
        --allocate-node-cidrs=true \
        --cluster-cidr="$POD_CIDRS" --node-cidr-mask-size-ipv4=20 \
        --cluster-signing-cert-file="$run/pki/ca.crt" \
        --cluster-signing-key-file="$run/pki/ca.key" \
        --horizontal-pod-autoscaler-sync-period=2s \
        --leader-elect=false \
        --node-monitor-period=2s \
        --root-ca-file="$run/pki/ca.crt" \
        --service-account-private-key-file="$run/pki/service-account.key" \
        --service-cluster-ip-range="$SERVICE_CIDRS" \
        --use-service-account-credentials=true
}

api_server_ready() {
    curl -fsk --max-time 2 https://127.0.0.1:6443/readyz
}

mounts
configure
supervise containerd containerd --config "$node/containerd.toml" &
supervise etcd etcd --unsafe-no-fsync --data-dir="$node/etcd" --log-level=warn \
    --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 &
api_server &
until api_server_ready >/dev/null 2>&1; do sleep 0.1; done
controller_manager &
supervise kube-scheduler kube-scheduler --kubeconfig="$run/kube-scheduler.kubeconfig" --leader-elect=false &
supervise kubelet kubelet --config="$node/kubelet.yaml" --kubeconfig="$run/kubelet.kubeconfig" \
    --hostname-override=node --node-ip="$NODE4,$NODE6" &
supervise kube-proxy kube-proxy --config="$node/kube-proxy.yaml" --hostname-override=node &
wait
