//! Faults planted in what the library writes, or says: the judge must find each.
//!
//! A fault is a change of the log, so that it stays a fault whatever the engine looks like inside.

use qcow2_snapshot::io::memory::MemoryStorage;
use qcow2_snapshot::io::trace::Event;
use qcow2_snapshot::{Image, OpenFlags, Outcome};

use super::{
    cuts, each_image, hanging, judge_log, outcome_is_true, read, run, verbs, Bound, Judge, Reading,
    Verb, CLUSTER,
};
use crate::model;
use crate::model::read::{read_damaged, Damage};

/// A verb that succeeded.
struct Sample {
    before: Vec<u8>,
    old: Reading,
    new: model::Image,
    verb: Verb,
    log: Vec<Event>,
    /// A cluster whose count is too low, and what hangs on it.
    low: Option<(u64, Vec<Vec<u8>>)>,
}

type Plant = fn(&Sample) -> Option<Vec<Event>>;

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn place(e: &Event) -> Option<(u64, &[u8])> {
    match e {
        Event::Write { offset, data, .. } => Some((*offset, data)),
        _ => None,
    }
}

fn moved(e: &Event, by: u64, longer: u64) -> Event {
    match e.clone() {
        Event::Write {
            label,
            offset,
            data,
        } => Event::Write {
            label,
            offset: offset + by,
            data,
        },
        Event::Discard { offset, bytes } => Event::Discard {
            offset: offset + by,
            bytes: bytes + longer,
        },
        other => other,
    }
}

fn is_header(e: &Event) -> bool {
    place(e).is_some_and(|(at, _)| at < CLUSTER)
}

fn is_barrier(e: &Event) -> bool {
    *e == Event::Barrier
}

fn is_discard(e: &Event) -> bool {
    matches!(e, Event::Discard { .. })
}

impl Sample {
    /// The first write to the header.
    fn publish(&self) -> Option<usize> {
        self.log.iter().position(is_header)
    }

    fn last_publish(&self) -> Option<usize> {
        self.log.iter().rposition(is_header)
    }

    fn is_count(&self, e: &Event) -> bool {
        let block = word(&self.before, word(&self.before, 48) as usize);
        place(e).is_some_and(|(at, _)| at / CLUSTER == block / CLUSTER)
    }

    /// A write that changes nothing but COPIED flags of what is there.
    fn is_flags(&self, e: &Event) -> bool {
        let Some((at, data)) = place(e) else {
            return false;
        };
        let old = self.before.get(at as usize..at as usize + data.len());
        let others = |(i, (a, b)): (usize, (&u8, &u8))| {
            (at as usize + i) % 8 == 0 && a ^ b == 0x80 || a == b
        };
        !self.is_count(e)
            && old.is_some_and(|old| old != data && old.iter().zip(data).enumerate().all(others))
    }

    /// The log without the events that `out` names.
    fn without(&self, out: impl Fn(usize, &Event) -> bool) -> Option<Vec<Event>> {
        let log: Vec<Event> = (0..self.log.len())
            .filter(|i| !out(*i, &self.log[*i]))
            .map(|i| self.log[i].clone())
            .collect();
        (log.len() < self.log.len()).then_some(log)
    }

    /// The log with the events that `which` names at another place.
    fn with_moved(&self, to: usize, which: impl Fn(usize, &Event) -> bool) -> Option<Vec<Event>> {
        let chosen = |i: &usize| which(*i, &self.log[*i]);
        let n = self.log.len();
        let rest = |i: &usize| !chosen(i);
        let order: Vec<usize> = (0..to)
            .filter(rest)
            .chain((0..n).filter(chosen))
            .chain((to..n).filter(rest))
            .collect();
        (!order.iter().copied().eq(0..n))
            .then(|| order.iter().map(|i| self.log[*i].clone()).collect())
    }

    /// The log with one event replaced.
    fn with(
        &self,
        which: impl Fn(usize, &Event) -> bool,
        by: impl Fn(&Event) -> Vec<Event>,
    ) -> Option<Vec<Event>> {
        let at = (0..self.log.len()).find(|i| which(*i, &self.log[*i]))?;
        let mut log = self.log.clone();
        log.splice(at..=at, by(&self.log[at]));
        (log != self.log).then_some(log)
    }
}

