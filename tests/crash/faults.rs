// Included by crash.rs: failing disks.

/// Where in the log of a clean run the publishing writes are: (event, decisive). The decisive one is
/// that after which the new state stands; where the L1 is written in place for lack of space, the
/// old state has ended earlier.
fn publishing(before: &[u8], clean: &Clean) -> Vec<(usize, bool)> {
    let mut out = vec![];
    let (mut was_old, mut is_new) = (true, false);
    // VM state leaves the active disk after the decisive write of a create.
    let vm = |s: &State| {
        if clean.sides.kind == "create with VM state" {
            0
        } else {
            s.beyond
        }
    };
    let key = |s: &State| (s.size, s.disk, vm(s), s.snaps.clone());
    let (old, new) = (key(&clean.sides.old), key(&clean.sides.new));
    for (i, image) in prefixes(before, &clean.events).skip(1).enumerate() {
        let Event::Write { label, .. } = &clean.events[i] else {
            continue;
        };
        let Ok(state) = judge(&image.bytes).map(|v| key(&v.state)) else {
            continue;
        };
        let decisive = old != new && !is_new && state == new;
        let ends_old = was_old && state != old;
        is_new |= decisive;
        was_old &= !ends_old;
        if decisive || ends_old || *label == "header" {
            out.push((i, decisive));
        }
    }
    out
}

/// What may be said after a failure that came when `done` events were logged.
fn outcomes(clean: &Clean, publishing: &[(usize, bool)], done: usize) -> Vec<Outcome> {
    let barrier_after = |i: usize| {
        let after = clean
            .events
            .iter()
            .skip(i)
            .position(|e| *e == Event::Barrier);
        after.map_or(usize::MAX, |n| i + n)
    };
    let mut out = vec![Outcome::Unchanged];
    if publishing.is_empty() {
        // Old and new read the same. The verb cannot know: a sector of the L1 may still publish it.
        let mut out = vec![Outcome::Unchanged, Outcome::Done];
        let l1 = |e: &Event| matches!(e, Event::Write { label, .. } if *label == "L1 table");
        let publish = clean.events.iter().position(l1);
        if publish.is_some_and(|i| done >= i && done <= barrier_after(i)) {
            out.push(Outcome::Unknown);
        }
        return out;
    }
    // A verb without a visible switch (same list, same disk) is done at its last header write.
    let decisive = publishing.iter().find(|p| p.1).or(publishing.last());
    for (i, _) in publishing {
        let is_decisive = decisive.is_some_and(|d| d.0 == *i);
        if done >= *i && done <= barrier_after(*i) && out[0] == Outcome::Unchanged {
            out = vec![Outcome::Unknown];
        } else if is_decisive && done > barrier_after(*i) {
            out = vec![Outcome::Done];
        } else if done > barrier_after(*i) && out[0] == Outcome::Unknown {
            out = vec![Outcome::Unchanged];
        }
    }
    out
}

fn fault_plans(n: u64) -> Vec<(FaultPlan, &'static str)> {
    let eio = FaultPlan::nth(n, libc::EIO);
    let enospc = FaultPlan::nth(n, libc::ENOSPC);
    let mut plans = vec![
        (eio, "once"),
        (enospc.persistent(), "from then on"),
        (eio.torn(512), "torn after a sector"),
        (eio.torn(usize::MAX), "all landed"),
        (eio.torn(512).persistent(), "torn, from then on"),
    ];
    if all() {
        plans.push((enospc, "once, no space"));
        plans.push((eio.persistent(), "from then on, EIO"));
        plans.push((enospc.torn(1024), "torn after two sectors, no space"));
        plans.push((
            eio.torn(usize::MAX).persistent(),
            "all landed, from then on",
        ));
    }
    plans
}

