//! Images at the edges, each made on purpose.

use std::os::unix::fs::FileExt;

use super::craft;
use super::files::{self, at, R};
use super::generate::QEMU;
use super::ours::Verb;
use super::qimg::{self, Kind, Qcow};
use super::rng::Rng;
use super::run::{Ctx, Run, Stats};

/// `Ok(Some(why))`: skipped.
pub type Case = fn(&mut Run) -> R<Option<&'static str>>;

pub const ALL: &[(&str, Case)] = &[
    // The slow ones first: cases run side by side.
    ("65,536 snapshots of a zero-sized disk", many_empty),
    ("65,536 snapshots with 32-bit refcounts", many_32_bit),
    (
        "a changed byte is found and its structure named",
        report_names_structures,
    ),
    ("refcounts of 1, 2 and 4 bits overflow", narrow_refcounts),
    (
        "the refcount table grows with 512-byte clusters",
        reftable_growth,
    ),
    ("a disk of size zero", zero_size),
    ("the last snapshot is deleted", last_deleted),
    ("disks above 256 GiB", large_disks),
    ("a disk of one L2 table in 2 MiB clusters", two_mib_clusters),
    ("extra data of 0 to 1024 bytes is rewritten", extra_data),
    ("more than 1024 bytes of extra data", too_much_extra),
    ("names and IDs select as in qemu-img", names_and_ids),
    ("IDs that are not numbers", text_ids),
    ("nothing of that name", not_found),
    ("version 2 refuses another disk size", v2_resize),
    ("goto resizes the disk", resize),
    ("the active L1 grows in goto", l1_growth),
    ("goto grows over a longer backing file", grow_over_backing),
    ("persistent bitmaps", bitmaps),
    ("an unknown autoclear bit", autoclear),
    ("the dirty bit", dirty),
    ("the corrupt bit", corrupt),
    ("an external data file", data_file),
    ("an encrypted image without the key", encrypted),
    ("VM state saved by a real QEMU", savevm),
];

pub fn run(ctx: &Ctx, name: &str, case: Case) -> (Stats, R<Option<&'static str>>) {
    let label: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    match Run::new(ctx, &label) {
        Ok(mut run) => {
            let r = case(&mut run);
            (run.stats.clone(), r)
        }
        Err(e) => (Stats::default(), Err(e)),
    }
}

fn create(run: &mut Run, options: &str, size: &str) -> R<()> {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([QEMU, size]);
    run.tools.must("qemu-img", &args)?;
    run.sync()
}

fn io(run: &mut Run, commands: &[&str]) -> R<()> {
    let v: Vec<String> = commands.iter().map(|s| s.to_string()).collect();
    let o = run.tools.io(QEMU, false, &v)?;
    if !o.ok {
        return Err(format!("qemu-io {commands:?}: {}{}", o.stdout, o.stderr));
    }
    run.sync()
}

fn must(done: bool) -> R<()> {
    if done {
        Ok(())
    } else {
        Err("the verb was expected to succeed on both sides, and failed alike".into())
    }
}

fn must_fail(run: &Run, done: bool, errno: i32) -> R<()> {
    if done {
        return Err("the verb was expected to fail on both sides, and succeeded alike".into());
    }
    if run.stats.same_errors.contains_key(&errno) {
        return Ok(());
    }
    Err(format!(
        "expected errno {errno}, had {:?}",
        run.stats.same_errors
    ))
}

