"""The images, what is done to them, and what they must mean then: a model of a few lines."""
import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections import namedtuple

# A state is the SHA-256 of its disk (of `export --all`: of all of them). `backing`: is there a backing file?
Meaning = namedtuple('Meaning', 'disk snapshots backing')


def run(*args, **more):
    return subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, **more).stdout


def make(folder):
    """Images with the snapshots s1 and s2, of different disks. Returns their names."""
    def image(name, options, size, writes, *create):
        path = os.path.join(folder, name)
        run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, *create, path, str(size))
        for n, step in enumerate(writes, 1):
            for what in step:
                run('qemu-io', '-f', 'qcow2', '-c', what, path)
            if n < len(writes):
                run('qemu-img', 'snapshot', '-c', f's{n}', path)
        return path

    def resize(name, size):
        run('qemu-img', 'resize', '-q', '-f', 'qcow2', os.path.join(folder, name), str(size))

    image('small.qcow2', 'cluster_size=64k', '4M',
          [['write -P 1 0 1M'], ['write -P 2 512k 1M'], ['write -P 3 256k 128k', 'write -z 1M 128k']])
    # 128 L2 tables, an L1 of two sectors, a refcount block for each 64 clusters: each verb needs more of them.
    image('many.qcow2', 'cluster_size=512,refcount_bits=64', '4M',
          [['write -P 1 0 4M'], ['write -P 2 100k 1M'], ['write -P 3 2M 300k']])
    image('wide.qcow2', 'cluster_size=16k,extended_l2=on,lazy_refcounts=on', '16M',
          [['write -P 1 3k 2M'], ['write -P 2 512 1k', 'write -P 2 8M 5k'], ['write -P 3 64k 10k', 'discard 1M 64k']])
    image('old.qcow2', 'cluster_size=4k,compat=0.10', '8M',
          [['write -c -P 1 0 1M', 'write -P 5 4M 1M'], ['write -P 2 32k 200k'], ['write -c -P 3 2M 100k']])
    # Disks of two sizes: L1 tables of 1 and 3 clusters. With a larger one there is no place for goto's temporary L1 (the one
    # exception of docs/crash-safety.md: QEMU's shrink allocates a table for each empty L1 entry, here of one cluster).
    path = image('grow.qcow2', 'cluster_size=512', '256k', [['write -P 1 0 256k'], []])
    resize('grow.qcow2', 6 << 20)
    for c in 'write -P 2 100k 64k', 'write -P 3 5M 64k':
        run('qemu-io', '-f', 'qcow2', '-c', c, path)
    run('qemu-img', 'snapshot', '-c', 's2', path)
    # The same, whose active L1 table is shorter than a snapshot's: going there moves it.
    grown = os.path.join(folder, 'grown.qcow2')
    shutil.copy(path, grown)
    run('qemu-img', 'snapshot', '-a', 's1', grown)
    with open(grown, 'r+b') as f:
        f.seek(36)
        f.write(struct.pack('>L', (256 << 10) // (64 * 512)))
    run('qemu-img', 'check', '-q', '-r', 'leaks', grown)
    with open(os.path.join(folder, 'base.raw'), 'wb') as f:
        f.write(os.urandom(1 << 20))
    image('over.qcow2', 'cluster_size=4k', '2M',
          [['write -P 1 64k 100k'], ['write -P 2 1k 200k'], ['write -z 512k 64k']], '-b', 'base.raw', '-F', 'raw')
    image('over2.qcow2', 'cluster_size=64k', '1M',
          [['write -P 1 0 65k'], ['write -P 2 300k 1k'], []], '-b', 'base.raw', '-F', 'raw')
    for n, of in ('1', 'small'), ('2', 'many'), ('3', 'old'):
        harm(os.path.join(folder, of + '.qcow2'), os.path.join(folder, f'harm{n}.qcow2'))
    return sorted(os.listdir(folder))


def harm(source, path):
    """A copy in which counts are too low and too high and COPIED is wrong, and every state still reads."""
    with open(source, 'rb') as f:
        b = bytearray(f.read())
    bits, = struct.unpack_from('>L', b, 20)
    cluster = 1 << bits
    l1_size, l1, table = struct.unpack_from('>LQQ', b, 36)
    order = struct.unpack_from('>L', b, 96)[0] if b[7] == 3 else 4
    width = (1 << order) // 8
    for n in range(l1_size):
        l2 = struct.unpack_from('>Q', b, l1 + 8 * n)[0] & 0x00FFFFFFFFFFFE00
        for k in range(0, cluster // 8 if l2 else 0, 3):  # a third of the entries: flag, or count to 0
            word, = struct.unpack_from('>Q', b, l2 + 8 * k)
            host = (word & 0x00FFFFFFFFFFFE00) >> bits
            if not host or word & 1 << 62:
                continue
            if k % 2:
                struct.pack_into('>Q', b, l2 + 8 * k, word ^ 1 << 63)
            else:
                block, = struct.unpack_from('>Q', b, table + 8 * (host // (cluster // width)))
                at = block + host % (cluster // width) * width
                b[at:at + width] = bytes(width)
    block, = struct.unpack_from('>Q', b, table)
    b[block + width - 1] = 7  # the header's cluster, too high
    with open(path, 'wb') as f:
        f.write(b)


def verbs():
    """(file, arguments): the arguments with IMAGE for the file. In rounds over the images, so that the file
    system has more than one in hand."""
    rounds = [['create', 'IMAGE', 'c1'], ['revert', 'IMAGE', 's1'], ['create', 'IMAGE', 'c2'], ['revert', 'IMAGE', 's2'],
              ['rename', 'IMAGE', 'c2', 'r2'], ['delete', 'IMAGE', 's2'], ['create', 'IMAGE', 'c3'],
              ['export', 'IMAGE', '--all', 'OUT'], ['revert', 'IMAGE', 'c1'],
              ['export', '-O', 'qcow2', 'IMAGE', 'r2', 'OUT'], ['delete', 'IMAGE', 's1', 'r2'],
              ['export', '-O', 'raw', '--no-reflink', 'IMAGE', 'c3', 'OUT'], ['revert', 'IMAGE', 'c3'], ['delete', 'IMAGE', '--all']]
    extra = {1: ('harm1', ['check', '-r', 'all', 'IMAGE']), 3: ('over', ['flatten', 'IMAGE']), 5: ('harm2', ['check', '-r', 'all', 'IMAGE']),
             7: ('over2', ['flatten', 'IMAGE']), 9: ('harm3', ['check', '-r', 'all', 'IMAGE'])}
    full = [['create', 'IMAGE', 'f1'], ['revert', 'IMAGE', 's1'], ['delete', 'IMAGE', 's2'], ['export', '-O', 'qcow2', 'IMAGE', 's1', 'OUT']]
    out = []
    for n, verb in enumerate(rounds):
        out += [(name + '.qcow2', verb) for name in ('small', 'many', 'wide', 'old', 'grow', 'grown')]
        if n in extra:
            out.append((extra[n][0] + '.qcow2', extra[n][1]))
    out.append((None, ['full']))
    out += [(name + '.qcow2', verb) for verb in full for name in ('over', 'harm1', 'harm2')]
    done = []
    for n, (name, verb) in enumerate(out):
        done.append((name, ['out%d.%s' % (n, verb[2].strip('-')) if a == 'OUT' else a for a in verb]))
    return done


def after(verb, old):
    """What a verb that succeeds makes of an image; of export: what the new file means."""
    word, args = verb[0], verb[2:]
    named = {name: disk for _, name, disk in old.snapshots}
    snapshots = list(old.snapshots)
    if word == 'create':
        number = max((int(i) for i, _, _ in snapshots), default=0) + 1
        return old._replace(snapshots=(*snapshots, (str(number), args[0], old.disk)))
    if word == 'revert':
        return old._replace(disk=named[args[0]])
    if word == 'rename':
        return old._replace(snapshots=tuple((i, args[1] if n == args[0] else n, d) for i, n, d in snapshots))
    if word == 'delete':
        gone = named if args == ['--all'] else args
        return old._replace(snapshots=tuple(s for s in snapshots if s[1] not in gone))
    if word == 'export' and args[0] == '--all':
        return Meaning(' '.join(named.values()), (), False)
    if word == 'export':
        return Meaning(named[verb[-2]], (), False)
    return old._replace(backing=old.backing and word != 'flatten')


def digest(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def meaning(path):
    """What qemu-img reads in it, or what is wrong."""
    if path.endswith('.raw'):
        return Meaning(digest(path), (), False)
    if os.path.isdir(path):
        with open(f'{path}/index.json') as f:
            files = [f'{path}/{s["filename"]}' for s in json.load(f)]
        for made in files:
            run('qemu-img', 'check', made)
        return Meaning(' '.join(meaning(made).disk for made in files), (), False)
    out, copy = path + '.disk', path + '.copy'

    def disk(snapshot=None):
        of, how = path, ['-l', f'snapshot.id={snapshot}'] if snapshot else []
        if how and 'grow' in path:  # -l takes the disk of today for as long as the snapshot's: go there instead
            shutil.copy(path, copy)
            run('qemu-img', 'snapshot', '-a', snapshot, copy)
            of, how = copy, []
        run('qemu-img', 'convert', '-f', 'qcow2', *how, '-O', 'raw', of, out)
        return digest(out)
    info = json.loads(run('qemu-img', 'info', '-f', 'qcow2', '--output=json', path))
    snapshots = tuple((s['id'], s['name'], disk(s['id'])) for s in info.get('snapshots', []))
    found = Meaning(disk(), snapshots, 'backing-filename' in info)
    for made in out, copy:
        if os.path.exists(made):
            os.unlink(made)
    return found