/// Fail each request of each verb of a chain.
fn failing_disk(run: &Run, chain: &Chain) {
    let mut before = chain.image.clone();
    for (i, verb) in chain.verbs.iter().enumerate() {
        let (Ok(old), Ok(_)) = (judge(&before), memory(&before, OpenFlags::RDWR)) else {
            return;
        };
        let name = format!("{}, verb {i} {}", chain.name, verb.kind());
        let Some(clean) = clean_run(run, &name, &before, &old, verb) else {
            continue;
        };
        let publishing = publishing(&before, &clean);
        let mut seen = HashSet::new();
        let (mut faults, mut judged) = (0, 0);
        let kinds = [
            None,
            Some(RequestKind::Write),
            Some(RequestKind::Barrier),
            Some(RequestKind::Read),
            Some(RequestKind::Truncate),
            Some(RequestKind::Discard),
        ];
        for kind in kinds {
            for nth in 1.. {
                let mut fired = false;
                for (plan, how) in fault_plans(nth) {
                    let torn = plan.torn > 0;
                    if torn && !matches!(kind, Some(RequestKind::Write)) {
                        continue;
                    }
                    // Failures of every kind, once, are the same as those of each kind.
                    if kind.is_none() && !plan.persistent {
                        continue;
                    }
                    let plan = FaultPlan { kind, ..plan };
                    let what = format!("{how}: request {nth} of {kind:?}, errno {}", plan.errno);
                    let problem = one_fault(
                        &before,
                        verb,
                        &clean,
                        &publishing,
                        plan,
                        &mut seen,
                        &mut judged,
                    );
                    match problem {
                        Ok(hit) => fired |= hit,
                        Err((why, image)) => {
                            fired = true;
                            run.loss(&name, &what, &why, &before, &image);
                        }
                    }
                    faults += u64::from(fired);
                }
                if !fired {
                    break;
                }
            }
        }
        let mut sums = run.sums.lock().unwrap();
        let of_verb = sums.verbs.entry(verb.kind().into()).or_default();
        *of_verb = (of_verb.0 + 1, of_verb.1 + judged);
        sums.faults += faults;
        drop(sums);
        before = clean.after;
    }
}

/// A few power cuts right now: in the group since the last barrier, which begins at this event.
fn cuts_now(before: &[u8], events: &[Event], seed: u64) -> (usize, Vec<CrashImage>) {
    let plan = CrashPlan {
        exhaustive: 3,
        singles: if all() { 16 } else { 4 },
        random: if all() { 8 } else { 2 },
        seed,
        torn: 1,
    };
    let last_group = events
        .iter()
        .rposition(|e| *e == Event::Barrier)
        .map_or(0, |i| i + 1);
    let base = qcow2_snapshot::io::trace::image_after(before, &events[..last_group], |_| {
        qcow2_snapshot::io::trace::Apply::Full
    });
    let cuts = crash_images(&base, &events[last_group..], &plan).collect();
    (last_group, cuts)
}

/// Small images of every kind.
fn small_chains() -> Vec<Chain> {
    let (mut chains, _) = cases::reference(if all() { 400 << 10 } else { 24 << 10 });
    chains.extend(
        cases::rare(seeds())
            .into_iter()
            .filter(|c| c.image.len() < if all() { 600 << 10 } else { 40 << 10 }),
    );
    let n = number("CRASH_RANDOM", if all() { 300 } else { 20 });
    chains.extend(
        (1..=n)
            .map(cases::random)
            .filter(|c| c.image.len() < 100 << 10),
    );
    chains
}

