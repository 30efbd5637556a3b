#!/bin/bash
# Two builds of the committed tree in two folders give equal files, which name no folder of this machine.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for folder in one another-with-a-longer-name; do
    git clone -q . "$scratch/$folder"
    env -u CARGO_TARGET_DIR "${MAKE:-make}" -s -C "$scratch/$folder" all
done
for file in libqcow2_snapshot.so libqcow2_snapshot.a qcow2-snapshot qcow2_snapshot.pc; do
    cmp "$scratch/one/build/$file" "$scratch/another-with-a-longer-name/build/$file"
    for folder in "$scratch" "$HOME/.cargo" "$HOME/.rustup"; do
        ! grep -qaF "$folder" "$scratch/one/build/$file" || { echo "$file names $folder"; exit 1; }
    done
done
echo 'two builds in two folders are equal'
