// Included by crash.rs: the judge finds what it is there to find, and QEMU's own order of writes.

/// Each kind of damage, done by hand to a good image.
#[test]
fn the_judge_notices_every_kind_of_damage() {
    let shape = craft::Shape {
        packed: 2,
        ..craft::Shape::default()
    };
    let good = craft::image(shape, 5);
    let verdict = judge(&good).unwrap();
    let at = |n: usize| judge::be64(&good, n);
    let (l1, l1_size) = (at(40) as usize, judge::be32(&good, 36) as usize);
    let mask = 0x00ff_ffff_ffff_fe00u64;
    let l2 = (0..l1_size)
        .map(|i| at(l1 + i * 8))
        .find(|e| e & mask != 0)
        .unwrap()
        & mask;
    let words = || (0..64).map(|i| l2 as usize + i * 8);
    let data = words()
        .find(|p| at(*p) & mask != 0 && at(*p) >> 62 & 1 == 0)
        .unwrap();
    let shared = words()
        .find(|p| at(*p) >> 62 & 1 == 0 && verdict.named.contains(&((at(*p) & mask) >> 9)))
        .expect("a cluster that a snapshot names");
    let reftable = at(48) as usize;
    let block = (at(reftable) & mask) as usize;
    let count_at = |cluster: u64| block + cluster as usize * 2;
    let of = |word: u64, p: usize| -> Vec<u8> {
        let mut image = good.clone();
        image[p..p + 8].copy_from_slice(&word.to_be_bytes());
        image
    };
    let refused = |image: Vec<u8>, what: &str| {
        let said = match judge(&image) {
            Err(why) => why,
            Ok(v) if v.state != verdict.state => "another state".into(),
            Ok(_) => panic!("not noticed: {what}"),
        };
        println!("  {what}: {said}");
    };
    refused(
        of(at(shared) | 1 << 63, shared),
        "COPIED on a cluster that a snapshot names",
    );
    refused(of(at(data) & !mask | l2, data), "data in an L2 table");
    refused(
        of(at(l1) & !mask | (block as u64), l1),
        "an L2 table in a refcount block",
    );
    refused(of(at(l1) & !mask, l1), "a lost L2 table");
    refused(of(0, data), "lost data");
    refused(of(at(64) + 512, 64), "another snapshot table");
    refused(of(0, reftable), "a lost refcount block");
    refused(of(at(24) + 512, 24), "another size");
    for (cluster, what) in [
        (l2 >> 9, "L2 table"),
        ((at(data) & mask) >> 9, "data"),
        (0, "header"),
    ] {
        let mut image = good.clone();
        image[count_at(cluster)] = 0;
        image[count_at(cluster) + 1] -= 1;
        refused(image, &format!("{what} counted too low"));
    }
    let mut image = good.clone();
    image[(at(data) & mask) as usize + 100] ^= 1;
    refused(image, "one bit of guest data");
}

/// Losses when the disk ignores barriers, by verb.
fn without_barriers(chain: &Chain) -> BTreeMap<&'static str, u64> {
    let run = Run::new(u64::MAX);
    let mut losses = BTreeMap::new();
    let mut before = chain.image.clone();
    for verb in &chain.verbs {
        let old = judge(&before).unwrap();
        let Some(clean) = clean_run(&run, &chain.name, &before, &old, verb) else {
            continue;
        };
        let events: Vec<Event> = clean
            .events
            .iter()
            .filter(|e| **e != Event::Barrier)
            .cloned()
            .collect();
        let plan = CrashPlan {
            exhaustive: 2,
            singles: 16,
            random: 8,
            seed: 1,
            torn: 1,
        };
        let lost = crash_images(&before, &events, &plan)
            .filter(|cut| assess(&cut.bytes, &clean.sides).is_err())
            .count();
        *losses.entry(verb.kind()).or_default() += lost as u64;
        before = clean.after;
    }
    losses
}

#[test]
fn every_verb_would_lose_data_on_a_disk_that_ignores_barriers() {
    let mut losses: BTreeMap<&str, u64> = BTreeMap::new();
    for chain in cases::rare(1).iter().take(18) {
        for (kind, n) in without_barriers(chain) {
            *losses.entry(kind).or_default() += n;
        }
    }
    println!("losses without barriers: {losses:?}");
    for kind in ["create", "create with VM state", "delete", "goto"] {
        assert!(
            losses.get(kind).is_some_and(|n| *n > 0),
            "{kind}: {losses:?}"
        );
    }
}

/// What qemu-img writes, from its `blklogwrites` driver (the format of Linux's dm-log-writes).
fn recorded(log: &[u8]) -> Vec<Event> {
    use byteorder::{ByteOrder, LittleEndian as LE};
    let sector = LE::read_u32(&log[24..]) as usize;
    let mut events = vec![];
    let mut at = sector;
    for _ in 0..LE::read_u64(&log[16..]) {
        let field = |i: usize| LE::read_u64(&log[at + i * 8..]);
        let (offset, bytes, flags) = (
            field(0) * sector as u64,
            field(1) as usize * sector,
            field(2),
        );
        at += sector;
        match flags {
            f if f & 4 != 0 => events.push(Event::Discard {
                offset,
                bytes: bytes as u64,
            }),
            f if f & 1 != 0 && bytes == 0 => events.push(Event::Barrier),
            _ => {
                let data = log[at..at + bytes].to_vec();
                at += bytes;
                events.push(Event::Write {
                    label: "QEMU's write",
                    offset,
                    data,
                });
            }
        }
    }
    events
}