/// Flip one byte in each sort of structure: the comparison must find it and name the structure.
fn report_names_structures(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "cluster_size=512", "1M")?;
    io(run, &["write -P 1 0 200k", "write -P 2 700k 3k"])?;
    run.tools
        .snapshot("-c", b"first", QEMU)?
        .map_err(|f| f.text)?;
    io(run, &["write -P 3 8k 4k"])?;
    run.tools
        .snapshot("-c", b"second", QEMU)?
        .map_err(|f| f.text)?;
    io(
        run,
        &["write -P 4 12k 4k", "write -P 4 701k 1k", "discard 13k 1k"],
    )?;
    let q = Qcow::open(&run.qemu)?;
    let map = q.map()?;
    let free = (1..q.len / 512).find(|c| matches!(q.refcount(*c), Ok(Some(0))));
    let one = |want: &dyn Fn(&Kind) -> bool, what: &str| {
        map.starts(want)
            .first()
            .map(|s| s.0)
            .ok_or(format!("no {what}"))
    };
    let l2 = |of: &'static str| move |k: &Kind| matches!(k, Kind::L2 { of: o, .. } if o == of);
    let entry = |n: usize| move |k: &Kind| matches!(k, Kind::Entry { index, .. } if *index == n);
    let places: Vec<(u64, &str)> = vec![
        (36, "the header"),
        (63, "number of snapshots"),
        (q.h.rt_off, "the refcount table"),
        (
            one(&|k| matches!(k, Kind::RefBlock { index: 1, .. }), "block 1")?,
            "refcount block 1",
        ),
        (q.h.l1_off + 8, "the active L1"),
        (q.snaps[1].l1_off, "the L1 of snapshot 1"),
        (
            one(&l2("the active L1[0]"), "active L2")?,
            "the L2 table of the active L1[0]",
        ),
        (
            one(&l2("the L1 of snapshot 0[0]"), "L2 of snapshot 0")?,
            "the L2 table of the L1 of snapshot 0[0]",
        ),
        (
            one(
                &|k| matches!(k, Kind::L2 { of, .. } if of.contains("snapshot 0") && of.contains("snapshot 1")),
                "shared L2",
            )?,
            "and the L1 of snapshot 1",
        ),
        (one(&entry(1), "entry 1")? + 40 + 8, "disk size"),
        (
            one(&entry(1), "entry 1")? + 40 + 24,
            "snapshot table entry 1",
        ),
        (
            one(&|k| matches!(k, Kind::Data { .. }), "data")?,
            "a data cluster",
        ),
        (
            free.ok_or("no free cluster")? * 512,
            "a free or leaked cluster",
        ),
        (q.len, "length"),
    ];
    let ours = run.dir().join("ours.qcow2");
    for (off, want) in places {
        files::copy(&run.qemu, &ours)?;
        let f = files::open_rw(&ours)?;
        let mut b = [0u8];
        files::read_at(&f, off, &mut b)?;
        at("write", f.write_all_at(&[b[0] ^ 0x01], off))?;
        let d = files::compare(&run.qemu, &ours)?;
        let text = qimg::explain(&run.qemu, &ours, &d);
        if d.is_none() || !text.contains(want) || (off < q.len && d.words != [off & !7]) {
            return Err(format!(
                "byte {off:#x} ({want}) was changed; the report:\n{text}"
            ));
        }
    }
    files::copy(&run.qemu, &ours)?;
    if !files::compare(&run.qemu, &ours)?.is_none() {
        return Err("a copy compares as different".into());
    }
    Ok(None)
}

fn narrow_refcounts(run: &mut Run) -> R<Option<&'static str>> {
    for (bits, fit) in [(1, 0), (2, 2), (4, 14)] {
        for kept in [false, true] {
            create(
                run,
                &format!("cluster_size=512,refcount_bits={bits}"),
                "256k",
            )?;
            io(run, &["write -P 1 0 3k", "write -P 2 100k 20k"])?;
            run.keep_handle = kept;
            for i in 0..fit {
                must(run.create(format!("s{i}").as_bytes())?)?;
            }
            for _ in 0..2 {
                let done = run.create(b"one too many")?;
                must_fail(run, done, libc::EINVAL)?;
            }
            if fit > 0 {
                // goto counts the snapshot's tree up before the old one goes down.
                must_fail_or_not(run.goto(b"s0")?);
                must(run.delete(b"s0")?)?;
                must(run.create(b"fits again")?)?;
            }
            run.keep_handle = false;
        }
    }
    Ok(None)
}

/// Both outcomes are fine as long as both sides agree, which `verb` has checked.
fn must_fail_or_not(_done: bool) {}

