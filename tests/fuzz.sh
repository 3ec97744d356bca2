#!/usr/bin/env bash
# fuzz.sh [SECONDS [TARGET...]]: builds the fuzz targets, and runs every one of them, or the named ones, for so long (5 s).
#
# It begins with the inputs in fuzz/seeds and what earlier runs have found interesting, in target/fuzz/corpus. An input that
# breaks something is kept in target/fuzz, and the last lines say which.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kubernetes/lib.sh"

# What cargo-fuzz has the compiler do where there is no sanitizer. Coverage is LLVM's own, so that the stable compiler has it;
# sanitizers, which need another one, would look for errors that safe code does not have.
coverage=(
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
)

build() {
    # With --target, the flags are for the targets alone, and not for what runs at build time.
    RUSTFLAGS=${coverage[*]} cargo build --manifest-path fuzz/Cargo.toml --target "$host" --target-dir "$target/fuzz"
}

# Targets must answer within 5 s, and keep to 2 GiB, libFuzzer's own limit. Its own exit code for errors, 77, means to test.sh that
# a tool is lacking.
run() {
    local name=$1 corpus=$target/fuzz/corpus/$1
    mkdir -p "$corpus"
    "$target/fuzz/$host/debug/$name" -max_total_time="$seconds" -timeout=5 -error_exitcode=1 \
        -verbosity=0 -print_funcs=0 -print_final_stats=1 -artifact_prefix="$target/fuzz/$name-" \
        "$corpus" "fuzz/seeds/$name" 2>&1 |
        sed '/Recommended dictionary/,/End of recommended/d'
}

cd "$root/tests"
export PATH=$PATH:$HOME/.cargo/bin
host=$(rustc -vV | sed -n 's/^host: //p')
seconds=${1:-5}
targets=("${@:2}")
if ((${#targets[@]} == 0)); then
    mapfile -t targets < <(basename -s .rs fuzz/fuzz_targets/*.rs)
fi
build
for name in "${targets[@]}"; do
    say "$name for $seconds s"
    run "$name"
done
