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
log() { echo "${program##*/tests/}: $*" >&2; }
fail() { log "$*"; exit 1; }

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
            "$builder" "$directory.unfinished" {lock}>&- >&2
            mv "$directory.unfinished" "$directory"
            find "$kind_directory" -mindepth 1 -maxdepth 1 -mtime +"$days_unused_things_are_kept" \
                -exec rm -rf {} +
        fi
        exec {lock}>&-
    fi
    touch "$directory"
    echo "$directory"
}

# install_packages COMMAND=PACKAGE...: installs the Debian packages whose command is missing.
# Where Debian 12's own versions do not fit what is installed already, those of its backports do.
install_packages() {
    local pair missing=()
    for pair; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    log "installing ${missing[*]}"
    [ "$(id -u)" = 0 ] || fail "needs root to install ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    {
        apt-get update -q || true
        apt-get install -q -y --no-install-recommends "${missing[@]}" ||
            install_from_backports "${missing[@]}"
    } >&2
}

install_from_backports() {
    local mirror
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)
    [ -n "$mirror" ] || fail "cannot install $*, and this is no Debian 12 whose backports could help"
    log "installing $* from bookworm-backports"
    echo "deb $mirror bookworm-backports main" >/etc/apt/sources.list.d/katana-backports.list
    apt-get update -q
    apt-get install -q -y --no-install-recommends -t bookworm-backports "$@"
}