/// Beside ours, the same cuts in the writes of qemu-img: what our order is for.
#[test]
fn the_same_cuts_in_the_writes_of_qemu_img() {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let file = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let chains = cases::rare(seeds());
    let mut totals: BTreeMap<&str, (u64, u64, BTreeMap<String, u64>)> = BTreeMap::new();
    for chain in chains.iter().take(16).filter(|c| c.image.len() < 200 << 10) {
        let mut before = chain.image.clone();
        for verb in &chain.verbs {
            let (flag, name) = match verb {
                Verb::Create(new) if new.vm_state_size == 0 => ("-c", new.name.clone()),
                Verb::Goto(name) => ("-a", name.clone()),
                Verb::Delete(name) => ("-d", name.clone()),
                _ => continue,
            };
            std::fs::write(file("image"), &before).unwrap();
            std::fs::write(file("log"), b"").unwrap();
            let options = format!(
                "driver=qcow2,file.driver=blklogwrites,file.log-sector-size=512,file.file.driver=file,file.file.filename={},file.log.driver=file,file.log.filename={}",
                file("image"),
                file("log")
            );
            let name = String::from_utf8(name).unwrap();
            let out = std::process::Command::new("qemu-img")
                .args(["snapshot", "--image-opts", flag, &name, &options])
                .output();
            let out = match out {
                Ok(out) => out,
                Err(e) => {
                    println!("SKIPPED: no qemu-img ({e}), so QEMU's own writes were not cut");
                    return;
                }
            };
            if !out.status.success() {
                let said = String::from_utf8_lossy(&out.stderr).into_owned();
                if said.contains("blklogwrites") {
                    println!("SKIPPED: qemu-img cannot log its writes here: {said}");
                    return;
                }
                continue;
            }
            let after = std::fs::read(file("image")).unwrap();
            let events = recorded(&std::fs::read(file("log")).unwrap());
            let (Ok(old), Ok(new)) = (judge(&before), judge(&after)) else {
                continue;
            };
            let sides = Sides {
                old: old.state,
                new: new.state,
                kind: verb.kind(),
                mixture: false,
                unknown_autoclear: None,
            };
            let total = totals.entry(verb.kind()).or_default();
            let mut seen = HashSet::new();
            for cut in crash_images(&before, &events, &plan(before.len(), 7)) {
                if !seen.insert(hash(&cut.bytes, 1)) {
                    continue;
                }
                total.0 += 1;
                if let Err(why) = assess(&cut.bytes, &sides) {
                    total.1 += 1;
                    let why = why
                        .split(|c: char| c == ':' || c.is_ascii_digit())
                        .next()
                        .unwrap_or_default()
                        .trim()
                        .to_owned();
                    *total.2.entry(why).or_default() += 1;
                }
            }
            before = after;
        }
    }
    println!(
        "the same cuts in qemu-img's own writes (for comparison, not a claim about this library):"
    );
    for (kind, (images, losses, why)) in &totals {
        println!("  {kind}: {images} images judged, {losses} break a rule");
        for (why, n) in why {
            println!("    {n}: {why}");
        }
    }
    let goto = totals.get("goto").map_or(0, |t| t.1);
    assert!(
        goto > 0,
        "qemu-img's goto is known to be unsafe; does the judge see it? {totals:?}"
    );
}

/// For docs/crash-safety.md: each group of writes, and what a reader sees when the power goes in it.
#[test]
fn a_reader_sees_the_old_state_then_the_new_one_and_never_the_old_one_again() {
    let run = Run::new(u64::MAX);
    let mut told = HashSet::new();
    for chain in cases::rare(1).iter().take(20) {
        let mut before = chain.image.clone();
        for verb in &chain.verbs {
            let old = judge(&before).unwrap();
            let Some(clean) = clean_run(&run, &chain.name, &before, &old, verb) else {
                continue;
            };
            let mut last = Side::Old;
            let mut lines = vec![];
            for group in qcow2_snapshot::io::trace::groups(&clean.events) {
                let base = qcow2_snapshot::io::trace::image_after(
                    &before,
                    &clean.events[..group.start],
                    |_| qcow2_snapshot::io::trace::Apply::Full,
                );
                let mut seen = vec![];
                for cut in crash_images(&base, &clean.events[group.clone()], &plan(base.len(), 1)) {
                    let (_, side) = assess(&cut.bytes, &clean.sides).unwrap();
                    if !seen.contains(&side) {
                        seen.push(side);
                    }
                }
                let mixed = clean.sides.mixture || seen.contains(&Side::Both);
                assert!(
                    mixed || last != Side::New || seen == [Side::New],
                    "{}: {seen:?} after new",
                    chain.name
                );
                if seen.contains(&Side::New) && !seen.contains(&Side::Old) {
                    last = Side::New;
                }
                let mut labels: Vec<&str> = vec![];
                for e in &clean.events[group] {
                    if labels.last() != Some(&e.label()) {
                        labels.push(e.label());
                    }
                }
                lines.push(format!("    {seen:?}: {}", labels.join(", ")));
            }
            if told.insert((verb.kind(), lines.len(), clean.sides.mixture)) {
                println!("  {} ({})\n{}", verb.kind(), chain.name, lines.join("\n"));
            }
            before = clean.after;
        }
    }
}
