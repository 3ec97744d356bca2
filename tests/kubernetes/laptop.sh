#!/usr/bin/env bash
# laptop.sh [laptop2] [-- COMMAND...]: runs a command, or a shell, on a laptop, with its developer's kubeconfig unless
# KUBECONFIG is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_root
name=laptop ns=$LAPTOP_NS developer=developer
if [[ ${1-} == laptop2 ]]; then
    name=laptop2 ns=$LAPTOP2_NS developer=developer2
    shift
fi
pid=$(init_of "$ns") || fail "the $name is not running: tests/kubernetes/cluster up"
export KUBECONFIG=${KUBECONFIG:-$run/$developer.kubeconfig}
export PATH=$target/release:$PATH
[[ ${1-} != -- ]] || shift
if (($# == 0)); then
    echo "You are root on the $name; KUBECONFIG is $KUBECONFIG. Leave with exit."
    set -- env PS1="$name:\w# " bash --norc -i
fi
# exec all the way down, so that a signal to this process is one to the command.
exec nsenter --target "$pid" --mount --uts --net -- env -u TPD_BEGAN -C "$PWD" "$@"
