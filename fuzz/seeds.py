#!/usr/bin/env python3
"""seeds.py FOLDER: the small reference images, each with some programs, as fuzzer inputs."""
import glob, gzip, os, sys

out = sys.argv[1]
os.makedirs(out, exist_ok=True)
here = os.path.dirname(os.path.abspath(__file__))
# Flags, steps - 1, then (verb, argument) pairs; see src/verbs.rs.
PROGRAMS = [
    [0, 0, 0, 0x20], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 6, 0], [0, 3, 0, 0, 2, 1, 4, 0, 0, 0x11],
    [0, 3, 3, 1, 5, 1, 2, 0, 0, 0], [1, 3, 8 + 0, 9, 2, 2, 4, 2, 6, 0], [2, 3, 0xc8, 3, 0, 0, 2, 0, 4, 0],
]
n = 0
for path in sorted(glob.glob(here + '/../c-tests/images/*/*.qcow2.gz')):
    if os.path.basename(path) not in ('before.qcow2.gz', 'after-4.qcow2.gz'):
        continue
    image = gzip.open(path).read()
    if image[:4] != b'QFI\xfb' or len(image) > (64 << 10):
        continue
    for i, program in enumerate(PROGRAMS):
        if len(image) > (20 << 10) and i % 2:
            continue
        head = bytes(program + [0] * (16 - len(program)))
        name = '%s-%s-%d' % (path.split('/')[-2], os.path.basename(path)[:7].strip('.-'), i)
        with open(os.path.join(out, name), 'wb') as f:
            f.write(head + image)
        n += 1
print(n, 'seeds')
