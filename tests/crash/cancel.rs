// Included by crash.rs: verbs that the progress hook cancels.

use qcow2_snapshot::Stage;

/// What the hook was told, and at which call it cancels (0: never).
type Calls = std::rc::Rc<std::cell::RefCell<Vec<(Stage, u64, u64)>>>;

fn watch(image: &mut Image, cancel_at: usize) -> Calls {
    let calls = Calls::default();
    let told = std::rc::Rc::clone(&calls);
    image.set_progress(Some(Box::new(move |stage, done, total| {
        let mut told = told.borrow_mut();
        told.push((stage, done, total));
        if told.len() == cancel_at {
            std::ops::ControlFlow::Break(())
        } else {
            std::ops::ControlFlow::Continue(())
        }
    })));
    calls
}

/// The stages in order; in each, one total and a share that only grows; all of it at the end of
/// every stage but the one in which the verb was cancelled.
fn told_the_truth(calls: &[(Stage, u64, u64)], whole: bool) -> Result<(), String> {
    let stages = [Stage::Check, Stage::Prepare, Stage::Reclaim];
    let reached = stages
        .iter()
        .take_while(|s| calls.iter().any(|c| c.0 == **s));
    let reached: Vec<Stage> = reached.copied().collect();
    let complete = |stage: Stage| {
        let of_stage: Vec<_> = calls.iter().filter(|c| c.0 == stage).collect();
        let grows = of_stage
            .windows(2)
            .all(|w| w[0].1 <= w[1].1 && w[0].2 == w[1].2);
        let within = of_stage.iter().all(|c| c.1 <= c.2 && c.2 > 0);
        let full = of_stage.iter().filter(|c| c.1 == c.2).count();
        let cancelled = !whole && reached.last() == Some(&stage);
        grows && within && (full == 1 || cancelled && full == 0)
    };
    let in_order = calls.windows(2).all(|w| w[0].0 as i32 <= w[1].0 as i32);
    if !in_order || !reached.iter().all(|s| complete(*s)) || (whole && reached != stages) {
        return Err(format!("the hook was told {calls:?}"));
    }
    Ok(())
}

/// Cancel each verb of a chain at each call of the hook.
fn cancelled(run: &Run, chain: &Chain) {
    let mut before = chain.image.clone();
    for (i, verb) in chain.verbs.iter().enumerate() {
        let (Ok(old), Ok(_)) = (judge(&before), memory(&before, OpenFlags::RDWR)) else {
            return;
        };
        let name = format!("{}, verb {i} {}", chain.name, verb.kind());
        let Some(clean) = clean_run(run, &name, &before, &old, verb) else {
            continue;
        };
        let (mut seen, mut judged) = (HashSet::new(), 0);
        for nth in 1.. {
            match one_cancel(&before, verb, &clean, nth, &mut seen, &mut judged) {
                Ok(true) => {}
                Ok(false) => break,
                Err((why, image)) => {
                    run.loss(
                        &name,
                        &format!("cancelled at call {nth}"),
                        &why,
                        &before,
                        &image,
                    );
                    break;
                }
            }
        }
        let mut sums = run.sums.lock().unwrap();
        let of_verb = sums.verbs.entry(verb.kind().into()).or_default();
        *of_verb = (of_verb.0 + 1, of_verb.1 + judged);
        drop(sums);
        before = clean.after;
    }
}

/// Cancel at the `nth` call. Was there one? What is wrong, and in which image?
fn one_cancel(
    before: &[u8],
    verb: &Verb,
    clean: &Clean,
    nth: usize,
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
    let calls = watch(&mut image, nth);
    let result = verb.run(&mut image);
    let events = trace.events();
    let (now, calls) = (trace.contents(), calls.borrow().clone());
    let stage = calls.get(nth - 1).map(|c| c.0);
    if let Err(why) = told_the_truth(&calls, result.is_ok()) {
        return bad(why);
    }
    if stage.is_none_or(|s| s == Stage::Reclaim) {
        // Not cancelled, or too late: the same bytes, in the same order.
        return match result {
            Err(e) => bad(format!("not cancelled, and it failed: {e}")),
            Ok(()) if events != clean.events || now != clean.after => {
                bad("the verb does something else when it is watched".into())
            }
            Ok(()) if image.last_outcome() != Outcome::Done => bad(format!(
                "done, and the outcome is {:?}",
                image.last_outcome()
            )),
            Ok(()) => Ok(stage.is_some()),
        };
    }

    match result {
        Err(e) if e.errno() == libc::ECANCELED => {}
        other => return bad(format!("cancelled, and the answer is {other:?}")),
    }
    if image.last_outcome() != Outcome::Unchanged || calls.len() != nth {
        return bad(format!(
            "outcome {:?}, calls {calls:?}",
            image.last_outcome()
        ));
    }
    if stage == Some(Stage::Check) && !events.is_empty() {
        return bad("cancelled while it looked, and something was written".into());
    }
    if events != clean.events[..events.len()] {
        return bad("a verb that is cancelled writes something else first".into());
    }
    // The image now, and after a power cut that follows at once.
    let (_, cuts) = cuts_now(before, &events, nth as u64);
    for bytes in std::iter::once(now.clone()).chain(cuts.into_iter().map(|c| c.bytes)) {
        if !seen.insert(hash(&bytes, 2)) {
            continue;
        }
        *judged += 1;
        match assess(&bytes, &clean.sides) {
            Ok((_, Side::Old | Side::Both)) => {}
            Ok((_, Side::New)) => return Err(("cancelled, and yet done".into(), bytes)),
            Err(why) => return Err((why, bytes)),
        }
    }

    // The handle.
    image.set_progress(None);
    let verdict = judge(&now).map_err(|e| (e, now.clone()))?;
    if let Err(e) = same_list(&mut image, &verdict.state) {
        return bad(e);
    }
    let again = verb.run(&mut image);
    if events.is_empty() {
        if let Err(e) = again {
            return bad(format!("nothing was written, and the handle refuses: {e}"));
        }
        if trace.contents() != clean.after {
            return bad("the second try leaves other bytes than the first would have".into());
        }
    } else if again.err().map(|e| e.errno()) != Some(libc::EIO) || trace.contents() != now {
        return bad("a handle whose verb was cancelled while it wrote changes the image".into());
    }
    match image.close() {
        Err(e) => bad(format!("close: {e}")),
        Ok(()) => Ok(true),
    }
}

#[test]
fn a_cancelled_verb_leaves_the_old_state_and_one_that_took_effect_is_finished() {
    let run = Run::new(50);
    run.over(small_chains(), cancelled);
    run.finish("cancelled verbs");
}
