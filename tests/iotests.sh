#!/bin/bash
# QEMU's own iotests that use internal snapshots, with our tool in the place of "qemu-img
# snapshot": each test runs once with the qemu-img of this machine and once with a link to the
# tool as QEMU_IMG_PROG, and the two must say the same.
#
#   QEMU_SRC=/path/to/qemu tests/iotests.sh [TEST...]
#
# QEMU_SRC is a QEMU checkout; nothing of it is copied into this tree. The tests need not fit the
# version of the qemu-img here: what counts is that both runs have the same result and, where a test
# fails in both, the same output. Prints a table in Markdown; exit 1 when the runs differ.
# TOOL is the program to test (built by cargo if not given); OUT keeps the outputs.
set -u
cd "$(dirname "$0")/.." || exit 1
TESTS=${*:-014 015 029 058 060 061 062 066 080 103 112 153 176 178 217 244 261 267 271 286 \
    qcow2-internal-snapshots}

if [ ! -x "${QEMU_SRC:-}/tests/qemu-iotests/check" ]; then
    echo "SKIPPED: QEMU's iotests: QEMU_SRC does not name a QEMU checkout"
    exit 0
fi
for program in qemu-img qemu-io qemu-nbd qemu-storage-daemon qemu-system-x86_64; do
    command -v $program > /dev/null || {
        echo "SKIPPED: QEMU's iotests: no $program here (Debian: qemu-utils, qemu-system-x86)"
        exit 0
    }
done
if [ -z "${TOOL:-}" ]; then
    cargo build --quiet --release -p qcow2-snapshot-tool || exit 1
    TOOL=${CARGO_TARGET_DIR:-target}/release/qcow2-snapshot
fi
OUT=${OUT:-$(mktemp -d /tmp/qcow2-snapshot-iotests.XXXXXX)}
mkdir -p "$OUT/link"
ln -sf "$(readlink -f "$TOOL")" "$OUT/link/qemu-img"
plain=$(command -v qemu-img)

# The tests start QEMU without a guest, by "-accel qtest". Some distributions do not build that
# accelerator; then a guest that is never started (-S) on TCG serves as well for snapshots.
qemu=$(command -v qemu-system-x86_64)
if ! $qemu -accel help | grep -q qtest; then
    cat > "$OUT/qemu-system-x86_64" <<END
#!/bin/bash
words=() stopped=
for word; do
    [ "\$word" != qtest ] || { word=tcg; stopped=-S; }
    words+=("\$word")
done
exec "$qemu" "\${words[@]}" \$stopped
END
    chmod +x "$OUT/qemu-system-x86_64"
    qemu=$OUT/qemu-system-x86_64
fi
export QEMU_PROG=$qemu QEMU_IO_PROG QEMU_NBD_PROG QSD_PROG
QEMU_IO_PROG=$(command -v qemu-io)
QEMU_NBD_PROG=$(command -v qemu-nbd)
QSD_PROG=$(command -v qemu-storage-daemon)

# run SIDE PROGRAM TEST: prints pass, fail or "not run: WHY"; the output stays in $OUT/SIDE.
run() {
    local side=$1 name=${3##*/} log
    log=$OUT/$side/$name.log
    mkdir -p "$OUT/$side"
    # Both sides in one place, so that no path in an output differs.
    rm -rf "$OUT/scratch" "$OUT/sock"
    (cd "$QEMU_SRC/tests/qemu-iotests" || exit 1
        QEMU_IMG_PROG=$2 TEST_DIR=$OUT/scratch SOCK_DIR=$OUT/sock \
            PATH="$(dirname "$plain"):$PATH" \
            timeout 300 ./check -qcow2 "$3") > "$log" 2>&1
    find "$OUT/scratch" -name '*.out.bad' -exec cp {} "$OUT/$side/$name.out" \; 2> /dev/null
    if grep -q '^Passed all 1' "$log"; then
        echo pass
    elif grep -q '^Not run:' "$log"; then
        echo "not run: $(sed -n "s/.*not run *//p" "$log" | sed 's/^\[[^]]*\] *//; s/^[. ]*//' | head -n 1)"
    else
        echo fail
    fi
}

bad=0
echo '| test | plain qemu-img | with the link | same |'
echo '|---|---|---|---|'
for test in $TESTS; do
    name=${test##*/}
    with=$(run link "$OUT/link/qemu-img" "$test")
    without=$(run plain "$plain" "$test")
    same=yes
    if [ "$with" != "$without" ]; then
        same=NO
    elif [ "$with" = fail ] && ! cmp -s "$OUT/link/$name.out" "$OUT/plain/$name.out"; then
        same='NO (other output)'
    elif [ "$with" = fail ]; then
        same='yes, to the byte'
    fi
    # Agreed: QEMU leaks the clusters of a create that fails, and 112 counts them.
    [ "$name/$same" = 112/NO ] && same='NO (agreed)'
    [[ $same == NO* && $same != *agreed* ]] && bad=1
    echo "| $name | $without | $with | $same |"
done
echo
echo "Outputs: $OUT"
exit $bad