/// Run the verb with one plan of failure. Did anything fail? What is wrong, and in which image?
fn one_fault(
    before: &[u8],
    verb: &Verb,
    clean: &Clean,
    publishing: &[(usize, bool)],
    plan: FaultPlan,
    seen: &mut HashSet<u64>,
    judged: &mut u64,
) -> Result<bool, (String, Vec<u8>)> {
    let storage = recorder(before);
    let trace = storage.trace();
    let bad = |why: String| Err((why, trace.contents()));
    let mut image = match Image::open_storage(Box::new(storage), OpenFlags::RDWR) {
        Ok(image) => image,
        Err(e) => return bad(format!("open: {e}")),
    };
    trace.set_fault(Some(plan));
    let counts = trace.counts();
    let result = verb.run(&mut image);
    let hit = trace.fired() > 0;
    let events = trace.events();
    trace.set_fault(None);
    if !hit {
        return match result {
            Ok(()) => Ok(false),
            Err(e) => bad(format!("the verb failed without a failing request: {e}")),
        };
    }

    // Errno and outcome.
    let outcome = image.last_outcome();
    let asked = trace.counts();
    let attempted = (
        asked.writes,
        asked.truncates,
        asked.barriers,
        asked.discards,
    ) != (
        counts.writes,
        counts.truncates,
        counts.barriers,
        counts.discards,
    );
    let common = events
        .iter()
        .zip(&clean.events)
        .take_while(|(a, b)| a == b)
        .count();
    match &result {
        Ok(()) => {
            // Only discards and the last truncate may fail unnoticed, and a temporary L1 table that
            // has no room: there are other ways.
            // A write that failed and landed all the same is in both logs.
            let mut writes = clean.events.iter().filter(|e| matches!(e, Event::Write { .. }));
            let failed = match plan.kind {
                Some(RequestKind::Write) => writes.nth(plan.nth as usize - 1),
                _ => clean.events.get(common),
            };
            let failed = failed.map(Event::label);
            let room = plan.errno == libc::ENOSPC && failed == Some("temporary L1 table");
            let kind_ok = plan.kind.is_none()
                || room
                || matches!(
                    plan.kind,
                    Some(RequestKind::Discard | RequestKind::Truncate)
                );
            if !kind_ok || outcome != Outcome::Done {
                return bad(format!("a failed request, result 0, outcome {outcome:?}"));
            }
        }
        Err(e) => {
            if e.errno() != plan.errno {
                return bad(format!(
                    "errno {} instead of {}: {e}",
                    e.errno(),
                    plan.errno
                ));
            }
            let mut may = outcomes(clean, publishing, common);
            if plan.torn > 0 && events.len() > common {
                // The torn write itself is in the log.
                may = outcomes(clean, publishing, common);
            } else if plan.torn == usize::MAX && common > 0 {
                may.extend(outcomes(clean, publishing, common - 1));
            }
            if !attempted {
                may = vec![Outcome::Unchanged];
            }
            if !may.contains(&outcome) {
                return bad(format!(
                    "outcome {outcome:?}, not {may:?}, with {common} of {} events logged: {e}",
                    clean.events.len()
                ));
            }
        }
    }

    // The image, now and after a power cut that follows at once.
    let now = trace.contents();
    let cut_here = seen.insert(hash(format!("{events:?}").as_bytes(), 1));
    let mut sides_seen = vec![];
    let mut look = |bytes: &[u8], what: &str, stable: usize| -> Result<(), (String, Vec<u8>)> {
        *judged += 1;
        match assess(bytes, &clean.sides) {
            Ok((_, side)) => {
                sides_seen.push((side, stable));
                Ok(())
            }
            Err(why) => Err((format!("{what}: {why}"), bytes.to_vec())),
        }
    };
    look(&now, "after the failure", events.len())?;
    if cut_here {
        let (last_group, cuts) = cuts_now(before, &events, plan.nth);
        for cut in cuts {
            if seen.insert(hash(&cut.bytes, 2)) {
                look(
                    &cut.bytes,
                    &format!("power cut after the failure, {}", cut.what),
                    last_group,
                )?;
            }
        }
    }
    if outcome == Outcome::Unchanged && sides_seen.iter().any(|s| s.0 == Side::New) {
        return bad("outcome Unchanged, and the image may hold the new state".into());
    }
    if outcome == Outcome::Done && sides_seen.iter().any(|s| s.0 == Side::Old) {
        return bad("outcome Done, and the image may hold the old state".into());
    }

    // The handle.
    let verdict = judge(&now).map_err(|e| (e, now.clone()))?;
    if outcome != Outcome::Unknown {
        if let Err(e) = same_list(&mut image, &verdict.state) {
            return bad(format!("outcome {outcome:?}: {e}"));
        }
    } else if image.snapshot_list().is_ok() {
        return bad("a spent handle lists snapshots".into());
    }
    if result.is_err() {
        let again = verb.run(&mut image);
        if attempted {
            match again {
                Ok(()) => return bad("a handle that failed changes the image".into()),
                Err(e) if e.errno() != libc::EIO => {
                    return bad(format!("refused with errno {}: {e}", e.errno()))
                }
                Err(_) => {}
            }
            if trace.contents() != now {
                return bad("a handle that refuses has changed the image".into());
            }
        } else {
            if let Err(e) = again {
                return bad(format!("nothing was written, and the handle refuses: {e}"));
            }
            if trace.contents() != clean.after {
                return bad("the second try leaves other bytes than the first would have".into());
            }
        }
    }
    let at_close = trace.contents();
    if let Err(e) = image.close() {
        return bad(format!("close: {e}"));
    }
    if trace.contents() != at_close || trace.counts().closes != 1 {
        return bad("close changed the image, or did not close the storage once".into());
    }
    Ok(true)
}

#[test]
fn failing_disks_lose_nothing_and_outcomes_are_true() {
    let run = Run::new(50);
    run.over(small_chains(), failing_disk);
    run.finish("failing disks");
}

#[test]
fn a_failing_open_changes_nothing_and_says_why() {
    let chain = cases::rare(seeds()).swap_remove(0);
    for nth in 1.. {
        let storage = TraceStorage::new(chain.image.clone());
        let trace = storage.trace();
        trace.set_fault(Some(FaultPlan::nth(nth, libc::ENOSPC)));
        let result = Image::open_storage(Box::new(storage), OpenFlags::RDWR);
        assert_eq!(trace.contents(), chain.image);
        assert!(trace.events().is_empty());
        match result {
            Ok(_) => {
                assert_eq!(trace.fired(), 0);
                assert!(nth > 4);
                break;
            }
            Err(e) => assert_eq!(e.errno(), libc::ENOSPC),
        }
    }
}
