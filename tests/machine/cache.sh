# shellcheck shell=bash
# Sourced by scripts that build large things once and keep them.
#
#   $KATANA_CACHE/KIND/KEY/    a finished thing; KEY is a hash of everything it was made from
#
# KATANA_CACHE is ~/.cache/katana unless the environment says otherwise.

shopt -s inherit_errexit
KATANA_CACHE=${KATANA_CACHE:-$HOME/.cache/katana}
days_unused_things_are_kept=3

program=$(realpath "$0")
exec {log_to}>&2

# log TEXT: what is being done now. On a terminal it is one line that the next one replaces.
log() {
    local text="${program##*/tests/}: $*"
    if [ -t "$log_to" ]; then printf '\r\e[K%s' "$text"; else echo "$text"; fi >&"$log_to"
}

# log_end: after the last of the lines that replace each other
log_end() { [ ! -t "$log_to" ] || printf '\r\e[K' >&"$log_to"; }

fail() {
    log_end
    echo "${program##*/tests/}: $*" >&"$log_to"
    exit 1
}

# quietly LOG COMMAND...: what COMMAND says is kept in a file, and shown when COMMAND fails. In a condition, bash ignores
# `set -e` within COMMAND, too.
quietly() {
    local log=$1 code
    shift
    set +e
    (set -e; "$@") >"$log" 2>&1
    code=$?
    set -e
    if [ $code != 0 ]; then
        log_end
        tail -n 30 "$log" >&"$log_to"
        echo "${program##*/tests/}: failed; all that was said is in $log" >&"$log_to"
    fi
    return $code
}

# hash_of PATH...: one short hash of the names and contents of files (below directories, too) and of standard input
hash_of() {
    { find "$@" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; cat; } | sha256sum | cut -c 1-16
}

# cached KIND KEY BUILDER: prints the directory of that thing; `BUILDER DIRECTORY` fills it when it is not there yet.
# Half-built things carry another name, so a directory that exists is complete.
cached() {
    local kind_directory=$KATANA_CACHE/$1 directory=$KATANA_CACHE/$1/$2 builder=$3 lock
    if [ ! -d "$directory" ]; then
        mkdir -p "$kind_directory"
        exec {lock}>"$kind_directory/.lock"
        flock "$lock"
        if [ ! -d "$directory" ]; then
            # The lock is ours: whatever is half-built was left by somebody who died.
            rm -rf "$kind_directory"/*.unfinished
            mkdir "$directory.unfinished"
            quietly "$kind_directory/build.log" without_lock "$builder" "$directory.unfinished"
            log_end
            mv "$directory.unfinished" "$directory"
            find "$kind_directory" -mindepth 1 -maxdepth 1 -mtime +"$days_unused_things_are_kept" \
                -exec rm -rf {} +
        fi
        exec {lock}>&-
    fi
    touch "$directory"
    echo "$directory"
}

# In the subshell of `quietly`: what a builder leaves running when it is killed does not hold the lock.
without_lock() {
    exec {lock}>&-
    "$@"
}

# install_packages COMMAND=PACKAGE...: installs the Debian packages whose command is missing. What is installed stays as it
# is: packages that would take another one away are not installed.
install_packages() {
    local pair missing=()
    for pair; do
        has_command "${pair%%=*}" || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || fail "needs root to install ${missing[*]}"
    log "installing ${missing[*]}"
    mkdir -p "$KATANA_CACHE"
    quietly "$KATANA_CACHE/apt.log" apt_install "${missing[@]}" ||
        fail "cannot install ${missing[*]} beside what is installed"
    log_end
    for pair; do
        has_command "${pair%%=*}" || fail "there is no ${pair%%=*}, though ${pair#*=} is installed"
    done
}

apt_install() {
    apt-get update -q || true
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends --no-remove "$@"
}

has_command() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
