# shellcheck shell=bash
# Sourced by scripts that take single programs out of Debian's packages, beside cache.sh. Nothing is installed: the system
# keeps the versions that it has, and the programs are the same ones everywhere.

# extract_packages SUITE TAR PACKAGE...: the files of packages and of all that they depend on
extract_packages() {
    local suite=$1 tar=$2
    shift 2
    # A mirror that lags behind is as good.
    mmdebstrap --quiet --mode=root --variant=extract --format=tar \
        --aptopt='APT::Install-Recommends "false"' \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --include="$(tr ' ' , <<<"$*")" "$suite" "$tar"
}

# copy_programs ROOT LIB PROGRAM...: programs of an unpacked Debian to one directory, with their libraries and the loader
# that fits these
copy_programs() {
    local libraries=$1/usr/lib/x86_64-linux-gnu lib=$2 loader program
    loader=$libraries/ld-linux-x86-64.so.2
    cp "$loader" "$lib/"
    for program in "${@:3}"; do
        cp "$1/usr/bin/$program" "$lib/"
        # LIBRARY => FILE (ADDRESS)
        "$loader" --library-path "$libraries" --list "$lib/$program" |
            awk -v from="$libraries/" 'index($3, from) == 1 {print $3}'
    done | sort -u | xargs cp --target-directory "$lib"
}

# write_wrapper FILE PROGRAM [OPTION...]: runs PROGRAM of ../lib with what lies beside it there, wherever that is
write_wrapper() {
    cat >"$1" <<END
#!/bin/sh
lib=\${0%/*}/../lib
exec "\$lib/ld-linux-x86-64.so.2" --library-path "\$lib" "\$lib/$2"${3:+ ${*:3}} "\$@"
END
    chmod +x "$1"
}
