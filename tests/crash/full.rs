// Included by crash.rs: full disks, on which the image is sparse.

/// Run each verb of a chain on a full disk. It does what it does on any other disk, or it fails before
/// the publish; but never for want of a place for a temporary L1 table.
fn full_disk(run: &Run, chain: &Chain) {
    let mut before = chain.image.clone();
    for (i, verb) in chain.verbs.iter().enumerate() {
        let (Ok(old), Ok(_)) = (judge(&before), memory(&before, OpenFlags::RDWR)) else {
            return;
        };
        let name = format!("{}, verb {i} {}", chain.name, verb.kind());
        let Some(clean) = clean_run(run, &name, &before, &old, verb) else {
            continue;
        };
        for block in [512, 4096] {
            match on_full_disk(&before, verb, &clean, block) {
                Ok((text, judged)) => {
                    let mut sums = run.sums.lock().unwrap();
                    let of_verb = sums.verbs.entry(format!("{}, {text}", verb.kind())).or_default();
                    *of_verb = (of_verb.0 + 1, of_verb.1 + judged);
                }
                Err((why, image)) => {
                    run.loss(&name, &format!("blocks of {block}"), &why, &before, &image);
                }
            }
        }
        before = clean.after;
    }
}

/// What has the verb come to, and how many images were judged?
fn on_full_disk(
    before: &[u8],
    verb: &Verb,
    clean: &Clean,
    block: u64,
) -> Result<(&'static str, u64), (String, Vec<u8>)> {
    let storage = recorder(before);
    let trace = storage.trace();
    let bad = |why: String| Err((why, trace.contents()));
    let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
    trace.fill_disk(block);
    let calls = watch(&mut image, 0);
    let result = verb.run(&mut image);
    if let Err(why) = told_the_truth(&calls.borrow(), result.is_ok()) {
        return bad(why);
    }
    let events = trace.events();
    let temporary = |e: &Event| e.label() == "temporary L1 table";
    let mut sides = clean.sides.clone();
    let text = match result {
        Ok(()) => {
            if image.last_outcome() != Outcome::Done {
                return bad(format!("done, and the outcome is {:?}", image.last_outcome()));
            }
            if trace.contents() != clean.after {
                return bad("other bytes than on a disk with room".into());
            }
            sides.mixture = image.remark().is_some();
            match (events.iter().any(temporary), clean.events.iter().any(temporary)) {
                (false, true) if !sides.mixture => return bad("in place without a remark".into()),
                (false, true) => "in place",
                (true, true) if events != clean.events => "another way",
                _ => "done",
            }
        }
        Err(e) if e.errno() != libc::ENOSPC || image.last_outcome() == Outcome::Unknown => {
            return bad(format!("outcome {:?}: {e}", image.last_outcome()));
        }
        Err(e) if e.to_string().starts_with("temporary L1 table") => {
            return bad(format!("there are other ways: {e}"));
        }
        // A hole in a refcount block, where the disk has blocks of 512 bytes: clusters leak.
        Err(_) if image.last_outcome() == Outcome::Done => "done, and leaked",
        Err(_) => "no space",
    };
    let (mut seen, mut judged) = (HashSet::new(), 0);
    let plan = plan(before.len(), hash(before, block));
    for cut in crash_images(before, &events, &plan) {
        if seen.insert(hash(&cut.bytes, 4)) {
            judged += 1;
            match assess(&cut.bytes, &sides) {
                Ok((_, Side::New)) if text == "no space" => {
                    return Err((format!("{}: failed and done", cut.what), cut.bytes))
                }
                Ok((_, Side::Old)) if text != "no space" && cut.stable == events.len() => {
                    return Err((format!("{}: done, and the old state", cut.what), cut.bytes))
                }
                Ok(_) => {}
                Err(why) => return Err((format!("{}: {why}", cut.what), cut.bytes)),
            }
        }
    }
    Ok((text, judged))
}

#[test]
fn a_full_disk_is_found_before_the_publish_and_needs_no_temporary_l1() {
    let run = Run::new(u64::MAX);
    run.over(small_chains(), full_disk);
    run.over(
        cases::rare(1).into_iter().filter(|c| c.name.starts_with("goto")).collect(),
        full_disk,
    );
    run.finish("full disks");
}

/// A temporary L1 table leaves the hole that it found, or the bytes, but not zeros written into a hole.
#[test]
fn a_hole_that_held_a_temporary_l1_stays_one() {
    let (mut holes, mut zeros_written) = (0, 0);
    for chain in cases::rare(4).iter().filter(|c| c.name.starts_with("goto")) {
        let storage = recorder(&chain.image);
        let trace = storage.trace();
        let mut image = Image::open_storage(Box::new(storage), OpenFlags::RDWR).unwrap();
        if chain.verbs[0].run(&mut image).is_err() {
            continue;
        }
        let mut place = None;
        for e in trace.events() {
            match e {
                Event::Write { label: "temporary L1 table", offset, .. } => place = Some(offset),
                Event::Write { label: "free clusters", data, .. } => {
                    zeros_written += u64::from(data.iter().all(|b| *b == 0));
                }
                Event::Discard { offset, .. } => holes += u64::from(place == Some(offset)),
                _ => {}
            }
        }
    }
    assert!(holes > 0 && zeros_written == 0, "{holes} holes, {zeros_written} times zeros");
}
