#!/usr/bin/env bash
# test.sh [STAGE...]: every test there is, or the named stages; at the end a table, and as the last line the numbers.
#
# One stage that fails stops no other. The exit code is 0 if nothing failed; with CI=true, a stage that lacks something the
# prerequisites should have brought counts as failed too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/kubernetes/lib.sh"

all=(format lints docs licences scripts unit fuzz chart build cluster resolver e2e)
log_directory=$target/test
cluster=$here/cluster
rows=() problems=()
passed=0 failed=0 skipped=0 missing=0

usage() {
    sed -n '2,5s/^# \?//p' "${BASH_SOURCE[0]}"
    echo "stages: ${all[*]}"
}

# Each stage is a function, whose commands are joined by && (errexit is off in it). One that lacks a tool says so and returns
# this.
readonly LACKS=77

format() {
    cargo fmt --all --check && gofmt_clean
}

gofmt_clean() {
    local unformatted
    unformatted=$(gofmt -l tests/kubernetes/tools)
    [[ -z $unformatted ]] || { echo "gofmt would change $unformatted"; return 1; }
}

lints() {
    cargo clippy --workspace --all-targets -- --deny warnings &&
        (cd tests/kubernetes && go vet ./tools/...)
}

docs() {
    RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps
}

# Terms and sources of every dependency. cargo-deny is built the first time, about four minutes.
licences() {
    local deny=$target/tools/bin/cargo-deny
    [[ -x $deny ]] || cargo install --quiet --locked --root "$target/tools" cargo-deny --version 0.20.2 &&
        "$deny" check licenses bans sources
}

scripts() {
    command -v shellcheck >/dev/null || { echo "shellcheck is not installed"; return "$LACKS"; }
    local files
    mapfile -t files < <(git ls-files -c -o --exclude-standard '*.sh')
    shellcheck "${files[@]}" "$cluster" "$here/config/runc-without-nftables" .ci/run
}

# Always the whole workspace, so that dependencies are built once, with one set of features.
rust_tests() {
    cargo test --workspace --no-fail-fast "$@"
}

# rust_tests_twice STAGE [OPTION...]: what fails is run once more, by itself: many tests hold seconds against a machine that other
# things run on too. What passes only then is named at the end, and is a defect of tpd or of the test; more than a few are no
# accident.
rust_tests_twice() {
    local log=$log_directory/$1.log again
    shift
    rust_tests "$@" && return
    # The log is written by another process.
    sleep 1
    mapfile -t again < <(failed_tests "$log")
    ((${#again[@]} > 0 && ${#again[@]} <= 5)) && tells_all "$log" "${#again[@]}" || return 1
    printf '\n%s %s\n' "$ONCE_MORE" "${again[*]}"
    rust_tests "$@" --exact "${again[@]}"
}

unit() {
    rust_tests_twice unit --exclude tpd-tests -- &&
        (cd tests/kubernetes && go test -trimpath ./tools/...)
}

# libFuzzer is built the first time, about a minute.
fuzz() {
    tests/fuzz.sh
}

# Helm itself is built from Go modules the first time, about two minutes.
chart() {
    rust_tests --test chart
}

build() {
    make --no-print-directory build images
}

cluster() {
    need_root
    "$cluster" up
}

resolver() {
    need_root
    rust_tests_twice resolver --test resolver -- --test-threads=1
}

e2e() {
    need_root
    rust_tests_twice e2e --test e2e -- --test-threads=1
}

# Begins the line that stands in a log before the second run of what failed in the first.
readonly ONCE_MORE="== once more, by themselves:"

# failed_tests LOG: names of the tests that failed, as the Rust test runner lists them before each result.
failed_tests() {
    awk '/^failures:$/ { names = "" }
        /^    [a-z0-9_:]+$/ { names = names $1 "\n" }
        /^test result: FAILED/ { printf "%s", names }' "$1" | sort -u
}

# tells_all LOG COUNT: whether so many names are all that failed: no documentation's test, no runner that broke off, no two of a name.
tells_all() {
    local targets runners failed
    targets=$(sed -n 's/^error: \([0-9]\+\) targets\? failed:.*/\1/p' "$1")
    runners=$(grep -c '^test result: FAILED' "$1" || true)
    read -r _ failed _ < <(count_results "$1")
    [[ $targets == "$runners" && $failed == "$2" ]]
}

# count_results LOG: passed, failed and ignored of every Rust test runner in it; of what was run once more, the second time counts.
count_results() {
    awk -v once_more="$ONCE_MORE" 'index($0, once_more) == 1 { f = 0 }
        /^test result:/ { for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) p += $(i-1); if ($i ~ /^failed;/) f += $(i-1)
        if ($i ~ /^ignored/) s += $(i-1) } } END { print p + 0, f + 0, s + 0 }' "$1"
}

# A stage without a test runner is one test; one whose runner did not get to run has failed.
run_stage() {
    local name=$1 log=$log_directory/$1.log began=$EPOCHREALTIME status=0 p f s
    printf '\n== %s\n' "$name"
    ("$name") 2>&1 | tee "$log" || status=${PIPESTATUS[0]}
    read -r p f s < <(count_results "$log")
    if ((status == LACKS)); then
        s=$((s + 1))
        problems+=("$name was skipped: $(tail -1 "$log")")
        missing=$((missing + 1))
    elif ((p + f + s == 0 || (status != 0 && f == 0))); then
        if ((status == 0)); then p=$((p + 1)); else f=$((f + 1)); fi
    fi
    ((f == 0)) || problems+=("$name failed; its output is in ${log#"$root/"}$(failures "$log")")
    if ((f == 0)) && grep -q "^$ONCE_MORE" "$log"; then
        problems+=("$name: these failed, and passed by themselves; ${log#"$root/"} says why$(failures "$log")")
    fi
    rows+=("$(printf '%-10s %7d %7d %8d %8s s' "$name" "$p" "$f" "$s" "$(elapsed "$began")")")
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
}

# What failed in a log: each test with what it said, without the way there; or, if no test says so, how the log ends.
failures() {
    awk '/^---- .* stdout ----$/ { test = $2; lines = 0; printf "\n    %s\n", test; found = 1; next }
        /^(stack backtrace:|note: run with|failures:)/ { test = "" }
        test != "" && NF && ++lines <= 30 { print "        " $0 }
        END { exit !found }' "$1" || { echo; tail -n 20 "$1" | sed 's/^/    /'; }
}

summary() {
    local line
    printf '\n%-10s %7s %7s %8s %10s\n' stage passed failed skipped time
    printf '%s\n' "${rows[@]}"
    printf 'all of it took %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
    for line in "${problems[@]}"; do
        printf '\n%s\n' "$line"
    done
    printf '\n%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
}

# `cluster up` gives a cluster that was there already back as it was: running.
put_back() {
    [[ -n $was_running ]] || "$cluster" down >/dev/null || problems+=("the cluster could not be taken down")
}

cd "$root"
export PATH=$PATH:$HOME/.cargo/bin CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}
stages=("$@")
((${#stages[@]})) || stages=("${all[@]}")
for stage in "${stages[@]}"; do
    [[ " ${all[*]} " == *" $stage "* ]] || { usage >&2; exit 64; }
done
mkdir -p "$log_directory"
was_running=
[[ ! -e $run/complete ]] || was_running=yes

"$here/prerequisites.sh"
for stage in "${stages[@]}"; do
    run_stage "$stage"
done
put_back
summary
((failed == 0)) && [[ ${CI:-} != true || $missing == 0 ]]