fn reftable_growth(run: &mut Run) -> R<Option<&'static str>> {
    let mut grown = 0;
    for (bits, l1) in [(64, 33), (64, 200), (32, 130), (16, 65)] {
        for short in [0u64, 1, 2, 3, 5, 9, 20, 45] {
            // A disk of `l1` L1 entries, each spanning 32 KiB.
            create(
                run,
                &format!("cluster_size=512,refcount_bits={bits}"),
                &format!("{}", l1 * 32768),
            )?;
            let q = Qcow::open(&run.qemu)?;
            let covered = q.reftable.len() as u64 * q.per_block();
            // Count clusters directly instead of writing megabytes: they are merely leaked.
            run.tools.note(format!(
                "crafted: all but {short} clusters of the {covered} covered are in use"
            ));
            craft::fill(&run.qemu, covered - short)?;
            run.sync()?;
            io(run, &["write -P 1 0 2k"])?;
            run.keep_handle = short % 2 == 1;
            let rt = Qcow::open(&run.qemu)?.h.rt_clusters;
            for i in 0..4 {
                must(run.create(format!("s{i}").as_bytes())?)?;
            }
            must(run.delete(b"s1")?)?;
            must(run.goto(b"s0")?)?;
            must(run.create(b"again")?)?;
            for name in [&b"s0"[..], b"s2", b"s3", b"again"] {
                must(run.delete(name)?)?;
            }
            run.keep_handle = false;
            grown += u32::from(Qcow::open(&run.qemu)?.h.rt_clusters != rt);
        }
    }
    if grown < 4 {
        return Err(format!(
            "the refcount table grew in only {grown} images: the case tests nothing"
        ));
    }
    Ok(None)
}

fn zero_size(run: &mut Run) -> R<Option<&'static str>> {
    for options in [
        "cluster_size=512",
        "",
        "compat=0.10",
        "extended_l2=on",
        "refcount_bits=1",
    ] {
        create(run, options, "0")?;
        must(run.create(b"a")?)?;
        must(run.create(b"b")?)?;
        must_fail_or_not(run.goto(b"a")?);
        must(run.delete(b"a")?)?;
        must(run.delete(b"b")?)?;
        must(run.create(b"c")?)?;
        io(run, &["write -b -P 1 0 4k"])?;
        must_fail_or_not(run.create(b"with state")?);
        must_fail_or_not(run.goto(b"c")?);
        must_fail_or_not(run.goto(b"with state")?);
        if options != "compat=0.10" {
            run.tools.must("qemu-img", &["resize", "-q", QEMU, "1M"])?;
            io(run, &["write -P 9 0 4k"])?;
            must_fail_or_not(run.create(b"grown")?);
            must_fail_or_not(run.goto(b"c")?);
            must_fail_or_not(run.goto(b"grown")?);
        }
    }
    Ok(None)
}

fn last_deleted(run: &mut Run) -> R<Option<&'static str>> {
    for options in [
        "cluster_size=512",
        "",
        "compat=0.10,cluster_size=4096",
        "extended_l2=on,compression_type=zstd",
    ] {
        for kept in [false, true] {
            create(run, options, "3M")?;
            io(run, &["write -P 1 0 70k"])?;
            run.keep_handle = kept;
            must(run.create(b"only")?)?;
            must(run.delete(b"only")?)?;
            must(run.create(b"x")?)?;
            must(run.create(b"y")?)?;
            must(run.delete(b"y")?)?;
            must(run.delete(b"x")?)?;
            run.keep_handle = false;
        }
    }
    Ok(None)
}

/// QEMU's L2 cache does not cover these disks, so it writes L2 tables in 4 KiB slices.
fn large_disks(run: &mut Run) -> R<Option<&'static str>> {
    for (options, size, far) in [
        ("", "300G", "299G"),
        ("", "1100G", "900G"),
        ("extended_l2=on", "200G", "150G"),
        ("cluster_size=2M", "9T", "8T"),
        ("cluster_size=8k,refcount_bits=64", "40G", "39G"),
    ] {
        create(run, options, size)?;
        io(
            run,
            &[
                "write -P 1 0 300k",
                &format!("write -P 2 {far} 200k"),
                "write -P 3 4G 64k",
                "write -P 3 4500M 64k",
            ],
        )?;
        must(run.create(b"one")?)?;
        io(
            run,
            &[
                "write -P 4 100k 100k",
                &format!("discard {far} 64k"),
                "write -z 4G 64k",
            ],
        )?;
        must(run.create(b"two")?)?;
        run.tools
            .must("qemu-img", &["resize", "-q", "--shrink", QEMU, "100G"])?;
        run.sync()?;
        must_fail_or_not(run.create(b"small")?);
        must_fail_or_not(run.goto(b"one")?);
        run.keep_handle = true;
        must_fail_or_not(run.goto(b"small")?);
        must(run.delete(b"one")?)?;
        must_fail_or_not(run.goto(b"two")?);
        must(run.delete(b"two")?)?;
        run.keep_handle = false;
    }
    Ok(None)
}

