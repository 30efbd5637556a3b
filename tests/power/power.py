#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Power cuts seen from below: the real tool in a virtual machine, on a disk that QEMU's blklogwrites driver records.
From the record come the disks that a power cut could leave (replay.py). Each is mounted in the machine again, and what
qemu-img reads in the images on it must be what stood there before the verb or stands there after it (images.py)."""
import argparse
import hashlib
import io
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor

import images
import replay
from images import run

MIB = 1 << 20
SIZE = 320 * MIB          # of a file system; XFS takes no less than 300
AT = MIB                  # where it begins; before it lies a partition for marks
DISK = AT + SIZE
BATCH = 24                # disks that one start of the machine mounts
PACKAGES = 'qemu-system-x86,linux-image-cloud-amd64,initramfs-tools,busybox-static,xfsprogs,btrfs-progs,e2fsprogs'
ROOM = {'btrfs': 1024}     # KiB that are left on a full disk, else 128: of so little btrfs gives none to anybody
MKFS = {'ext4': ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0'], 'xfs': ['mkfs.xfs', '-q', '-f'], 'btrfs': ['mkfs.btrfs', '-q', '-f']}
ROOT = os.environ.get('POWER_ROOT') or '/var/tmp/qcow2-snapshot-power'


def skip(why):
    print(f'SKIPPED: {why}: no power cut was tried')
    sys.exit(0)


def find_pieces():
    for name in 'qemu-img', 'qemu-io', 'ldd':
        if not shutil.which(name):
            skip(f'no {name} here')
    if not os.path.exists(ROOT) and os.geteuid() == 0 and shutil.which('debootstrap'):
        print(f'Making a Debian 13 root in {ROOT} (POWER_ROOT), some 600 MB', flush=True)
        subprocess.run(['debootstrap', '--variant=minbase', '--include=' + PACKAGES, 'trixie', ROOT], stdout=subprocess.DEVNULL, check=True)
    for name in 'qemu-system-x86_64', 'busybox', *(words[0] for words in MKFS.values()):
        program(name)
    if not kernel():
        skip(f'no kernel in {ROOT}/boot (POWER_ROOT)')


def program(name, *args):
    """A program of that root with that root's libraries: neither chroot nor installing is needed."""
    for path in f'{ROOT}/usr/bin/{name}', f'{ROOT}/usr/sbin/{name}':
        if os.path.exists(path):
            return [f'{ROOT}/lib64/ld-linux-x86-64.so.2', '--library-path', f'{ROOT}/usr/lib/x86_64-linux-gnu', path, *args]
    skip(f'no {name} in {ROOT} (POWER_ROOT; as root, debootstrap makes one: --variant=minbase --include={PACKAGES})')


def kernel():
    found = [f for f in os.listdir(f'{ROOT}/boot') if f.startswith('vmlinuz-')] if os.path.isdir(f'{ROOT}/boot') else []
    return max(found, default='')[len('vmlinuz-'):]


