#!/usr/bin/env bash
# Makes the cluster's keys, certificates and kubeconfigs, anew at each boot.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

pki=$run/pki

key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$pki/$1.key" 2>/dev/null
}

# authority NAME
authority() {
    key "$1"
    openssl req -x509 -new -key "$pki/$1.key" -subj "/CN=tpd-test-$1" -days 365 -out "$pki/$1.crt" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign
}

# certificate NAME AUTHORITY SUBJECT USAGE [ALTERNATIVE_NAMES]
certificate() {
    key "$1"
    openssl req -new -key "$pki/$1.key" -subj "$3" |
        openssl x509 -req -CA "$pki/$2.crt" -CAkey "$pki/$2.key" -set_serial "0x$(openssl rand -hex 8)" -days 365 \
            -out "$pki/$1.crt" -extfile <(
                echo "keyUsage=critical,digitalSignature"
                echo "extendedKeyUsage=$4"
                [[ -z ${5-} ]] || echo "subjectAltName=$5"
            ) 2>/dev/null
}

# client NAME USER GROUP SERVER: a certificate and the kubeconfig that uses it.
client() {
    certificate "$1" ca "/O=$3/CN=$2" clientAuth
    kubeconfig "$2" "$4" "{ client-certificate-data: $(base64 -w0 "$pki/$1.crt"), client-key-data: $(base64 -w0 "$pki/$1.key") }" \
        >"$run/$1.kubeconfig"
}

# kubeconfig USER SERVER CREDENTIAL
kubeconfig() {
    # shellcheck disable=SC2034 # read by render
    local user=$1 server=$2 credential=$3 authority
    # shellcheck disable=SC2034
    authority=$(base64 -w0 "$pki/ca.crt")
    render "$here/config/kubeconfig.yaml"
}

make_all() {
    local inside=https://127.0.0.1:6443 outside=https://$NODE4:6443
    mkdir -p "$pki"
    authority ca
    authority front-proxy-ca
    key service-account
    openssl pkey -in "$pki/service-account.key" -pubout -out "$pki/service-account.pub"
    certificate apiserver ca /CN=kube-apiserver serverAuth \
        "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:$NODE4,IP:$NODE6,IP:$API_SERVICE4,IP:$API_SERVICE6"
    certificate apiserver-kubelet-client ca "/O=system:masters/CN=kube-apiserver-kubelet-client" clientAuth
    certificate front-proxy-client front-proxy-ca /CN=front-proxy-client clientAuth
    client kubelet system:node:node system:nodes "$inside"
    client kube-controller-manager system:kube-controller-manager system:kube-controller-manager "$inside"
    client kube-scheduler system:kube-scheduler system:kube-scheduler "$inside"
    client kube-proxy system:kube-proxy system:node-proxier "$inside"
    client admin admin system:masters "$outside"
    client developer dev tpd-developers "$outside"
    client developer2 dev2 tpd-developers "$outside"
}

# token NAMESPACE SERVICEACCOUNT [DURATION]: prints a kubeconfig that carries a fresh token of that account.
token() {
    local value
    value=$(admin create token --namespace "$1" "$2" --duration "${3:-1h}")
    kubeconfig "$2" "https://$NODE4:6443" "{ token: $value }"
}

case ${1-} in
    make) make_all ;;
    token) token "${@:2}" ;;
    *) fail "usage: pki.sh make | token NAMESPACE SERVICEACCOUNT [DURATION]" ;;
esac