fn two_mib_clusters(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "cluster_size=2M", "100M")?;
    io(run, &["write -P 1 0 4k", "write -P 2 50M 1k"])?;
    must(run.create(b"a")?)?;
    io(run, &["write -P 3 0 4k"])?;
    must(run.create(b"b")?)?;
    must(run.goto(b"a")?)?;
    must(run.delete(b"b")?)?;
    must(run.delete(b"a")?)?;
    Ok(None)
}

fn extra_data(run: &mut Run) -> R<Option<&'static str>> {
    for n in [0usize, 7, 8, 15, 16, 20, 24, 25, 32, 300, 1024] {
        for options in ["compat=0.10,cluster_size=512", "cluster_size=512"] {
            create(run, options, "200k")?;
            io(run, &["write -P 1 0 20k"])?;
            must(run.create(b"a")?)?;
            must(run.create(b"b")?)?;
            must(run.create(b"c")?)?;
            let mut rng = Rng::new(n as u64);
            craft::edit_table(&run.qemu, &mut rng, |e, rng| {
                for x in &mut e[..2] {
                    let old = x.extra.len();
                    x.extra.resize(n, 0);
                    if n > old {
                        let more = rng.bytes(n - old);
                        x.extra[old..].copy_from_slice(&more);
                    }
                }
            })?;
            run.sync()?;
            run.keep_handle = n % 2 == 0;
            must(run.create(b"d")?)?;
            must(run.delete(b"c")?)?;
            must(run.goto(b"a")?)?;
            must(run.delete(b"a")?)?;
            run.keep_handle = false;
        }
    }
    Ok(None)
}

fn too_much_extra(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "", "200k")?;
    must(run.create(b"a")?)?;
    craft::edit_table(&run.qemu, &mut Rng::new(1), |e, _| {
        e[0].extra.resize(1025, 1)
    })?;
    run.sync()?;
    let done = run.create(b"b")?;
    must_fail(run, done, libc::EFBIG)?;
    Ok(None)
}

fn names_and_ids(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "cluster_size=1k", "300k")?;
    io(run, &["write -P 1 0 30k"])?;
    let long = vec![b'L'; 255];
    let longer = vec![b'L'; 300];
    let utf8 = "снимок 快照 📷".as_bytes();
    let cut_in_a_letter = "é".repeat(140).into_bytes();
    for name in [
        &b"2"[..],
        b"1",
        b"dup",
        b"dup",
        b"dup",
        b"",
        b"",
        &long,
        &longer,
        utf8,
        &cut_in_a_letter,
        b" blank ",
        b"-x",
        b"a\nb",
    ] {
        must(run.create(name)?)?;
        io(run, &["write -P 7 5k 1k"])?;
    }
    // "1" is an ID and another snapshot's name: goto takes the ID, delete the name.
    must(run.goto(b"1")?)?;
    must(run.delete(b"1")?)?;
    must(run.goto(b"2")?)?;
    must(run.delete(b"2")?)?;
    must(run.goto(b"dup")?)?;
    for way in [0, 1, 2] {
        let v = run.delete_verb(b"dup", way)?;
        must(run.verb(&v)?)?;
    }
    must(run.goto(b"")?)?;
    must(run.delete(b"")?)?;
    must(run.delete(&long)?)?;
    must(run.delete(&long)?)?;
    must(run.goto(utf8)?)?;
    must(run.delete(utf8)?)?;
    must(run.delete(&cut_in_a_letter)?)?;
    Ok(None)
}

