#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Power cuts seen from below: the real tool in a virtual machine, on a disk that QEMU's blklogwrites driver records.

usage: power.py TOOL [FILESYSTEM...]        (ext4 xfs btrfs; the variables stand in `make power`'s comment)

From the record come the disks that a power cut could leave (replay.py). Each is mounted in the machine again, and what
qemu-img reads in the images on it must be the state before the verb or the one after it (images.py)."""
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

MIB = 1 << 20
SIZE = 320 * MIB          # of a file system; XFS takes no less than 300
AT = MIB                  # where it begins; marks stand before it, in a partition of their own
DISK = AT + SIZE
BATCH = 24                # disks that one start of the machine mounts
SUITE = 'trixie'
PACKAGES = 'qemu-system-x86,linux-image-cloud-amd64,busybox-static,xfsprogs,btrfs-progs,e2fsprogs,initramfs-tools'
MKFS = {'ext4': ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0'], 'xfs': ['mkfs.xfs', '-q', '-f'], 'btrfs': ['mkfs.btrfs', '-q', '-f']}
SEED = int(os.environ.get('POWER_SEED', '1'))
CUTS = int(os.environ.get('POWER_CUTS', '600'))      # for each file system
ROOT = os.environ.get('POWER_ROOT', '/var/tmp/qcow2-snapshot-power')


def skip(why):
    print(f'SKIPPED: {why}: no power cut was tried')
    sys.exit(0)


def program(name, *args):
    """A program of that root, with that root's libraries: neither chroot nor installation is needed."""
    for folder in 'usr/bin', 'usr/sbin':
        path = os.path.join(ROOT, folder, name)
        if os.path.exists(path):
            return [ROOT + '/lib64/ld-linux-x86-64.so.2', '--library-path', ROOT + '/usr/lib/x86_64-linux-gnu', path, *args]
    skip(f'{ROOT} has no {name} (POWER_ROOT names another root; one with debootstrap --variant=minbase --include={PACKAGES})')


def short(m):
    return m and ' '.join([m.disk[:6], *(f'{i}:{n}:{d[:6]}' for i, n, d in m.snapshots), 'over a backing file' * m.backing])


def kernel():
    found = sorted(f for f in (os.listdir(ROOT + '/boot') if os.path.isdir(ROOT + '/boot') else []) if f.startswith('vmlinuz-'))
    if not found:
        skip(f'{ROOT}/boot has no kernel')
    return found[-1][len('vmlinuz-'):]


class Machine:
    """The kernel, and what it begins with: busybox, the tool with its libraries, modules, scripts."""

    def __init__(self, folder, tool, preload):
        self.version = kernel()
        self.initrd = os.path.join(folder, 'initrd')
        tree = os.path.join(folder, 'tree')
        for d in 'bin', 'dev', 'proc', 'sys', 'tmp', 'm', 'modules':
            os.makedirs(os.path.join(tree, d))
        shutil.copy(os.path.join(ROOT, 'usr/bin/busybox'), tree + '/bin/busybox')
        shutil.copy(tool, tree + '/bin/qcow2-snapshot')
        for line in images.run('ldd', tool).splitlines():
            library = next((w for w in line.split() if w.startswith('/')), None)
            if library:
                os.makedirs(os.path.dirname(tree + library), exist_ok=True)
                shutil.copy(library, tree + library)
        if preload:
            shutil.copy(preload, tree + '/bin/preload.so')
        for n, path in enumerate(self.modules('virtio_blk', 'loop', 'xfs', 'btrfs')):
            with (lzma.open if path.endswith('.xz') else open)(path, 'rb') as f, open(f'{tree}/modules/{n:02}.ko', 'wb') as out:
                shutil.copyfileobj(f, out)
        with open(tree + '/init', 'w') as f:
            f.write('''#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /tmp
for m in /modules/*; do insmod $m; done
tar xf /dev/vda -C /tmp; . /tmp/job; echo "job: done"; reboot -f
''')
        os.chmod(tree + '/init', 0o755)
        with open(self.initrd, 'wb') as f:
            names = subprocess.run(['find', '.'], cwd=tree, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run([ROOT + '/usr/bin/busybox', 'cpio', '-o', '-H', 'newc'], cwd=tree, input=names, stdout=f, stderr=subprocess.DEVNULL, check=True)
        self.accel = next((a for a in (os.environ.get('POWER_ACCEL') or 'kvm tcg').split() if self.works(folder, a)), None)
        if not self.accel:
            raise SystemExit('the machine does not start: see the lines above')

    def modules(self, *names):
        """Their files, each behind those that it needs."""
        base = os.path.join(ROOT, 'usr/lib/modules', self.version)
        with open(base + '/modules.dep') as f:
            needs = {k: v.split() for k, v in (line.rstrip('\n').split(':') for line in f)}
        out = []
        for name in names:
            for path in (p for p in needs if os.path.basename(p).split('.')[0] == name):
                out += [m for m in (*reversed(needs[path]), path) if m not in out]
        return [os.path.join(base, m) for m in out]

    def works(self, folder, accel):
        """A hypervisor in a hypervisor may have /dev/kvm and yet stop at the first rare instruction."""
        self.accel = accel
        try:
            self.start(folder, 'true\n', [], [], seconds=60)
            return True
        except (RuntimeError, subprocess.TimeoutExpired) as e:
            print(f'{accel}: {str(e)[-300:]}' if accel != 'kvm' else 'KVM does not run this kernel here: TCG instead', flush=True)
            return False

    def start(self, folder, job, files, disks, seconds=900):
        """Run a shell script with these files in /tmp. The disks (QEMU's -blockdev) are vdb, vdc ..."""
        given = os.path.join(folder, 'given.tar')
        with tarfile.open(given, 'w') as tar:
            info = tarfile.TarInfo('job')
            info.size = len(job)
            tar.addfile(info, io.BytesIO(job.encode()))
            for path in files:
                tar.add(path, os.path.basename(path))
        disks = [f'driver=raw,node-name=given,read-only=on,file.driver=file,file.filename={given}', *disks]
        args = program('qemu-system-x86_64', '-L', ROOT + '/usr/share/qemu', '-L', ROOT + '/usr/share/seabios', '-nodefaults',
                       '-no-user-config', '-display', 'none', '-M', 'q35', '-accel', self.accel, '-cpu', 'max', '-m', '1024', '-no-reboot',
                       '-kernel', f'{ROOT}/boot/vmlinuz-{self.version}', '-initrd', self.initrd, '-serial', 'stdio',
                       '-append', 'console=ttyS0 panic=-1 quiet')
        for disk in disks:
            node = disk.split('node-name=')[1].split(',')[0]
            args += ['-blockdev', disk, '-device', f'virtio-blk-pci,drive={node}']
        said = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds).stdout.decode(errors='replace')
        if 'job: done' not in said:
            raise RuntimeError(said[-2000:])
        return said


def record(machine, folder, fs, verbs, names, preload):
    """Run the verbs; the log. A mark is a write to the second partition, which its last close brings to the disk, without
    a flush."""
    part, disk, log = (os.path.join(folder, n) for n in ('stable', 'disk', 'log'))
    for path, size in (part, SIZE), (log, 0):
        with open(path, 'wb') as f:
            f.truncate(size)
    images.run(*program(MKFS[fs][0], *MKFS[fs][1:], part))
    with open(disk, 'wb') as f:
        f.write(bytes(446) + b''.join(struct.pack('<4xB3xLL', 0x83, at // 512, size // 512) for at, size in ((AT, SIZE), (AT // 2, AT // 2)))
                + bytes(32) + b'\x55\xaa')
        f.truncate(DISK)
    images.run('dd', 'if=' + part, 'of=' + disk, f'bs={MIB}', 'seek=1', 'conv=sparse,notrunc')
    shutil.copy(disk, part)
    before = 'LD_PRELOAD=/bin/preload.so ' if preload else ''
    job = f'''mkdir /m/d; mount -t {fs} /dev/vdb1 /m/d || exit
mark() {{ echo "$*" | dd of=/dev/vdb2 bs=512 conv=sync 2> /dev/null; }}
cp {' '.join('/tmp/' + n for n in names)} /m/d; cd /m/d; sync; mark ready
# Somebody else, whose fsync makes the file system commit what we have half done.
while sleep 0.05; do dd if=/dev/zero of=other bs=4k count=5 conv=fsync 2> /dev/null; done &
'''
    for n, (name, verb) in enumerate(verbs):
        if not name:  # fill the disk up to some 100 KiB
            job += ('kill %1; sync; f=$(df -k . | tail -n 1 | awk \'{ print $4 }\'); fallocate -l $(((f - 4096) * 1024)) full\n'
                    'dd if=/dev/zero of=rest bs=64k 2> /dev/null; truncate -s -128k rest; sync\n')
            continue
        call = ' '.join(name if a == 'IMAGE' else a for a in verb)
        job += f'mark begin {n}; {before}qcow2-snapshot {call} > /tmp/said 2>&1; r=$?; mark end {n} $r; [ $r = 0 ] || {{ echo "verb {n}: $r"; head -n 3 /tmp/said; }}\n'
    job += 'cd /; umount /m/d; sync\n'
    said = machine.start(folder, job, [os.path.join(folder, '../images', n) for n in names], [
        'driver=blklogwrites,node-name=recorded,file.driver=raw,file.cache.no-flush=on,file.file.driver=file,'
        f'file.file.filename={disk},log.driver=file,log.filename={log}'])
    return replay.read(log), said


class Time:
    """When each verb ran: numbers of entries in the log."""

    def __init__(self, entries, verbs, start):
        self.verbs, self.begin, self.end, self.code = verbs, {}, {}, {}
        for n, entry in enumerate(entries):
            if entry.data and entry.at < AT:
                word, *args = entry.data[:512].rstrip(b'\0').decode().split()
                if word == 'ready':
                    self.ready = n + 1
                elif word == 'begin':
                    self.begin[int(args[0])] = n + 1
                else:
                    self.end[int(args[0])] = n + 1
                    self.code[int(args[0])] = int(args[1])
        # What each file means from which entry on: [(begin, end, meaning)], None where there is no file.
        self.history = {name: [(0, 0, m)] for name, m in start.items()}
        for n, (name, verb) in enumerate(verbs):
            if not name:
                continue
            target = verb[-1] if verb[0] == 'export' else name
            past = self.history.setdefault(target, [(0, 0, None)])
            if self.code[n] == 0:
                past.append((self.begin[n], self.end[n], images.after(verb, self.history[name][-1][2])))

    def allowed(self, name, cut):
        """What it may mean. The mark at the end is written after the tool has returned."""
        past = self.history[name]
        sure = max(n for n, (_, end, _) in enumerate(past) if end < cut or n == 0)
        return {m for n, (begin, _, m) in enumerate(past) if n == sure or n > sure and begin <= cut}

    def damaged(self, name, cut):
        return name.startswith('harm') and len(self.history[name]) > 1 and cut <= self.history[name][1][1] or \
            name.startswith('harm') and len(self.history[name]) == 1

    def touched(self, cut):
        """The files of the verbs that ran around this time."""
        near = [n for n in self.begin if self.begin[n] <= cut]
        out = set()
        for n in near[-2:]:
            name, verb = self.verbs[n]
            out |= {name, verb[-1]} if verb[0] == 'export' else {name}
        return out


class Judge:
    """What is in an image, by qemu-img, and by the tool's check. Equal files are looked at once."""

    def __init__(self, tool, folder):
        self.tool, self.folder, self.seen = tool, folder, {}

    def look(self, name, data, damaged):
        key = hashlib.sha256(data).digest(), damaged, name.startswith('over')
        if key not in self.seen:
            with tempfile.TemporaryDirectory(dir=self.folder) as d:
                shutil.copy(os.path.join(self.folder, 'images/base.raw'), d)
                path = os.path.join(d, name)
                with open(path, 'wb') as f:
                    f.write(data)
                try:
                    self.seen[key] = images.meaning(path), None if name.endswith('.raw') else self.wrong(path, damaged)
                except subprocess.CalledProcessError as e:
                    self.seen[key] = None, f'{e.cmd}: {e.stdout[-500:]}'
        return self.seen[key]

    def wrong(self, path, damaged):
        """Beside its meaning. A flag that is more careful than it must be is no fault; a guest shows it."""
        was = images.meaning(path)
        copy = os.path.join(os.path.dirname(path), 'copy-' + os.path.basename(path))

        def code(*args):
            done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            return done.returncode, done.stdout

        def guest(what):
            shutil.copy(path, copy)
            size = json.loads(images.run('qemu-img', 'info', '--output=json', path))['virtual-size']
            images.run('qemu-io', '-f', 'qcow2', '-c', f'write -P 90 0 {size}', copy)
            if images.meaning(copy).snapshots != was.snapshots:
                return f'a guest that writes the whole disk {what} harms a snapshot'
        if not damaged:
            said = code('qemu-img', 'check', '-f', 'qcow2', path)[1]
            bad = [line for line in said.splitlines() if line.startswith('ERROR') and 'OFLAG_COPIED' not in line]
            if bad:
                return '\n'.join(bad[:5])
            found = guest('after the cut')
            if found:
                return found
        how = 'all' if damaged else 'leaks'
        said = code(self.tool, 'check', '-r', how, path)
        again = code(self.tool, 'check', path), code('qemu-img', 'check', '-f', 'qcow2', path)
        if said[0] or again[0][0] or again[1][0]:
            return f'check -r {how}: {said}; then {again[0]}; qemu-img check {again[1]}'
        if images.meaning(path) != was:
            return f'check -r {how} changes what it means'
        return guest('after the repair')


def cuts(rng, entries, time, disk):
    """(entry, way to choose): every flush and random points of every verb, as many as are wanted."""
    first, last = time.ready, len(entries)
    flushes = [n for n in range(first, last + 1) if entries[n - 1].flags & replay.FLUSH]
    some = flushes if len(flushes) <= CUTS // 2 else sorted(rng.sample(flushes, CUTS // 2))
    out = [(n, lambda count: set()) for n in some]
    verbs = sorted(time.begin)
    for k in range(max(CUTS - len(some), 0)):
        n = verbs[k % len(verbs)]
        out.append((rng.randint(time.begin[n], min(time.end[n] + 3, last)), replay.subset(rng)))
    return sorted(out, key=lambda c: c[0]), len(flushes)


def mounted(machine, folder, fs, disks, wanted):
    """Mount each disk and bring the wanted files: ({name: bytes} for each disk, None where it cannot be mounted)."""
    for d in disks, os.path.join(folder, 'brought'):
        os.truncate(d, max(os.path.getsize(d), 1)) if os.path.exists(d) else open(d, 'wb').close()
    brought = os.path.join(folder, 'brought')
    os.truncate(brought, 512 * MIB)
    job = '{\n'
    for n, names in enumerate(wanted):
        job += f'''losetup -o {n * DISK + AT} /dev/loop0 /dev/vdb; mkdir /m/{n}
if mount -t {fs} /dev/loop0 /m/{n} 2> /dev/null; then cd /m; for f in {' '.join(sorted(names))}; do [ -e {n}/$f ] && set -- "$@" {n}/$f; done
[ $# = 0 ] || tar c "$@"; set --; cd /; umount /m/{n}; else echo "disk {n}: $(dmesg | tail -n 3)" > /dev/console; fi
losetup -d /dev/loop0
'''
    job += '} > /dev/vdc; sync\n'
    said = machine.start(folder, job, [], [f'driver=raw,node-name=cuts,file.driver=file,file.filename={disks},cache.no-flush=on',
                                           f'driver=raw,node-name=brought,file.driver=file,file.filename={brought},cache.no-flush=on'])
    out = [None if f'disk {n}: ' in said else {} for n in range(len(wanted))]
    with tarfile.open(brought, 'r:', ignore_zeros=True) as tar:
        for member in tar:
            if member.isfile():
                number, name = member.name.split('/')
                out[int(number)][name] = tar.extractfile(member).read()
    return out, said


def one(machine, tool, folder, fs, names, start, preload, drop):
    rng = random.Random(f'{SEED} {fs}')
    verbs = images.verbs()
    own = os.path.join(folder, fs)
    os.makedirs(own)
    entries, said = record(machine, own, fs, verbs, names, preload)
    time = Time(entries, verbs, start)
    refused = [n for n, code in time.code.items() if code]
    full = verbs.index((None, ['full']))
    if [n for n in refused if n < full]:
        raise RuntimeError(f'verbs failed with room on the disk:\n{said}')
    disk = replay.Disk(entries, os.path.join(own, 'stable'), DISK, time.ready if drop else None)
    planned, flushes = cuts(rng, entries, time, disk)
    print(f'{fs}: {len(time.code)} verbs ({len(refused)} refused on the full disk), {len(entries)} requests, {flushes} flushes', flush=True)
    judge = Judge(tool, folder)
    losses, unmounted, judged = [], 0, 0

    def batch(k, part, disks):
        bad, failed, count = [], 0, 0
        wanted = [time.touched(cut) if n % 8 else {f for f in time.history} for n, (cut, _) in enumerate(part)]
        where = os.path.join(own, f'run{k}')
        os.makedirs(where, exist_ok=True)
        found, said = mounted(machine, where, fs, disks, wanted)
        for (cut, _), names, files in zip(part, wanted, found):
            if files is None:
                failed += 1
                continue
            for name in sorted(names):
                allowed, harmed = time.allowed(name, cut), time.damaged(name, cut)
                count += 1
                if name not in files:
                    got, wrong = None, None
                else:
                    got, wrong = judge.look(name, files[name], harmed)
                if got not in allowed or wrong:
                    near = [(n, time.begin[n], time.end[n]) for n in time.begin if time.begin[n] <= cut][-2:]
                    bad.append(f'{fs}, entry {cut} of {len(entries)} (verbs {near}), {name}: {wrong or "neither old nor new"}\n   is {short(got)}\n   may be {" or ".join(map(str, map(short, allowed)))}')
                    keep = os.path.join(folder, f'loss-{fs}-{cut}-{name}')
                    if name in files:
                        with open(keep, 'wb') as f:
                            f.write(files[name])
        shutil.rmtree(where)
        os.unlink(disks)
        if failed:
            bad.append(f'{fs}: {failed} disks could not be mounted: {said[-600:]}') if not drop else None
        return bad, failed, count

    with ThreadPoolExecutor(int(os.environ.get('POWER_JOBS', '2'))) as pool:
        running = []
        for k in range(0, len(planned), BATCH):
            part = planned[k:k + BATCH]
            disks = os.path.join(own, f'cuts{k}')
            out = os.open(disks, os.O_CREAT | os.O_RDWR)
            os.truncate(disks, BATCH * DISK)
            for n, (cut, keep) in enumerate(part):
                disk.cut(cut, keep, out, n * DISK)
            os.close(out)
            running.append(pool.submit(batch, k, part, disks))
            if len(running) > 3:
                running[len(running) - 4].result()
        for done in running:
            bad, failed, count = done.result()
            losses += bad
            unmounted += failed
            judged += count
    print(f'{fs}: {len(planned)} power cuts, {judged} images judged ({len(judge.seen)} different), {unmounted} not mounted, {len(losses)} losses', flush=True)
    return losses


def main():
    tool, *filesystems = sys.argv[1:]
    drop, preload = 'POWER_DROP_FLUSHES' in os.environ, os.environ.get('POWER_PRELOAD')
    for name in 'qemu-img', 'qemu-io', 'ldd':
        if not shutil.which(name):
            skip(f'no {name} here')
    if not os.path.exists(ROOT) and os.geteuid() == 0 and shutil.which('debootstrap'):
        print(f'making {ROOT} (POWER_ROOT)', flush=True)
        subprocess.run(['debootstrap', '--variant=minbase', '--include=' + PACKAGES, SUITE, ROOT], stdout=subprocess.DEVNULL, check=True)
    for name in 'qemu-system-x86_64', 'busybox', 'mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs':
        program(name)
    folder = tempfile.mkdtemp(prefix='qcow2-power-', dir=os.environ.get('POWER_DIR', '/dev/shm'))
    os.mkdir(folder + '/images')
    names = images.make(folder + '/images')
    start = {n: images.meaning(os.path.join(folder, 'images', n)) for n in names}
    machine = Machine(folder, tool, preload)
    print(f'seed {SEED}, {machine.accel}, Linux {machine.version}', flush=True)
    losses = []
    for fs in filesystems or ['ext4', 'xfs', 'btrfs']:
        losses += one(machine, tool, folder, fs, names, start, preload, drop)
    for line in losses[:20]:
        print(line)
    if losses:
        print(f'{len(losses)} losses; what was there is kept in {folder}')
    else:
        shutil.rmtree(folder)
    sys.exit(bool(losses))


if __name__ == '__main__':
    main()
