#!/usr/bin/env python3
"""pack.py TARGET FOLDER [BYTES]: a minimised corpus as packed/TARGET.gz, the smallest inputs first,
up to so many bytes (default 250000). Each input stands behind its length, four bytes, big endian."""
import gzip, os, sys, zlib

target, folder, limit = sys.argv[1], sys.argv[2], int((sys.argv + [250000])[3])
here = os.path.dirname(os.path.abspath(__file__))
inputs = sorted((open(os.path.join(folder, n), 'rb').read() for n in os.listdir(folder)), key=lambda b: (len(b), b))
packer, out, kept = zlib.compressobj(9, zlib.DEFLATED, 31), [], 0
for data in inputs:
    out.append(packer.compress(len(data).to_bytes(4, 'big') + data) + packer.flush(zlib.Z_SYNC_FLUSH))
    kept += 1
    if sum(map(len, out)) > limit:
        break
os.makedirs(here + '/packed', exist_ok=True)
with open(here + '/packed/%s.gz' % target, 'wb') as f:
    f.write(b''.join(out) + packer.flush())
print('%s: %d of %d inputs, %d bytes' % (target, kept, len(inputs), sum(map(len, out))))