fn text_ids(run: &mut Run) -> R<Option<&'static str>> {
    let ids: [&[u8]; 12] = [
        b"",
        b"abc",
        b" 41",
        b"+42",
        b"-3",
        b"0x99",
        b"43abc",
        b"18446744073709551614",
        b"18446744073709551615",
        b"99999999999999999999999",
        &[b'9'; 128],
        "схема".as_bytes(),
    ];
    for id in ids {
        create(run, "cluster_size=512", "100k")?;
        io(run, &["write -P 1 0 10k"])?;
        must(run.create(b"a")?)?;
        must(run.create(b"b")?)?;
        craft::edit_table(&run.qemu, &mut Rng::new(1), |e, _| e[0].id = id.to_vec())?;
        run.sync()?;
        must(run.create(b"next ID")?)?;
        must(run.create(b"and again")?)?;
        must(run.goto(id)?)?;
        must_fail_or_not(run.delete(b"a")?);
    }
    Ok(None)
}

fn not_found(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "", "1M")?;
    let done = run.delete(b"x")?;
    must_fail(run, done, libc::ENOENT)?;
    let done = run.goto(b"x")?;
    must_fail(run, done, libc::ENOENT)?;
    must(run.create(b"here")?)?;
    run.keep_handle = true;
    for what in [&b""[..], b"her", b"here "] {
        let done = run.goto(what)?;
        must_fail(run, done, libc::ENOENT)?;
    }
    // An ID is no name for qemu-img's -d.
    let done = run.delete(b"1")?;
    must_fail(run, done, libc::ENOENT)?;
    must(run.delete(b"here")?)?;
    Ok(None)
}

fn v2_resize(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "compat=0.10,cluster_size=4k", "1M")?;
    io(run, &["write -P 1 0 64k"])?;
    must(run.create(b"a")?)?;
    // A resize is refused as well, so the size in the entry is changed.
    craft::edit_table(&run.qemu, &mut Rng::new(1), |e, _| {
        e[0].extra[8..16].copy_from_slice(&(2u64 << 20).to_be_bytes())
    })?;
    run.sync()?;
    let done = run.goto(b"a")?;
    must_fail(run, done, libc::ENOTSUP)?;
    Ok(None)
}

fn resize(run: &mut Run) -> R<Option<&'static str>> {
    for options in [
        "cluster_size=512",
        "",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=512,refcount_bits=8",
    ] {
        for (first, second) in [
            ("3M", "1M"),
            ("1000448", "5M"),
            ("2M", "512"),
            ("1M", "1049088"),
        ] {
            create(run, options, first)?;
            io(run, &["write -P 1 0 600k", "write -P 2 900k 70k"])?;
            must(run.create(b"a")?)?;
            run.tools
                .must("qemu-img", &["resize", "-q", "--shrink", QEMU, second])?;
            if second != "512" {
                io(run, &["write -P 3 100k 200k", "write -z 0 64k"])?;
            } else {
                io(run, &["write -P 3 0 512"])?;
            }
            must(run.create(b"b")?)?;
            for kept in [false, true] {
                run.keep_handle = kept;
                must(run.goto(b"a")?)?;
                must(run.goto(b"b")?)?;
            }
            must(run.delete(b"a")?)?;
            must(run.goto(b"b")?)?;
            must(run.delete(b"b")?)?;
            run.keep_handle = false;
        }
    }
    Ok(None)
}

fn l1_growth(run: &mut Run) -> R<Option<&'static str>> {
    let mut short = 0;
    for (options, state) in [
        ("cluster_size=512", "3M"),
        ("cluster_size=512,refcount_bits=64", "9M"),
        ("cluster_size=4k,compat=0.10", "40M"),
        ("", "600M"),
    ] {
        create(run, options, "200k")?;
        io(run, &["write -P 1 0 100k"])?;
        must(run.create(b"plain")?)?;
        io(
            run,
            &[&format!("write -b -P 5 {state} 20k"), "write -b -P 6 0 5k"],
        )?;
        must(run.create(b"with state")?)?;
        for kept in [false, true] {
            run.keep_handle = false;
            must(run.goto(b"plain")?)?;
            short += u32::from(craft::shorten_l1(&run.qemu, &mut Rng::new(3))?);
            run.sync()?;
            run.keep_handle = kept;
            must(run.create(b"short")?)?;
            must(run.goto(b"with state")?)?;
            must(run.delete(b"short")?)?;
        }
        must(run.delete(b"plain")?)?;
        must(run.delete(b"with state")?)?;
        run.keep_handle = false;
    }
    if short == 0 {
        return Err("no active L1 could be shortened: the case tests nothing".into());
    }
    Ok(None)
}