class Machine:
    """The kernel, and what it begins with: busybox, the tool with its libraries, modules."""

    def __init__(self, folder, tool, preload):
        self.initrd, tree = f'{folder}/initrd', f'{folder}/tree'
        for d in 'bin', 'dev', 'proc', 'sys', 'tmp', 'm', 'modules':
            os.makedirs(f'{tree}/{d}')
        shutil.copy(f'{ROOT}/usr/bin/busybox', f'{tree}/bin/busybox')
        shutil.copy(tool, f'{tree}/bin/qcow2-snapshot')
        if preload:
            shutil.copy(preload, f'{tree}/bin/preload.so')
        for library in (w for w in run('ldd', tool).split() if w.startswith('/')):
            os.makedirs(os.path.dirname(tree + library), exist_ok=True)
            shutil.copy(library, tree + library)
        for n, path in enumerate(self.modules('virtio_blk', 'loop', 'xfs', 'btrfs')):
            with (lzma.open if path.endswith('.xz') else open)(path, 'rb') as f, open(f'{tree}/modules/{n:02}.ko', 'wb') as out:
                shutil.copyfileobj(f, out)
        with open(f'{tree}/init', 'w') as f:
            f.write('''#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
for m in /modules/*; do insmod $m; done
tar xf /dev/vda -C /tmp; . /tmp/job; echo 'job: done'; reboot -f
''')
        os.chmod(f'{tree}/init', 0o755)
        names = subprocess.run(['find', '.'], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
        with open(self.initrd, 'wb') as f:
            subprocess.run([f'{ROOT}/usr/bin/busybox', 'cpio', '-o', '-H', 'newc'], cwd=tree, input=names, stdout=f, stderr=subprocess.DEVNULL, check=True)
        # A hypervisor in a hypervisor may have /dev/kvm and yet stop at the first rare instruction.
        for self.accel in (os.environ.get('POWER_ACCEL') or 'kvm tcg').split():
            try:
                self.start(folder, ':\n', seconds=60)
                return
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                said = str(e)
                print(f'The machine does not start with {self.accel}', flush=True)
        raise SystemExit(said)

    @staticmethod
    def modules(*names):
        """Their files, each behind those that it needs. What is built in has none."""
        base = f'{ROOT}/usr/lib/modules/{kernel()}/'
        with open(base + 'modules.dep') as f:
            needs = {k: v.split() for k, v in (line.rstrip('\n').split(':') for line in f)}
        wanted = [p for n in names for p in needs if os.path.basename(p).split('.')[0] == n]
        return dict.fromkeys(base + m for p in wanted for m in (*reversed(needs[p]), p))

    def start(self, folder, job, files=(), disks=(), seconds=1800):
        """Run a shell script, with these files beside it in /tmp. The disks (QEMU's -blockdev) are vdb, vdc ..."""
        given = f'{folder}/given.tar'
        with tarfile.open(given, 'w') as tar:
            info = tarfile.TarInfo('job')
            info.size = len(job)
            tar.addfile(info, io.BytesIO(job.encode()))
            for path in files:
                tar.add(path, os.path.basename(path))
        args = program('qemu-system-x86_64', '-L', f'{ROOT}/usr/share/qemu', '-L', f'{ROOT}/usr/share/seabios', '-nodefaults', '-no-user-config',
                       '-display', 'none', '-M', 'q35', '-accel', self.accel, '-cpu', 'max', '-m', '1024', '-no-reboot', '-serial', 'stdio',
                       '-kernel', f'{ROOT}/boot/vmlinuz-{kernel()}', '-initrd', self.initrd, '-append', 'console=ttyS0 panic=-1 quiet')
        for n, disk in enumerate((f'driver=raw,read-only=on,file.driver=file,file.filename={given}', *disks)):
            args += ['-blockdev', f'{disk},node-name=disk{n}', '-device', f'virtio-blk-pci,drive=disk{n}']
        said = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds).stdout.decode(errors='replace')
        if 'job: done' not in said:
            raise RuntimeError(said[-2000:])
        return said


