//! Faults planted in what the library writes, or says: the judge must find each.
//!
//! A fault is a change of the log, so that it stays a fault whatever the engine looks like inside.

use qcow2_snapshot::io::trace::Event;
use qcow2_snapshot::Outcome;

use super::{
    cuts, each_image, judge_log, outcome_is_true, read, run, verbs, Bound, Judge, Reading, Verb,
    CLUSTER,
};
use crate::model;

/// A verb that succeeded.
struct Sample {
    before: Vec<u8>,
    old: Reading,
    new: model::Image,
    verb: Verb,
    log: Vec<Event>,
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

/// Every verb on every clean image of the bound.
fn samples(bound: &Bound) -> Vec<Sample> {
    let mut out = vec![];
    each_image(bound, |spec, deviations| {
        let Some((before, None)) = spec.bytes(deviations).filter(|_| deviations.is_empty()) else {
            return true;
        };
        for verb in verbs(&before, &read(&before).unwrap().image) {
            let old = read(&before).unwrap();
            let clean = run(&before, &old.image, verb, None);
            if clean.result.is_ok() && !clean.in_place {
                let new = verb.on(&old.image, CLUSTER);
                out.push(Sample {
                    before: before.clone(),
                    old,
                    new,
                    verb,
                    log: clean.events,
                });
            }
        }
        true
    });
    out
}

#[test]
fn every_planted_fault_is_found() {
    let samples = samples(&super::CHECK[0]);
    println!("{} verbs on {:?}", samples.len(), super::CHECK[0]);
    let mut missed = vec![];
    for (name, plant) in ORDER {
        let (mut planted, mut found, mut first) = (0, 0, String::new());
        for s in &samples {
            let Some(log) = plant(s) else { continue };
            planted += 1;
            let judge = Judge {
                verb: s.verb,
                old: &s.old,
                new: &s.new,
                in_place: false,
            };
            if let Err(why) = judge_log(&s.before, &log, &judge) {
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
    for (name, lie) in OUTCOMES {
        let (mut told, mut found) = (0, 0);
        for s in samples.iter().step_by(16) {
            let judge = Judge {
                verb: s.verb,
                old: &s.old,
                new: &s.new,
                in_place: false,
            };
            let (cuts, _) = cuts(&s.before, &s.log, &judge).unwrap();
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