fn grow_over_backing(run: &mut Run) -> R<Option<&'static str>> {
    for (backing, cut) in [("4M", "1M"), ("2500k", "1000448"), ("1500k", "1M")] {
        run.tools.must(
            "qemu-img",
            &["create", "-q", "-f", "raw", "base.img", backing],
        )?;
        run.tools.must(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 9 0 1400k", "base.img"],
        )?;
        create(
            run,
            "cluster_size=4k,backing_file=base.img,backing_fmt=raw",
            "3M",
        )?;
        io(run, &["write -P 1 0 70k"])?;
        must(run.create(b"long")?)?;
        run.tools
            .must("qemu-img", &["resize", "-q", "--shrink", QEMU, cut])?;
        run.sync()?;
        must(run.create(b"short")?)?;
        must_fail_or_not(run.goto(b"long")?);
        must(run.goto(b"short")?)?;
        must(run.delete(b"long")?)?;
    }
    Ok(None)
}

/// qemu-img needs about 12 s for each rewrite of such a table (its overlap check walks all snapshots
/// for each of 260,000 small writes), so the default run does only the first of them.
fn many(run: &mut Run, empty: bool) -> R<Option<&'static str>> {
    craft::many_snapshots(&run.qemu, 65536, empty)?;
    run.sync()?;
    let done = run.create(b"one too many")?;
    must_fail(run, done, libc::EFBIG)?;
    must(run.goto(b"65536")?)?;
    must(run.delete(b"s777")?)?;
    if std::env::var_os("DIFF_ALL").is_some() {
        run.keep_handle = true;
        must(run.create(b"fits now")?)?;
        must(run.goto(b"65536")?)?;
        must(run.delete(b"s65535")?)?;
        must(run.delete(b"s0")?)?;
        run.keep_handle = false;
    }
    Ok(None)
}

fn many_empty(run: &mut Run) -> R<Option<&'static str>> {
    many(run, true)
}

fn many_32_bit(run: &mut Run) -> R<Option<&'static str>> {
    many(run, false)
}

fn bitmaps(run: &mut Run) -> R<Option<&'static str>> {
    for options in [
        "cluster_size=512",
        "",
        "cluster_size=16k,extended_l2=on,refcount_bits=64",
    ] {
        create(run, options, "8M")?;
        run.tools
            .must("qemu-img", &["bitmap", "--add", "-g", "512", QEMU, "fine"])?;
        run.tools
            .must("qemu-img", &["bitmap", "--add", QEMU, "coarse"])?;
        run.tools.must(
            "qemu-img",
            &["bitmap", "--add", "--disable", QEMU, "disabled"],
        )?;
        io(run, &["write -P 1 0 100k", "write -P 2 5M 10k"])?;
        must(run.create(b"a")?)?;
        io(run, &["write -P 3 50k 100k"])?;
        run.keep_handle = true;
        must(run.create(b"b")?)?;
        let done = run.goto(b"a")?;
        must_fail(run, done, libc::EBUSY)?;
        must(run.delete(b"a")?)?;
        must(run.delete(b"b")?)?;
        run.keep_handle = false;
    }
    Ok(None)
}

fn autoclear(run: &mut Run) -> R<Option<&'static str>> {
    for options in ["cluster_size=512", "", "lazy_refcounts=on"] {
        for verb in 0..3 {
            create(run, options, "1M")?;
            io(run, &["write -P 1 0 100k"])?;
            must(run.create(b"a")?)?;
            craft::unknown_autoclear(&run.qemu, &mut Rng::new(verb))?;
            run.sync()?;
            // A verb that fails before it changes anything must leave the bit (QEMU clears it).
            let done = run.goto(b"nobody")?;
            must_fail(run, done, libc::ENOENT)?;
            must(match verb {
                0 => run.create(b"b")?,
                1 => run.goto(b"a")?,
                _ => run.delete(b"a")?,
            })?;
        }
    }
    Ok(None)
}