/// The faults in the order of writes.
const ORDER: &[(&str, Plant)] = &[
    ("no barriers", |s| {
        s.without(|i, e| is_barrier(e) && i + 1 < s.log.len())
    }),
    ("no barrier before the publish", |s| {
        let publish = s.publish()?;
        let last = s.log[..publish].iter().rposition(is_barrier)?;
        s.without(|i, _| i == last)
    }),
    ("no barrier after the publish", |s| {
        let publish = s.last_publish()?;
        s.without(|i, e| i == publish + 1 && is_barrier(e) && i + 1 < s.log.len())
    }),
    ("no barrier at the end", |s| {
        s.without(|i, _| i + 1 == s.log.len())
    }),
    ("the publish first of all", |s| {
        let publish = s.publish()?;
        s.with_moved(0, |i, _| i == publish)
    }),
    ("counts up after the publish", |s| {
        let publish = s.publish()?;
        s.with_moved(s.log.len() - 1, |i, e| i < publish && s.is_count(e))
    }),
    ("counts down before the publish", |s| {
        let publish = s.publish()?;
        s.with_moved(publish, |i, e| i > publish && s.is_count(e))
    }),
    ("counts not up", |s| {
        let publish = s.publish()?;
        s.without(|i, e| i < publish && s.is_count(e))
    }),
    ("counts not down", |s| {
        let publish = s.last_publish()?;
        s.without(|i, e| i > publish && s.is_count(e))
    }),
    ("one count not up", |s| {
        let publish = s.publish()?;
        s.with(
            |i, e| i < publish && s.is_count(e),
            |e| {
                let mut e = e.clone();
                if let Event::Write { offset, data, .. } = &mut e {
                    let old = &s.before[*offset as usize..];
                    let grown = (0..data.len().min(old.len()))
                        .rev()
                        .find(|i| data[*i] > old[*i]);
                    grown.into_iter().for_each(|i| data[i] -= 1);
                }
                vec![e]
            },
        )
    }),
    ("COPIED set before the publish", |s| {
        let publish = s.publish()?;
        s.with_moved(publish, |i, e| i > publish && s.is_flags(e))
    }),
    ("COPIED not cleared", |s| {
        let publish = s.publish()?;
        s.without(|i, e| i < publish && s.is_flags(e))
    }),
    ("COPIED not set again", |s| {
        let publish = s.last_publish()?;
        s.without(|i, e| i > publish && s.is_flags(e))
    }),
    ("holes before the publish", |s| {
        let publish = s.publish()?;
        s.with_moved(publish, |i, e| i > publish && is_discard(e))
    }),
    ("a hole in the wrong place", |s| {
        s.with(|_, e| is_discard(e), |e| vec![moved(e, CLUSTER, 0)])
    }),
    ("a hole that is too long", |s| {
        s.with(|_, e| is_discard(e), |e| vec![moved(e, 0, CLUSTER)])
    }),
    ("the first write to the wrong sector", |s| {
        s.with(|i, _| i == 0, |e| vec![moved(e, CLUSTER, 0)])
    }),
    ("the publish to the wrong sector", |s| {
        s.with(|_, e| is_header(e), |e| vec![moved(e, CLUSTER, 0)])
    }),
    ("no new snapshot table, L1 copy or L1", |s| {
        s.without(|i, e| i == 0 && !s.is_count(e) && !is_header(e))
    }),
    ("the publish in two halves", |s| {
        s.with(
            |_, e| is_header(e),
            |e| {
                let Event::Write {
                    label,
                    offset,
                    data,
                } = e
                else {
                    return vec![];
                };
                let (a, b) = data.split_at(((8 - offset % 8) as usize).min(data.len()));
                let half = |at: u64, data: &[u8]| Event::Write {
                    label,
                    offset: at,
                    data: data.to_vec(),
                };
                let all = vec![half(*offset, a), half(offset + a.len() as u64, b)];
                all.into_iter()
                    .filter(|e| place(e).is_some_and(|p| !p.1.is_empty()))
                    .collect()
            },
        )
    }),
    ("the disk size with the first epoch (part G, 1)", |s| {
        let (first, last) = (s.publish()?, s.last_publish()?);
        let size = s.new.active.size;
        if first == last || size == s.old.image.active.size {
            return None;
        }
        let write = Event::Write {
            label: "header",
            offset: 24,
            data: size.to_be_bytes().to_vec(),
        };
        s.with(|i, _| i == first, |e| vec![write.clone(), e.clone()])
    }),
    (
        "the L1 in place before the header names a temporary one",
        |s| {
            let publish = s.publish()?;
            let l1 = word(&s.before, 40);
            s.with_moved(publish, |i, e| {
                i > publish
                    && place(e).is_some_and(|p| p.0 / CLUSTER == l1 / CLUSTER)
                    && !s.is_flags(e)
            })
        },
    ),
    ("the file cut too short", |s| {
        let length = s.before.len() as u64 / CLUSTER * CLUSTER - CLUSTER;
        let last = s.log.len().checked_sub(1)?;
        s.with(
            |i, _| i == last,
            |e| vec![Event::Truncate { length }, e.clone()],
        )
    }),
    ("an entry with another ID", |s| {
        s.with(
            |_, e| place(e).is_some_and(|p| p.1.len() > 64 && p.1.len() < 160 && !s.is_count(e)),
            |e| {
                let mut e = e.clone();
                if let Event::Write { data, .. } = &mut e {
                    data[64] ^= 3;
                }
                vec![e]
            },
        )
    }),
];