def record(machine, folder, fs, options, verbs, names, preload):
    """Run the verbs: the requests of the disk. A mark is a write to the second partition; its last close brings it to the
    disk, without a flush."""
    start, disk, log = f'{folder}/start', f'{folder}/disk', f'{folder}/log'
    for path, size in (start, SIZE), (log, 0):
        with open(path, 'wb') as f:
            f.truncate(size)
    run(*program(*MKFS[fs], start))
    with open(disk, 'wb') as f:
        f.write(bytes(446) + b''.join(struct.pack('<4xB3xLL', 0x83, at // 512, size // 512) for at, size in ((AT, SIZE), (AT // 2, AT // 2))))
        f.write(bytes(32) + b'\x55\xaa')
        f.truncate(DISK)
    run('dd', 'if=' + start, 'of=' + disk, f'bs={MIB}', 'seek=1', 'conv=sparse,notrunc')
    run('cp', '--sparse=always', disk, start)
    job = f'''mkdir /m/d; mount -t {fs} -o {options} /dev/vdb1 /m/d || reboot -f
mark() {{ echo "$*" | dd of=/dev/vdb2 bs=512 conv=sync 2> /dev/null; }}
cp {' '.join('/tmp/' + n for n in names)} /m/d; cd /m/d; sync; mark ready
# Somebody else, whose fsync makes the file system commit what is half done.
while sleep 0.05; do dd if=/dev/zero of=other bs=4k count=5 conv=fsync 2> /dev/null; done & other=$!
'''
    for n, (name, verb) in enumerate(verbs):
        if name:
            call = ' '.join(name if a == 'IMAGE' else a for a in verb)
            before = 'LD_PRELOAD=/bin/preload.so ' * bool(preload)
            job += f'mark begin {n}; {before}qcow2-snapshot {call} > /tmp/said 2>&1; r=$?; mark end {n} $r; [ $r = 0 ] || {{ echo "{call}: $r"; head -n 3 /tmp/said; }}\n'
        else:  # fill the disk up to some 100 KiB
            job += ("kill $other; sync; fallocate -l $((($(df -k . | tail -n 1 | awk '{ print $4 }') - 16384) * 1024)) full\n"
                    f'dd if=/dev/zero of=rest bs=64k 2> /dev/null; truncate -s $(($(stat -c %s rest) - {ROOM.get(fs, 128)} * 1024)) rest; sync\n')
    said = machine.start(folder, job + 'cd /; umount /m/d; sync\n', [f'{folder}/../images/{n}' for n in names], [
        f'driver=blklogwrites,file.driver=raw,file.cache.no-flush=on,file.discard=unmap,file.file.driver=file,file.file.discard=unmap,'
        f'file.file.filename={disk},discard=unmap,log.driver=file,log.filename={log}'])
    return replay.read(log), replay.Disk([], start), said


class Time:
    """When each verb ran, as numbers of entries: with so many done its mark is there."""

    def __init__(self, entries, verbs, start):
        self.verbs, self.begin, self.end, self.code = verbs, {}, {}, {}
        for n, entry in enumerate(entries, 1):
            if entry.data and entry.at < AT:
                word, *args = entry.data[:512].rstrip(b'\0').decode().split()
                if word == 'ready':
                    self.ready = n
                else:
                    getattr(self, word)[int(args[0])] = n
                    self.code[int(args[0])] = int(args[-1])
        # What each file means, and when that became so: [(begin, end, meaning)]; None: it is not there.
        self.history = {name: [(0, 0, m)] for name, m in start.items()}
        self.mended = {name: len(entries) for name in start if name.startswith('harm')}
        for n, (name, verb) in enumerate(verbs):
            if name and verb[0] == 'export':
                self.history.setdefault(verb[-1], [(0, 0, None)])
            if name and self.code[n] == 0:
                past = self.history[verb[-1] if verb[0] == 'export' else name]
                past.append((self.begin[n], self.end[n], images.after(verb, self.history[name][-1][2])))
                if verb[0] == 'check':
                    self.mended[name] = self.end[n] - 1

    def allowed(self, name, cut):
        past = self.history[name]
        last = max(n for n, (_, end, _) in enumerate(past) if end <= cut)
        return {m for n, (begin, _, m) in enumerate(past) if n == last or n > last and begin <= cut}

    def files(self, cut):
        """Those of the two verbs that ran last."""
        near = [self.verbs[n] for n in self.begin if self.begin[n] <= cut][-2:]
        return {f for name, verb in near for f in (name, verb[-1]) if f in self.history} or set(self.history)


class Judge:
    """What an image means to qemu-img, and what is wrong with it beside. Equal files are looked at once."""

    def __init__(self, tool, folder):
        self.tool, self.folder, self.seen = tool, folder, {}

    def look(self, name, data, damaged):
        key = hashlib.sha256(data if isinstance(data, bytes) else repr(data).encode()).digest(), damaged, name.startswith('over')
        if key not in self.seen:
            with tempfile.TemporaryDirectory(dir=self.folder) as d:
                shutil.copy(f'{self.folder}/images/base.raw', d)
                put(f'{d}/{name}', data)
                try:
                    means = images.meaning(f'{d}/{name}')
                    self.seen[key] = means, '' if name.endswith(('.raw', '.all')) else self.wrong(d, name, means, damaged)
                except subprocess.CalledProcessError as e:
                    self.seen[key] = None, f'{e.cmd}: {e.stdout[-500:]}'
                except (OSError, ValueError) as e:  # what export --all says of its files is not all there
                    self.seen[key] = None, str(e)
        return self.seen[key]

    def wrong(self, folder, name, means, damaged):
        path, copy = f'{folder}/{name}', f'{folder}/copy-{name}'

        def said(*args):
            done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return done.returncode, done.stdout[-800:]

        def guest():
            """COPIED may be more careful than it must; if less, a guest shows it."""
            shutil.copy(path, copy)
            size = json.loads(run('qemu-img', 'info', '--output=json', path))['virtual-size']
            run('qemu-io', '-f', 'qcow2', '-c', f'write -P 90 0 {size}', copy)
            return '' if images.meaning(copy).snapshots == means.snapshots else 'a guest that writes the whole disk harms a snapshot'

        if not damaged:
            bad = [line for line in said('qemu-img', 'check', path)[1].splitlines() if line.startswith('ERROR') and 'OFLAG_COPIED' not in line]
            if bad or guest():
                return f'{bad} {guest()}'
        how = 'all' if damaged else 'leaks'
        checks = [said(self.tool, 'check', '-r', how, path), said(self.tool, 'check', path), said('qemu-img', 'check', path)]
        if any(code for code, _ in checks) or images.meaning(path) != means:
            return f'check -r {how} leaves it so: {checks}, {images.meaning(path)}'
        return guest()


def choose(rng, entries, disk, time, count, drop):
    """(entries done, of these stable, which others are there): after each flush, and at random points of each verb."""
    flushes = [n for n in range(time.ready, len(entries) + 1) if entries[n - 1].flags & replay.FLUSH]
    out = [] if drop else [(n, n, None) for n in flushes]
    verbs = sorted(time.begin)
    for k in range(count):
        n = verbs[k % len(verbs)]
        end = rng.randint(time.begin[n], min(time.end[n] + 3, len(entries)))
        out.append((end, min(time.begin[n], end) if drop else disk.flushed(end), replay.subset(rng)))
    return sorted(out, key=lambda c: c[:2])


def mounted(machine, folder, fs, options, disks, wanted):
    """Mount each disk and bring the wanted files: {name: bytes, or these of a folder} for each disk, None where it cannot be mounted."""
    brought = f'{folder}/brought'
    with open(brought, 'wb') as f:
        f.truncate(1024 * MIB)
    job = '{\n'
    for n, names in enumerate(wanted):
        job += f'''losetup -o {n * DISK + AT} /dev/loop0 /dev/vdb; mkdir /m/{n}; set --
if mount -t {fs} -o {options} /dev/loop0 /m/{n} 2> /dev/null; then
cd /m; for f in {' '.join(sorted(names))}; do [ ! -e {n}/$f ] || set -- "$@" {n}/$f; done; [ $# = 0 ] || tar c "$@"; cd /; umount /m/{n}
else echo "disk {n}: $(dmesg | tail -n 3)" > /dev/console; fi
losetup -d /dev/loop0
'''
    said = machine.start(folder, job + '} > /dev/vdc; sync\n', [], [
        f'driver=raw,file.driver=file,file.filename={path},cache.no-flush=on' for path in (disks, brought)])
    out = [None if f'disk {n}: ' in said else {} for n in range(len(wanted))]
    with tarfile.open(brought, 'r:', ignore_zeros=True) as tar:
        for member in tar:
            number, name, *within = member.name.split('/', 2)
            if member.isdir():
                out[int(number)][name] = {}
            elif within:
                out[int(number)][name][within[0]] = tar.extractfile(member).read()
            else:
                out[int(number)][name] = tar.extractfile(member).read()
    return out, said


def put(path, data):
    """A file, or a folder of files."""
    if isinstance(data, bytes):
        with open(path, 'wb') as f:
            f.write(data)
    else:
        os.makedirs(path, exist_ok=True)
        for name in data:
            put(f'{path}/{name}', data[name])


def short(m):
    return m and ' '.join([m.disk[:6], *(f'{i}:{n}:{d[:6]}' for i, n, d in m.snapshots), 'over a backing file' * m.backing])


def one(machine, folder, name, names, start, args):
    """All of one file system: the losses."""
    fs, _, options = name.partition(':')
    options = options or 'relatime'
    rng, verbs, own = random.Random(f'{args.seed} {name}'), images.verbs(), f'{folder}/{fs}{options}'
    os.makedirs(own)
    entries, disk, said = record(machine, own, fs, options, verbs, names, args.preload)
    disk.entries = entries
    time = Time(entries, verbs, start)
    refused = [n for n, code in time.code.items() if code]
    if any(n < verbs.index((None, ['full'])) for n in refused):
        raise SystemExit(f'verbs failed with room on the disk:\n{said}')
    planned = choose(rng, entries, disk, time, args.cuts, args.drop_flushes)
    judge, losses, failed, judged = Judge(args.tool, folder), [], [], []

    def batch(k, part, disks):
        wanted = [set(time.history) if n % 8 == 0 else time.files(cut[0]) for n, cut in enumerate(part)]
        where = tempfile.mkdtemp(dir=own)
        found, said = mounted(machine, where, fs, options, disks, wanted)
        for (cut, stable, _), names, files in zip(part, wanted, found):
            if files is None:
                failed.append(f'{name}, entry {cut}, {stable} of them stable: not mounted\n{said[-1000:]}')
                continue
            for f in sorted(names):
                judged.append(f)
                means, wrong = judge.look(f, files[f], cut <= time.mended.get(f, -1)) if f in files else (None, '')
                if means not in time.allowed(f, cut) or wrong:
                    near = [(verbs[n], time.begin[n], time.end[n]) for n in time.begin if time.begin[n] <= cut][-2:]
                    losses.append(f'{name}, {cut} of {len(entries)} entries done, {stable} of them stable (ran last: {near}), {f}: {wrong}\n'
                                  f'   is {short(means)}\n   may be {" or ".join(str(short(m)) for m in time.allowed(f, cut))}')
                    put(f'{folder}/loss-{cut}-{f}', files.get(f, b''))
        shutil.rmtree(where)
        os.unlink(disks)

    with ThreadPoolExecutor(2) as pool:
        running = []
        for k in range(0, len(planned), BATCH):
            disks, part = f'{own}/cuts{k}', planned[k:k + BATCH]
            out = os.open(disks, os.O_CREAT | os.O_RDWR)
            os.truncate(disks, BATCH * DISK)
            for n, (cut, stable, keep) in enumerate(part):
                disk.cut(cut, stable, keep or (lambda _: ()), out, n * DISK)
            os.close(out)
            running.append(pool.submit(batch, k, part, disks))
            for done in running[:-2]:
                done.result()
        for done in running:
            done.result()
    print(f'{name}: {len(time.code)} verbs ({len(refused)} refused, disk full), {len(entries)} requests; {len(planned) - args.cuts} power cuts at flushes, {args.cuts} at random, '
          f'{len(judged)} images judged ({len(judge.seen)} different), {len(failed)} disks not mounted, {len(losses)} losses', flush=True)
    return losses + ([] if args.drop_flushes else failed)


def main():
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument('tool')
    words.add_argument('filesystem', nargs='*', help='ext4, xfs, btrfs; mount options behind a colon', default=['ext4', 'xfs', 'btrfs'])
    words.add_argument('--cuts', type=int, default=200, help='at random, for each file system; there is one at each flush besides')
    words.add_argument('--seed', type=int, default=1)
    words.add_argument('--drop-flushes', action='store_true', help='teeth: losses must be found on a disk that ignores flushes while a verb runs')
    words.add_argument('--preload', help='teeth: losses must be found with this library before the C library')
    args = words.parse_args()
    find_pieces()
    folder = tempfile.mkdtemp(prefix='qcow2-power-', dir=os.environ.get('POWER_DIR') or '/dev/shm')
    os.mkdir(f'{folder}/images')
    names = images.make(f'{folder}/images')
    start = {n: images.meaning(f'{folder}/images/{n}') for n in names}
    machine = Machine(folder, args.tool, args.preload)
    print(f'Linux {kernel()}, {machine.accel}, seed {args.seed}', flush=True)
    losses = [loss for name in args.filesystem for loss in one(machine, folder, name, names, start, args)]
    if args.drop_flushes or args.preload:
        print('\n'.join(losses[:2] + [f'{len(losses)} losses, as there must be' if losses else 'no loss without barriers: this test has no teeth']))
        shutil.rmtree(folder)
        sys.exit(not losses)
    print('\n'.join(losses[:20]))
    if losses:
        sys.exit(f'{len(losses)} losses; what was found is kept in {folder}')
    shutil.rmtree(folder)


if __name__ == '__main__':
    main()