fn header_byte(run: &mut Run, off: u64, bits: u8) -> R<()> {
    let f = files::open_rw(&run.qemu)?;
    let mut b = [0u8];
    files::read_at(&f, off, &mut b)?;
    at("write", f.write_all_at(&[b[0] | bits], off))?;
    run.sync()
}

fn dirty(run: &mut Run) -> R<Option<&'static str>> {
    if run.self_mode() {
        return Ok(Some("qemu-img repairs at open; only the library refuses"));
    }
    create(run, "lazy_refcounts=on", "1M")?;
    io(run, &["write -P 1 0 100k"])?;
    must(run.create(b"a")?)?;
    header_byte(run, 79, 1)?;
    for v in [
        Verb::Create {
            name: b"b".to_vec(),
        },
        Verb::Goto {
            what: b"a".to_vec(),
        },
    ] {
        if run.verb(&v)? {
            return Err("a dirty image was changed".into());
        }
        header_byte(run, 79, 1)?;
    }
    Ok(None)
}

fn corrupt(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "", "1M")?;
    io(run, &["write -P 1 0 100k"])?;
    must(run.create(b"a")?)?;
    header_byte(run, 79, 2)?;
    for v in [
        Verb::Create {
            name: b"b".to_vec(),
        },
        Verb::Goto {
            what: b"a".to_vec(),
        },
        run.delete_verb(b"a", 0)?,
    ] {
        let done = run.verb(&v)?;
        must_fail(run, done, libc::EACCES)?;
    }
    Ok(None)
}

fn data_file(run: &mut Run) -> R<Option<&'static str>> {
    create(run, "data_file=data.raw", "1M")?;
    let done = run.create(b"b")?;
    must_fail(run, done, libc::ENOTSUP)?;
    Ok(None)
}

fn encrypted(run: &mut Run) -> R<Option<&'static str>> {
    run.tools.must(
        "qemu-img",
        &[
            "create",
            "-q",
            "--object",
            "secret,id=s,data=abc",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
            QEMU,
            "1M",
        ],
    )?;
    run.tools.luks = true;
    run.sync()?;
    io(run, &["write -P 1 0 100k"])?;
    must(run.create(b"a")?)?;
    io(run, &["write -P 2 50k 100k"])?;
    run.keep_handle = true;
    must(run.create(b"b")?)?;
    must(run.goto(b"a")?)?;
    must(run.delete(b"a")?)?;
    must(run.delete(b"b")?)?;
    run.keep_handle = false;
    Ok(None)
}

/// Two snapshots with the state of machines (tests/images/savevm), changed in every way.
fn savevm(run: &mut Run) -> R<Option<&'static str>> {
    let packed = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/images/savevm/image.qcow2.gz"
    );
    let packed = at("the image of savevm", std::fs::File::open(packed))?;
    let mut file = at("create", std::fs::File::create(&run.qemu))?;
    let mut from = flate2::read::GzDecoder::new(packed);
    at("unpack", std::io::copy(&mut from, &mut file))?;
    drop(file);
    run.sync()?;
    let before = Qcow::open(&run.qemu)?;
    if before.snaps.len() != 2 || before.snaps.iter().any(|s| s.vm_size() < 30_000) {
        return Err("not the two snapshots with VM state".into());
    }
    must(run.goto(b"a")?)?;
    // The active L1 has the VM state of a now; a new snapshot of the disk releases it.
    must(run.create(b"c")?)?;
    must(run.goto(b"b")?)?;
    io(run, &["write -P 5 3k 30k"])?;
    must(run.create(b"d")?)?;
    must(run.delete(b"a")?)?;
    must(run.goto(b"c")?)?;
    must(run.goto(b"b")?)?;
    must(run.delete(b"b")?)?;
    must(run.goto(b"d")?)?;
    must(run.delete(b"c")?)?;
    must(run.delete(b"d")?)?;
    Ok(None)
}