type Lie = fn(Outcome) -> Outcome;

/// The faults in what the handle says after an error.
const OUTCOMES: &[(&str, Lie)] = &[
    ("unknown is called unchanged", |o| {
        if o == Outcome::Unknown {
            Outcome::Unchanged
        } else {
            o
        }
    }),
    ("unknown is called done", |o| {
        if o == Outcome::Unknown {
            Outcome::Done
        } else {
            o
        }
    }),
    ("done is called unchanged", |o| {
        if o == Outcome::Done {
            Outcome::Unchanged
        } else {
            o
        }
    }),
];

/// Every verb on every clean image of the bound; or on one in four of those with a count that is too low.
fn samples(bound: &Bound, damaged: bool) -> Vec<Sample> {
    let (mut out, mut n) = (vec![], 0);
    each_image(bound, |spec, deviations| {
        let Some((before, low)) = spec.bytes(deviations) else {
            return true;
        };
        if damaged != low.is_some() || deviations.is_empty() == damaged {
            return true;
        }
        n += 1;
        if damaged && n % 4 != 0 {
            return true;
        }
        let storage = Box::new(MemoryStorage::new(before.clone()));
        if Image::open_storage(storage, OpenFlags::RDWR).is_err() {
            return true;
        }
        let reading = || match low {
            None => read(&before).unwrap(),
            Some(cluster) => read_damaged(&before, Damage { cluster, skip: &[] }).unwrap(),
        };
        for verb in verbs(&before, &reading().image) {
            let old = reading();
            let clean = run(&before, &old.image, verb, None);
            if clean.result.is_ok() && !clean.in_place {
                let new = verb.on(&old.image, CLUSTER);
                let low = low.map(|low| (low, hanging(&old, verb, &new)));
                out.push(Sample {
                    before: before.clone(),
                    old,
                    new,
                    verb,
                    log: clean.events,
                    low,
                });
            }
        }
        true
    });
    out
}

impl Sample {
    fn judge(&self) -> Judge<'_> {
        Judge {
            verb: self.verb,
            old: &self.old,
            new: &self.new,
            in_place: false,
            damage: self.low.as_ref().map(|(cluster, skip)| Damage {
                cluster: *cluster,
                skip,
            }),
        }
    }
}

/// Plant each fault in the logs. The names of those that are not found.
fn plant_all(samples: &[Sample]) -> Vec<&'static str> {
    let mut missed = vec![];
    for (name, plant) in ORDER {
        let (mut planted, mut found, mut first) = (0, 0, String::new());
        for s in samples {
            let Some(log) = plant(s) else { continue };
            planted += 1;
            if let Err(why) = judge_log(&s.before, &log, &s.judge()) {
                if found == 0 {
                    first = format!("{:?}: {}", s.verb, why.lines().next().unwrap_or_default());
                }
                found += 1;
            }
        }
        println!("  {name}: found in {found} of {planted} logs; {first}");
        if found == 0 {
            missed.push(*name);
        }
    }
    missed
}

#[test]
fn every_planted_fault_is_found() {
    let samples = samples(&super::CHECK[0], false);
    println!("{} verbs on {:?}", samples.len(), super::CHECK[0]);
    let mut missed = plant_all(&samples);
    for (name, lie) in OUTCOMES {
        let (mut told, mut found) = (0, 0);
        for s in samples.iter().step_by(16) {
            let (cuts, _) = cuts(&s.before, &s.log, &s.judge()).unwrap();
            for nth in 1.. {
                let plan =
                    super::FaultPlan::nth(nth, libc::EIO).of_kind(super::RequestKind::Barrier);
                let failed = run(&s.before, &s.old.image, s.verb, Some(plan));
                if failed.result.is_ok() {
                    break;
                }
                let said = lie(failed.outcome);
                if said != failed.outcome {
                    told += 1;
                    found += u64::from(
                        outcome_is_true(&cuts, failed.events.len(), false, said).is_err(),
                    );
                }
            }
        }
        println!("  {name}: found {found} of {told} times");
        if found == 0 {
            missed.push(*name);
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
    assert!(ORDER.len() + OUTCOMES.len() >= 20);
}

/// Where a count is too low it is not asked how often anything is counted, nor for flags: what only they show is not found.
#[test]
fn faults_planted_in_verbs_on_damaged_images_are_found() {
    // With three clusters a state may have data and hang on nothing that another one hangs on.
    let bound = super::bound([2, 3, 1, 1, 1, 1, 1]);
    let samples = samples(&bound, true);
    println!("{} verbs on damaged images of {bound:?}", samples.len());
    let missed = plant_all(&samples);
    let only_by_counts = |name: &&str| name.contains("count") || name.contains("COPIED");
    let others: Vec<_> = missed.iter().filter(|name| !only_by_counts(name)).collect();
    assert!(others.is_empty(), "not found: {others:?}");
}
